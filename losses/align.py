"""Align Loss of the second version of Align-DETR (arXiv 2304.07527v2): IA-BCE that absorbs the focal term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from losses.binary import ClassificationLoss, Negatives, binary_cross_entropy, power, require, weighted
from losses.ia_bce import aligned_quality


@dataclass(frozen=True, kw_only=True)
class Align(ClassificationLoss):
    """Matched entries |t−s|^γ·BCE(s, t) with t = w·max(s^α·u^(1−α), 0.01), all others s^γ·BCE(s, 0).

    The released code holds IA-BCE only; that the gradient passes through |t−s|^γ, as through every focal factor, and
    that t keeps its lower bound are our reading.
    """

    name: Literal["align"] = "align"
    """Picks this loss."""
    alpha: float = 0.25
    """Share of the score in the target, in [0, 1]: 0 makes it all IoU, 1 all score."""
    gamma: float = 2.0
    """Focal exponent, at least 0."""

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, f"align: alpha must be in [0, 1], not {self.alpha}")
        require(self.gamma >= 0, f"align: gamma must be at least 0, not {self.gamma}")

    def negatives(self) -> Negatives:
        return Negatives(self.gamma)

    def matched(self, logit: Tensor, iou: Tensor, weight: Tensor | None, groups: Tensor | None) -> Tensor:
        score = logit.sigmoid()
        target = weighted(aligned_quality(score, iou, self.alpha), weight)
        return power((target - score).abs(), self.gamma) * binary_cross_entropy(logit, target)

    def quality(self, score: Tensor, iou: Tensor) -> Tensor:
        """The target before weighting: [M], detached."""
        return aligned_quality(score, iou, self.alpha)
