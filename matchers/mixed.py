"""Several queries for each target in all layers but the last (Align-DETR, arXiv 2304.07527, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from matchers.cost import MatchingCost
from matchers.matching import LayerwiseMatcher


@dataclass(frozen=True, kw_only=True)
class Mixed(LayerwiseMatcher):
    """Up to k queries for each target, no query twice, at the least total cost; one in the last layer.

    k is cut for each image by itself to max(1, min(k, Q // G)), so that a crowded image does not change the others.
    """

    name: Literal["mixed"] = "mixed"
    """Picks this matcher."""
    candidates: int | tuple[int, ...] = 2
    """Queries k for each target: one number for every supervised layer but the last, which has 1; or a number for
    each supervised layer, the encoder output first (if it is supervised), then the decoder layers."""
    cost: MatchingCost = field(default_factory=MatchingCost)
    """What matching a query with a target costs."""

    def __post_init__(self) -> None:
        given = (self.candidates,) if isinstance(self.candidates, int) else self.candidates
        if not given or any(k < 1 for k in given):
            raise ValueError(f"matcher.candidates must be 1 or more in every layer, not {self.candidates}")

    def layer_candidates(self, num_layers: int) -> tuple[int, ...]:
        """Queries that a target may take in each of ``num_layers`` supervised layers.

        Raises:
            ValueError: a number is given for each layer, but not for this many layers.
        """
        if isinstance(self.candidates, int):
            return (*(self.candidates,) * (num_layers - 1), 1)
        if len(self.candidates) != num_layers:
            raise ValueError(
                f"matcher.candidates lists {len(self.candidates)} numbers, but {num_layers} layers are supervised"
                " (the encoder output first, if there is one, then the decoder layers)"
            )
        return self.candidates
