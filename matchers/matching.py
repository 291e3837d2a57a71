"""From predictions to matches: cost on the device, one copy to the host, assignment there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matchers.assignment import assign
from matchers.cost import Cost, pairwise_cost, to_device
from structures import Matches, Prediction, QueryGroup, Targets

_UNWANTED = 1e6
"""Cost of matching a query that is not valid, far above every real one."""


class NonFinitePredictionError(ValueError):
    """A model predicted NaN or infinity: training has diverged, or half precision has overflowed."""


class LayerwiseMatcher(ABC):
    """Says which queries are matched with which targets: a pure function on the host, from costs to pairs.

    A subclass says how many queries a target may take in each layer, at the least total cost; or it overrides
    :meth:`pairs`, where its rule is another.
    """

    cost: Cost

    @abstractmethod
    def candidates_by_layer(self, layers: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The most queries that a target may take, in each layer of each group.

        Args:
            layers: number of layers of each group that this matcher is responsible for, in the order of supervision.

        Raises:
            ValueError: the configuration does not fit these layers.
        """

    def pairs(self, cost: NDArray[np.float32], counts: Sequence[int], candidates: Sequence[int]) -> NDArray[np.int64]:
        """Match the layers of one group, each by itself, at the least total cost.

        Args:
            cost: [L, B, max G, Q], finite; rows from an image's own number of targets on are meaningless.
            counts: B numbers of targets.
            candidates: L numbers of queries k that a target may take. An image with G targets uses
                max(1, min(k, Q // G)) of them, whatever the other images hold.

        Returns:
            [4, M] layer, image, query and target (numbered within its image), sorted in this order; a query at most
            once in a layer. If an image holds more targets than queries, the costliest targets are left out.
        """
        num_layers, num_images, max_targets, num_queries = cost.shape
        if num_queries == 0:
            return np.empty((4, 0), dtype=np.int64)
        # One problem for each layer and image: P = L·B, numbered layer by layer.
        layer, image = (index.reshape(-1) for index in np.indices((num_layers, num_images)))  # [P]
        count = np.asarray(counts, dtype=np.int64)[image]  # [P] targets
        k = np.minimum(np.asarray(candidates, dtype=np.int64)[layer], num_queries // np.maximum(count, 1))
        k = np.maximum(k, 1)  # [P] queries of each target
        query = assign(cost.reshape(len(layer), max_targets, num_queries), count, k)  # [Σ count·k], −1: left out
        target = np.concatenate([np.repeat(np.arange(c), n) for c, n in zip(count, k, strict=True)])
        table = np.stack([np.repeat(layer, count * k), np.repeat(image, count * k), query, target])
        return table[:, query >= 0]


def match_groups(
    groups: Mapping[str, QueryGroup],
    matchers: Mapping[str, LayerwiseMatcher],
    candidates: Mapping[str, Sequence[int]],
    targets: Targets,
) -> dict[str, Matches]:
    """Find the matches of all groups that have none yet, with one device-to-host copy for all of them.

    Args:
        groups: of a detector.
        matchers: of each group without matches.
        candidates: queries that a target may take, in each layer of each group without matches.
        targets: of the same B images.

    Returns:
        For each group without matches, its matches on the device of the predictions, sorted by layer, image, target
        and query.

    Raises:
        NonFinitePredictionError: a prediction of any group is NaN or infinite; names group, layer and image.
    """
    wanted = {name: group for name, group in groups.items() if group.matches is None}
    costs = _costs(matchers, wanted, targets)
    checksums, costs_on_host = _to_host([_checksum(group.prediction) for group in groups.values()], costs)
    for name, checksum in zip(groups, checksums, strict=True):
        _require_finite(name, checksum)
    first_target = np.concatenate(([0], np.cumsum(targets.counts))).astype(np.int64)
    tables = [np.empty((4, 0), dtype=np.int64)]
    for name, cost in zip(wanted, costs_on_host, strict=True):
        table = matchers[name].pairs(cost, targets.counts, candidates[name])
        table[3] += first_target[table[1]]
        tables.append(table)
    device = next(iter(groups.values())).prediction.logits.device
    parts = to_device(np.concatenate(tables, axis=1), device).split([table.shape[1] for table in tables], dim=1)
    return {name: Matches(*part.unbind(0)) for name, part in zip(wanted, parts[1:], strict=True)}


def match(matcher: LayerwiseMatcher, prediction: Prediction, targets: Targets) -> Matches:
    """Match one prediction by itself; its last layer counts as the last decoder layer.

    Args:
        matcher: how.
        prediction: logits [L, B, Q, C] and boxes [L, B, Q, 4].
        targets: of the same B images.

    Raises:
        NonFinitePredictionError: the prediction is NaN or infinite.
        ValueError: the matcher is configured for another number of layers.
    """
    candidates = matcher.candidates_by_layer({"decoder": prediction.logits.shape[0]})
    return match_groups({"decoder": QueryGroup(prediction)}, {"decoder": matcher}, candidates, targets)["decoder"]


def _costs(
    matchers: Mapping[str, LayerwiseMatcher], wanted: Mapping[str, QueryGroup], targets: Targets
) -> list[Tensor]:
    """[L, B, max G, Q] of each group; those that differ in layers alone are computed as one."""
    alike: dict[Any, list[str]] = {}
    for name, group in wanted.items():
        kind = name if group.valid is not None or group.class_agnostic else group.prediction.logits.shape[1:]
        alike.setdefault((kind, matchers[name].cost), []).append(name)
    costs: dict[str, Tensor] = {}
    for (_, cost), names in alike.items():
        predictions = [wanted[name].prediction for name in names]
        layers = [len(prediction.logits) for prediction in predictions]
        joined = predictions[0]
        if len(names) > 1:
            joined = Prediction(
                *(torch.cat([part.detach() for part in parts]) for parts in zip(*predictions, strict=True))
            )
        found = _cost(cost, wanted[names[0]]._replace(prediction=joined), targets).split(layers)
        costs |= dict(zip(names, found, strict=True))
    return [costs[name] for name in wanted]


def _cost(cost: Cost, group: QueryGroup, targets: Targets) -> Tensor:
    """[L, B, max G, Q]; queries that are not valid are matched last of all."""
    if group.class_agnostic:
        targets = targets._replace(labels=torch.zeros_like(targets.labels))
    costs = pairwise_cost(cost, group.prediction, targets)
    return costs if group.valid is None else costs.masked_fill_(~group.valid[:, None], _UNWANTED)


def _checksum(prediction: Prediction) -> Tensor:
    """[L, B] that is finite only if every logit and box of the layer and image is."""
    logits, boxes = prediction.logits.detach(), prediction.boxes.detach()
    return logits.sum((-2, -1), dtype=torch.float32) + boxes.sum((-2, -1), dtype=torch.float32)


def _require_finite(name: str, checksum: NDArray[np.float32]) -> None:
    bad = np.argwhere(~np.isfinite(checksum))
    if len(bad):
        layer, image = bad[0]
        raise NonFinitePredictionError(
            f"the predictions of {name} layer {layer} for image {image} of the batch hold NaN or infinity"
            f" ({len(bad)} of {checksum.size} layers × images do): lower the learning rate, clip gradients or use bf16"
            " instead of fp16"
        )


def _to_host(*lists: list[Tensor]) -> list[list[NDArray[np.float32]]]:
    """Copies of float32 tensors on the host: one transfer, so one synchronisation, for all lists together."""
    tensors = [tensor for part in lists for tensor in part]
    if tensors[0].device.type == "cpu":
        return [[tensor.numpy() for tensor in part] for part in lists]
    flat = iter(torch.cat([tensor.flatten() for tensor in tensors]).cpu().split([t.numel() for t in tensors]))
    return [[next(flat).view(tensor.shape).numpy() for tensor in part] for part in lists]
