"""Varifocal loss (arXiv 2008.13367, equation 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from losses.binary import ClassificationLoss, Negatives, binary_cross_entropy, require, weighted


@dataclass(frozen=True, kw_only=True)
class Varifocal(ClassificationLoss):
    """Matched entries t·BCE(s, t) with t = w·u, all others α·s^γ·BCE(s, 0).

    A matched entry whose boxes do not overlap costs nothing, as in the detectors of the DETR family that use this loss;
    the dense detector of the paper takes it for a negative.
    """

    name: Literal["vfl"] = "vfl"
    alpha: float = 0.75
    """Factor of the negatives, at least 0."""
    gamma: float = 2.0
    """Exponent that modulates the negatives, at least 0."""

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"vfl: alpha must be at least 0, not {self.alpha}")
        require(self.gamma >= 0, f"vfl: gamma must be at least 0, not {self.gamma}")

    def negatives(self) -> Negatives:
        return Negatives(self.gamma, self.alpha)

    def matched(self, logit: Tensor, iou: Tensor, weight: Tensor | None, groups: Tensor | None) -> Tensor:
        target = weighted(iou, weight)
        return target * binary_cross_entropy(logit, target)
