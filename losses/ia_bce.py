"""IoU-aware binary cross entropy, the loss of Align-DETR (arXiv 2304.07527, first version)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from losses.binary import ClassificationLoss, Negatives, binary_cross_entropy, require, weighted

SMALLEST_TARGET = 0.01
"""Lower bound of t before weighting, as in the released code."""


@dataclass(frozen=True, kw_only=True)
class IABCE(ClassificationLoss):
    """Matched entries BCE(s, t) with t = w·max(s^α·u^(1−α), 0.01), all others s^γ·BCE(s, 0)."""

    name: Literal["ia_bce"] = "ia_bce"
    """Picks this loss."""
    alpha: float = 0.25
    """Share of the score in the target, in [0, 1]: 0 makes it all IoU, 1 all score."""
    gamma: float = 2.0
    """Exponent that modulates the other entries, at least 0."""

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, f"ia_bce: alpha must be in [0, 1], not {self.alpha}")
        require(self.gamma >= 0, f"ia_bce: gamma must be at least 0, not {self.gamma}")

    def negatives(self) -> Negatives:
        return Negatives(self.gamma)

    def matched(self, logit: Tensor, iou: Tensor, weight: Tensor | None, groups: Tensor | None) -> Tensor:
        target = weighted(aligned_quality(logit.sigmoid(), iou, self.alpha), weight)
        return binary_cross_entropy(logit, target)

    def quality(self, score: Tensor, iou: Tensor) -> Tensor:
        """The target before weighting, by which the paper ranks candidates: [M], detached."""
        return aligned_quality(score, iou, self.alpha)


def aligned_quality(score: Tensor, iou: Tensor, alpha: float) -> Tensor:
    """max(s^α·u^(1−α), 0.01) of scores and IoUs [M] in [0, 1]: [M], detached."""
    return (score.detach().pow(alpha) * iou.detach().pow(1 - alpha)).clamp(min=SMALLEST_TARGET)
