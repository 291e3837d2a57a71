"""One query for each target, as DETR matches (arXiv 2005.12872, equation 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from matchers.cost import MatchingCost
from matchers.matching import LayerwiseMatcher


@dataclass(frozen=True, kw_only=True)
class Hungarian(LayerwiseMatcher):
    """The assignment of one query to each target that costs least in total."""

    name: Literal["hungarian"] = "hungarian"
    """Picks this matcher."""
    cost: MatchingCost = field(default_factory=MatchingCost)
    """What matching a query with a target costs."""

    def layer_candidates(self, num_layers: int) -> tuple[int, ...]:
        """Queries that a target may take in each of ``num_layers`` supervised layers: one."""
        return (1,) * num_layers
