"""Index of matchers: a new one is a file here and a name in ``Matcher``."""

from matchers.cost import Cost, FocalCost, PositionModulatedCost, SoftmaxCost
from matchers.hungarian import Hungarian
from matchers.matching import LayerwiseMatcher, NonFinitePredictionError, match, match_groups
from matchers.mixed import Mixed

Matcher = Hungarian | Mixed
"""Picked by ``name`` in a configuration."""

__all__ = [
    "Cost",
    "FocalCost",
    "Hungarian",
    "LayerwiseMatcher",
    "Matcher",
    "Mixed",
    "NonFinitePredictionError",
    "PositionModulatedCost",
    "SoftmaxCost",
    "match",
    "match_groups",
]
