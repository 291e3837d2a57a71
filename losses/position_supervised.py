"""Position-supervised loss of Stable-DINO (arXiv 2304.04742, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from losses.binary import ClassificationLoss, Negatives, binary_cross_entropy, power, require, weighted
from losses.ranking import max_within

_SMALLEST = 1e-8


@dataclass(frozen=True, kw_only=True)
class PositionSupervised(ClassificationLoss):
    """Matched entries α|t−s|^γ·BCE(s, t) with t = w·f(u), all others (1−α)s^γ·BCE(s, 0).

    f(u) is u^β, scaled up within each image (of a layer) so that its best match has 1. The scaling and the balance α
    are those of the released code.
    """

    name: Literal["position_supervised"] = "position_supervised"
    alpha: float = 0.25
    """Balance of matched entries against all others, in [0, 1]."""
    beta: float = 2.0
    """Exponent of the IoU in the target, at least 0."""
    gamma: float = 2.0
    """Focal exponent, at least 0."""

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, f"position_supervised: alpha must be in [0, 1], not {self.alpha}")
        require(min(self.beta, self.gamma) >= 0, "position_supervised: beta and gamma must be at least 0")

    def negatives(self) -> Negatives:
        return Negatives(self.gamma, 1 - self.alpha)

    def matched(self, logit: Tensor, iou: Tensor, weight: Tensor | None, groups: Tensor | None) -> Tensor:
        position = power(iou, self.beta)
        if len(position):
            best = position.amax() if groups is None else max_within(position, groups)
            position = position / (best + _SMALLEST).clamp(max=1)
        target = weighted(position, weight)
        distance = (target - logit.sigmoid()).abs()
        return self.alpha * power(distance, self.gamma) * binary_cross_entropy(logit, target)
