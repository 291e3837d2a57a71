"""One query for each target, as DETR matches (arXiv 2005.12872, equation 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from matchers.cost import Cost, FocalCost
from matchers.matching import LayerwiseMatcher


@dataclass(frozen=True, kw_only=True)
class Hungarian(LayerwiseMatcher):
    """The assignment of one query to each target that costs least in total."""

    name: Literal["hungarian"] = "hungarian"
    cost: Cost = field(default_factory=FocalCost)
    """What matching a query with a target costs."""

    def candidates_by_layer(self, layers: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """One query for each target, in every layer of every group."""
        return {group: (1,) * count for group, count in layers.items()}
