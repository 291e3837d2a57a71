"""Align Loss of the second version of Align-DETR (arXiv 2304.07527v2): IA-BCE that absorbs the focal term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from losses.ia_bce import IABCE, MatchedFocal


@dataclass(frozen=True, kw_only=True)
class Align(IABCE):
    """Matched entries |t−s|^γ·BCE(s, t) with t = w·max(s^α·u^(1−α), 0.01), all others s^γ·BCE(s, 0).

    The released code calls IA-BCE only; that the gradient passes through |t−s|^γ, as through every focal factor, and
    that t keeps its lower bound are our reading. It is ``ia_bce`` with another default, under a name of its own.
    """

    name: Literal["align"] = "align"  # type: ignore[assignment]
    matched_focal: MatchedFocal = "distance"
    """Focal factor of the matched entries, as for ``ia_bce``."""
