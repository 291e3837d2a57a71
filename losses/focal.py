"""Focal loss (arXiv 1708.02002), the classification loss of DINO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from losses.binary import ClassificationLoss, Negatives, binary_cross_entropy, power, require, weighted


@dataclass(frozen=True, kw_only=True)
class Focal(ClassificationLoss):
    """Matched entries α(1−s)^γ·BCE(s, 1), all others (1−α)s^γ·BCE(s, 0).

    Under prime sample weighting the target 1 becomes w: α|w−s|^γ·BCE(s, w). This is our reading, as the paper weighs
    only its own loss; at w = 1 it is the focal loss. Candidates are ranked by IoU, since the target is constant.
    """

    name: Literal["focal"] = "focal"
    alpha: float = 0.25
    """Balance of matched entries against all others, in [0, 1]."""
    gamma: float = 2.0
    """Focal exponent, at least 0."""

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, f"focal: alpha must be in [0, 1], not {self.alpha}")
        require(self.gamma >= 0, f"focal: gamma must be at least 0, not {self.gamma}")

    def negatives(self) -> Negatives:
        return Negatives(self.gamma, 1 - self.alpha)

    def matched(self, logit: Tensor, iou: Tensor, weight: Tensor | None, groups: Tensor | None) -> Tensor:
        target = weighted(torch.ones_like(logit), weight)
        distance = (-logit).sigmoid()  # |w−s| at w = 1, exact where s rounds to 1
        if weight is not None:
            distance = (distance - (1 - target)).abs()
        return self.alpha * power(distance, self.gamma) * binary_cross_entropy(logit, target)
