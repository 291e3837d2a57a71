"""Made-up detector outputs and targets for tests and benchmarks of the criterion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structures import DetectorOutputs, Matches, Prediction, QueryGroup, Targets


def random_boxes(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Boxes inside the image, cxcywh, from a hundredth to half of its extent."""
    size = 0.01 + 0.5 * torch.rand(*shape, 2, generator=generator, dtype=dtype)
    centre = size / 2 + (1 - size) * torch.rand(*shape, 2, generator=generator, dtype=dtype)
    return torch.cat((centre, size), dim=-1)


def make_targets(generator: torch.Generator, counts: tuple[int, ...], num_classes: int) -> Targets:
    total = sum(counts)
    return Targets(
        torch.randint(0, num_classes, (total,), generator=generator), random_boxes(generator, total), tuple(counts)
    )


def make_prediction(
    generator: torch.Generator, *shape: int, num_classes: int, dtype: torch.dtype = torch.float32
) -> Prediction:
    """Leaves that require gradients: logits around −2 and random boxes."""
    logits = 2 * torch.randn(*shape, num_classes, generator=generator, dtype=dtype) - 2
    return Prediction(logits.requires_grad_(), random_boxes(generator, *shape, dtype=dtype).requires_grad_())


def map_predictions(outputs: DetectorOutputs, function: Callable[[Tensor], Tensor]) -> DetectorOutputs:
    """The same outputs with a function of all logits and of all boxes in their place."""
    groups = outputs.groups.items()
    return DetectorOutputs(
        {name: group._replace(prediction=Prediction(*map(function, group.prediction))) for name, group in groups}
    )


def replace_group(outputs: DetectorOutputs, name: str, **fields: object) -> DetectorOutputs:
    """The same outputs with other fields in one of the groups."""
    return DetectorOutputs({**outputs.groups, name: outputs.groups[name]._replace(**fields)})  # type: ignore[arg-type]


def leaves_of(outputs: DetectorOutputs) -> list[Tensor]:
    """Logits and boxes of all groups, in their order."""
    return [part for group in outputs.groups.values() for part in group.prediction]


def make_outputs(
    seed: int,
    counts: tuple[int, ...],
    *,
    num_layers: int = 3,
    num_queries: int = 20,
    num_classes: int = 5,
    encoder_queries: int | None = None,
    denoising: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[DetectorOutputs, Targets]:
    """Outputs of decoder, encoder (0 queries: none) and denoising (2 groups, positive and negative, where it fits)."""
    generator = torch.Generator().manual_seed(seed)
    targets = make_targets(generator, counts, num_classes)
    images = len(counts)
    decoder = make_prediction(generator, num_layers, images, num_queries, num_classes=num_classes, dtype=dtype)
    groups = {}
    if encoder_queries != 0:
        queries = encoder_queries or num_queries
        groups["encoder"] = QueryGroup(
            make_prediction(generator, 1, images, queries, num_classes=num_classes, dtype=dtype)
        )
    groups["decoder"] = QueryGroup(decoder)
    if denoising:
        groups["denoising"] = _make_denoising(generator, targets, num_layers, num_classes, dtype)
    return DetectorOutputs(groups), targets


def _make_denoising(
    generator: torch.Generator, targets: Targets, num_layers: int, num_classes: int, dtype: torch.dtype
) -> QueryGroup:
    groups = [1 + b % 2 for b in range(len(targets.counts))]
    real = [2 * g * count for g, count in zip(groups, targets.counts, strict=True)]
    width = max(real, default=0)
    rows, offset = [], 0
    for image, (g, count) in enumerate(zip(groups, targets.counts, strict=True)):
        rows += [
            (layer, image, group * 2 * count + t, offset + t)
            for layer in range(num_layers) for group in range(g) for t in range(count)
        ]  # fmt: skip
        offset += count
    columns = torch.tensor(rows, dtype=torch.long).reshape(-1, 4).unbind(1)
    valid = torch.arange(width) < torch.tensor(real)[:, None]
    shape = (num_layers, len(targets.counts), width)
    prediction = make_prediction(generator, *shape, num_classes=num_classes, dtype=dtype)
    return QueryGroup(prediction, Matches(*columns), 1 / torch.tensor(groups, dtype=torch.float32), valid)
