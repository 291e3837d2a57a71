"""Cross entropy over the classes and "no object", the classification loss of DETR (arXiv 2005.12872, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from losses.binary import ClassificationLoss, at_least_float32, require


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(ClassificationLoss):
    """−log p of the class of a matched query, −w·log p of "no object", the last logit, of all others.

    The sum is divided by the sum of these weights, as published. Prime sample weights scale the loss of a match.
    """

    name: Literal["cross_entropy"] = "cross_entropy"
    no_object_weight: float = 0.1
    """Weight w of the queries without a target, at least 0."""

    no_object: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.no_object_weight >= 0, "cross_entropy: no_object_weight must be at least 0")

    def __call__(
        self,
        logits: Tensor,
        rows: Tensor,
        labels: Tensor,
        iou: Tensor,
        weight: Tensor | None = None,
        groups: Tensor | None = None,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """Loss of each row [N] of logits [N, C + 1]; arguments as in ``ClassificationLoss``."""
        with torch.autocast(logits.device.type, enabled=False):
            log_probability = at_least_float32(logits).log_softmax(-1)
            losses = -self.no_object_weight * log_probability[:, -1]
            matched = -log_probability[rows, labels]
            if weight is not None:
                matched = matched * weight.detach().to(matched.dtype)
            if class_weights is not None:
                matched = matched * class_weights[labels]
            return losses.index_put((rows,), matched)

    def score(self, logits: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """Softmax score [M] of the target's class in the matched rows, detached."""
        return at_least_float32(logits.detach()[rows]).softmax(-1).gather(1, labels[:, None]).squeeze(1)

    def normaliser(self, num_targets: float | Tensor, num_queries: int, num_images: int) -> float | Tensor:
        """The sum of the weights of all queries of the global batch, each target having one."""
        return num_targets + self.no_object_weight * (num_queries - num_targets)
