"""IoU-aware binary cross entropy of Align-DETR (arXiv 2304.07527, first version), and its forms in public code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from losses.binary import ClassificationLoss, Negatives, binary_cross_entropy, power, require, weighted

SMALLEST_TARGET = 0.01
"""Lower bound of t before weighting, as in the released code."""

MatchedFocal = Literal["none", "distance", "entries", "signed_entries", "soft"]
"""What a focal factor makes of BCE(s, t) at a matched entry:

- ``none``: BCE(s, t), as published.
- ``distance``: |t−s|^γ·BCE(s, t), as in quality focal loss; the loss that ``align`` names.
- ``entries``: |t−s|^γ·(−log s) + (1−t)·s^γ·(−log(1−s)), a factor for each of the two logarithms.
- ``signed_entries``: the same with (t−s)^γ, for whole γ: an odd one rewards scores above their target.
- ``soft``: (t(1−s) + s(1−t))^γ·BCE(s, t), focal loss of a soft label.
"""


@dataclass(frozen=True, kw_only=True)
class IABCE(ClassificationLoss):
    """Matched entries BCE(s, t) with t = w·max(s^α·u^(1−α), 0.01), all others s^γ·BCE(s, 0).

    The fields after ``gamma`` make other published forms of it; as they stand by default they change nothing.
    ``configs/losses`` holds the forms by name.
    """

    name: Literal["ia_bce"] = "ia_bce"
    alpha: float = 0.25
    """Share of the score in the target, in [0, 1]: 0 makes it all IoU, 1 all score."""
    gamma: float = 2.0
    """Exponent that modulates the other entries, and with ``matched_focal`` the matched ones; at least 0."""
    matched_focal: MatchedFocal = "none"
    """Focal factor of the matched entries: none, distance, entries, signed_entries or soft."""
    matched_weight: float = 1.0
    """Factor of the loss of the matched entries, at least 0."""
    negative_scale: float = 1.0
    """Factor of the loss of all other entries, at least 0."""
    negative_detached: bool = False
    """Whether s^γ of the other entries is a constant in the gradient."""
    smallest_target: float = SMALLEST_TARGET
    """Lower bound of the target before weighting, in [0, 1]."""
    smallest_iou: float = 0.0
    """Lower bound of the IoU in the target, in [0, 1]."""
    mean_over_queries: int | None = None
    """Divide by the queries of all images, counting at least so many in each; null divides by the targets."""

    def __post_init__(self) -> None:
        for name in ("alpha", "smallest_target", "smallest_iou"):
            require(0 <= getattr(self, name) <= 1, f"{self.name}: {name} must be in [0, 1], not {getattr(self, name)}")
        for name in ("gamma", "matched_weight", "negative_scale"):
            require(getattr(self, name) >= 0, f"{self.name}: {name} must be at least 0, not {getattr(self, name)}")
        require(
            self.mean_over_queries is None or self.mean_over_queries >= 0,
            f"{self.name}: mean_over_queries is a number of queries",
        )
        require(
            self.matched_focal != "signed_entries" or self.gamma == int(self.gamma),
            f"{self.name}: gamma must be whole for matched_focal signed_entries, not {self.gamma}",
        )

    def normaliser(self, num_targets: float | Tensor, num_queries: int, num_images: int) -> float | Tensor:
        least = self.mean_over_queries
        return num_targets if least is None else max(num_queries, least * num_images, 1)

    def negatives(self) -> Negatives:
        return Negatives(self.gamma, self.negative_scale, self.negative_detached)

    def matched(self, logit: Tensor, iou: Tensor, weight: Tensor | None, groups: Tensor | None) -> Tensor:
        score = logit.sigmoid()
        target = weighted(self.quality(score, iou), weight)
        loss = self._matched(logit, score, target)
        return loss if self.matched_weight == 1 else loss * self.matched_weight

    def _matched(self, logit: Tensor, score: Tensor, target: Tensor) -> Tensor:
        if self.matched_focal == "none":
            return binary_cross_entropy(logit, target)
        if self.matched_focal == "distance":
            return power((target - score).abs(), self.gamma) * binary_cross_entropy(logit, target)
        if self.matched_focal == "soft":
            return power(target * (1 - score) + score * (1 - target), self.gamma) * binary_cross_entropy(logit, target)
        signed = self.matched_focal == "signed_entries"
        distance = target - score
        factor = distance ** int(self.gamma) if signed else power(distance.abs(), self.gamma)
        return factor * F.softplus(-logit) + (1 - target) * power(score, self.gamma) * F.softplus(logit)

    def quality(self, score: Tensor, iou: Tensor) -> Tensor:
        """The target before weighting, by which the paper ranks candidates: [M], detached."""
        iou = iou.detach().clamp(min=self.smallest_iou) if self.smallest_iou else iou
        return aligned_quality(score, iou, self.alpha, self.smallest_target)


def aligned_quality(score: Tensor, iou: Tensor, alpha: float, smallest: float = SMALLEST_TARGET) -> Tensor:
    """max(s^α·u^(1−α), smallest) of scores and IoUs [M] in [0, 1]: [M], detached."""
    return (score.detach().pow(alpha) * iou.detach().pow(1 - alpha)).clamp(min=smallest)
