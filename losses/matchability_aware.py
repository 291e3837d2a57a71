"""Matchability-aware loss of DEIM (arXiv 2412.04234, equation 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from losses.binary import ClassificationLoss, Negatives, binary_cross_entropy, power, require, weighted


@dataclass(frozen=True, kw_only=True)
class MatchabilityAware(ClassificationLoss):
    """Matched entries BCE(s, t) with t = w·u^γ, all others s^γ·BCE(s, 0), where s^γ is a constant in the gradient.

    The paper does not say whether the gradient passes through s^γ; in the released code it does not.
    """

    name: Literal["matchability_aware"] = "matchability_aware"
    gamma: float = 1.5
    """Exponent of the IoU in the target and of the modulation of the negatives, at least 0."""

    def __post_init__(self) -> None:
        require(self.gamma >= 0, f"matchability_aware: gamma must be at least 0, not {self.gamma}")

    def negatives(self) -> Negatives:
        return Negatives(self.gamma, detached=True)

    def matched(self, logit: Tensor, iou: Tensor, weight: Tensor | None, groups: Tensor | None) -> Tensor:
        return binary_cross_entropy(logit, weighted(power(iou, self.gamma), weight))
