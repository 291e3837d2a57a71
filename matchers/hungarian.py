"""One query for each target, as DETR matches (arXiv 2005.12872, equation 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from matchers.cost import MatchingCost
from matchers.matching import match_supervisions
from structures import Matches, Prediction, Targets


@dataclass(frozen=True, kw_only=True)
class Hungarian:
    """The assignment of one query to each target that costs least in total."""

    name: Literal["hungarian"] = "hungarian"
    """Picks this matcher."""
    cost: MatchingCost = field(default_factory=MatchingCost)
    """What matching a query with a target costs."""

    def layer_candidates(self, num_layers: int) -> tuple[int, ...]:
        """Queries that a target may take in each of ``num_layers`` supervised layers: one."""
        return (1,) * num_layers

    def match(
        self,
        predictions: Mapping[str, Prediction],
        targets: Targets,
        watched: Mapping[str, Prediction] | None = None,
    ) -> dict[str, Matches]:
        """Several supervisions at once; see ``matching.match_supervisions``."""
        num_layers = sum(prediction.logits.shape[0] for prediction in predictions.values())
        return match_supervisions(predictions, targets, self.layer_candidates(num_layers), self.cost, watched)

    def __call__(self, prediction: Prediction, targets: Targets) -> Matches:
        """Match all layers and images.

        Args:
            prediction: logits [L, B, Q, C] and boxes [L, B, Q, 4].
            targets: of the same B images.

        Returns:
            Matches, sorted by layer, image, target; of an image with more targets than queries, only Q targets.

        Raises:
            NonFinitePredictionError: a prediction is NaN or infinite.
        """
        return self.match({"prediction": prediction}, targets)["prediction"]
