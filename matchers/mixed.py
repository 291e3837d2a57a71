"""Several queries for each target in all layers but the last (Align-DETR, arXiv 2304.07527, section 3.3)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from matchers.cost import Cost, FocalCost
from matchers.matching import LayerwiseMatcher


@dataclass(frozen=True, kw_only=True)
class Mixed(LayerwiseMatcher):
    """Up to k queries for each target, no query twice, at the least total cost; one in the layer of the result.

    k is cut for each image by itself to max(1, min(k, Q // G)), so that a crowded image does not change the others.
    """

    name: Literal["mixed"] = "mixed"
    candidates: int | tuple[int, ...] = 2
    """Queries k for each target: one number for every supervised layer but the decoder's last, which has 1; or a number
    for each supervised layer, the encoder output first (if it is supervised), then the decoder layers."""
    cost: Cost = field(default_factory=FocalCost)
    """What matching a query with a target costs."""

    def __post_init__(self) -> None:
        given = (self.candidates,) if isinstance(self.candidates, int) else self.candidates
        if not given or any(k < 1 for k in given):
            raise ValueError(f"matcher.candidates must be 1 or more in every layer, not {self.candidates}")

    def candidates_by_layer(self, layers: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The most queries that a target may take, in each layer of each group.

        Raises:
            ValueError: a number is given for each layer, but not for this many layers.
        """
        if isinstance(self.candidates, int):
            result = {name: [self.candidates] * count for name, count in layers.items()}
            if "decoder" in result:
                result["decoder"][-1] = 1  # no query twice among the detections
            return {name: tuple(numbers) for name, numbers in result.items()}
        total = sum(layers.values())
        if len(self.candidates) != total:
            raise ValueError(
                f"matcher.candidates lists {len(self.candidates)} numbers, but {total} layers are supervised by it: "
                + ", ".join(f"{count} of {name}" for name, count in layers.items())
            )
        numbers = iter(self.candidates)
        return {name: tuple(itertools.islice(numbers, count)) for name, count in layers.items()}
