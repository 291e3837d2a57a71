"""From predictions to matches: cost on the device, one copy to the host, assignment there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matchers.assignment import assign
from matchers.cost import MatchingCost
from structures import Matches, Prediction, Targets


class NonFinitePredictionError(ValueError):
    """A model predicted NaN or infinity: training has diverged, or half precision has overflowed."""


class LayerwiseMatcher(ABC):
    """Assigns queries to targets at the least total cost; how many queries a target may take is up to the layer."""

    cost: MatchingCost

    @abstractmethod
    def layer_candidates(self, num_layers: int) -> tuple[int, ...]:
        """Queries that a target may take in each of ``num_layers`` supervised layers.

        Raises:
            ValueError: the configuration does not fit this many layers.
        """

    def match(
        self,
        predictions: Mapping[str, Prediction],
        targets: Targets,
        watched: Mapping[str, Prediction] | None = None,
    ) -> dict[str, Matches]:
        """Several supervisions at once; see ``match_supervisions``."""
        num_layers = sum(prediction.logits.shape[0] for prediction in predictions.values())
        return match_supervisions(predictions, targets, self.layer_candidates(num_layers), self.cost, watched)

    def __call__(self, prediction: Prediction, targets: Targets) -> Matches:
        """Match all layers and images; the last layer of ``prediction`` counts as the last decoder layer.

        Args:
            prediction: logits [L, B, Q, C] and boxes [L, B, Q, 4].
            targets: of the same B images.

        Returns:
            Matches, sorted by layer, image, target, query; of an image with more targets than queries, only Q targets.

        Raises:
            NonFinitePredictionError: a prediction is NaN or infinite.
            ValueError: the configuration names another number of layers.
        """
        return self.match({"prediction": prediction}, targets)["prediction"]


def match_supervisions(
    predictions: Mapping[str, Prediction],
    targets: Targets,
    candidates: Sequence[int],
    cost: MatchingCost,
    watched: Mapping[str, Prediction] | None = None,
) -> dict[str, Matches]:
    """Match all layers and images of several supervisions at once, with one device-to-host copy in all.

    Args:
        predictions: by name, logits [L, B, Q, C] and boxes [L, B, Q, 4]; L and Q may differ between names.
        targets: of the same B images.
        candidates: queries that each target may take, for each layer of each supervision in their order. An image
            with G targets uses max(1, min(k, Q // G)) of them, whatever the other images hold.
        cost: the matching cost.
        watched: further predictions to check for NaN and infinity at no additional synchronisation.

    Returns:
        By name, the matches sorted by layer, image, target, query, on the device of the predictions. If an image
        holds more targets than queries, all its queries are matched and the costliest targets are left out.

    Raises:
        NonFinitePredictionError: a prediction is NaN or infinite; names supervision, layer and image.
    """
    everything = {**predictions, **(watched or {})}
    device = next(iter(everything.values())).logits.device
    costs = {name: cost(prediction, targets) for name, prediction in predictions.items()}
    checks = {name: _checksum(prediction) for name, prediction in everything.items()}
    arrays = _to_host([*checks.values(), *costs.values()])
    for name, checksum in zip(checks, arrays, strict=False):
        _require_finite(name, checksum)
    found = {}
    layers_before = 0
    for name, costs_on_host in zip(costs, arrays[len(checks) :], strict=True):
        layers = len(costs_on_host)
        found[name] = _assign_layers(costs_on_host, targets.counts, candidates[layers_before : layers_before + layers])
        layers_before += layers
    assert layers_before == len(candidates), "candidates must name exactly the layers"
    table = _to_device(np.concatenate(list(found.values()), axis=1), device)
    parts = table.split([columns.shape[1] for columns in found.values()], dim=1)
    return {name: Matches(*part.unbind(0)) for name, part in zip(found, parts, strict=True)}


def _assign_layers(cost: NDArray[np.float32], counts: tuple[int, ...], candidates: Sequence[int]) -> NDArray[np.int64]:
    """(layer, image, query, target) [4, M] of cost [L, B, max G, Q]."""
    num_layers, num_images, max_targets, num_queries = cost.shape
    if num_queries == 0:
        return np.empty((4, 0), dtype=np.int64)
    layer, image = (index.reshape(-1) for index in np.indices((num_layers, num_images)))
    count = np.asarray(counts, dtype=np.int64)[image]
    capacity = np.minimum(np.asarray(candidates, dtype=np.int64)[layer], num_queries // np.maximum(count, 1))
    capacity = np.maximum(capacity, 1)
    query = assign(cost.reshape(num_layers * num_images, max_targets, num_queries), count, capacity)
    first_target = np.concatenate(([0], np.cumsum(counts)))[image]
    target = [first + np.repeat(np.arange(c), k) for first, c, k in zip(first_target, count, capacity, strict=True)]
    slots = count * capacity
    table = np.stack([np.repeat(layer, slots), np.repeat(image, slots), query, np.concatenate(target)])
    return table[:, query >= 0]


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


def _to_host(tensors: list[Tensor]) -> list[NDArray[np.float32]]:
    """Copies of float32 tensors on the host: one transfer, so one synchronisation, for all of them."""
    if tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).numpy() for part, tensor in zip(parts, tensors, strict=True)]


def _to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # from pinned memory the copy is queued, and the host does not wait for it
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
