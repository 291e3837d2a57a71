"""Index of matchers: a new one is a file here and a name in ``Matcher``."""

from matchers.cost import MatchingCost
from matchers.hungarian import Hungarian
from matchers.matching import NonFinitePredictionError
from matchers.mixed import Mixed

Matcher = Hungarian | Mixed
"""Picked by ``name`` in a configuration."""

__all__ = ["Hungarian", "Matcher", "MatchingCost", "Mixed", "NonFinitePredictionError"]
