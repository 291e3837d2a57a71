"""Quality focal loss (arXiv 2006.04388, equation 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from losses.binary import ClassificationLoss, Negatives, binary_cross_entropy, power, require, weighted


@dataclass(frozen=True, kw_only=True)
class QualityFocal(ClassificationLoss):
    """Matched entries |t−s|^β·BCE(s, t) with t = w·u, all others s^β·BCE(s, 0)."""

    name: Literal["qfl"] = "qfl"
    beta: float = 2.0
    """Focal exponent, at least 0."""

    def __post_init__(self) -> None:
        require(self.beta >= 0, f"qfl: beta must be at least 0, not {self.beta}")

    def negatives(self) -> Negatives:
        return Negatives(self.beta)

    def matched(self, logit: Tensor, iou: Tensor, weight: Tensor | None, groups: Tensor | None) -> Tensor:
        target = weighted(iou, weight)
        return power((target - logit.sigmoid()).abs(), self.beta) * binary_cross_entropy(logit, target)
