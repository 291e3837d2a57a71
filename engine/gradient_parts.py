"""What the gradient of an optimizer step is made of: classes at matched and at other entries, boxes, denoising."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.step import OptimizerStep, autocast
from structures import Batch, BatchSize, DetectorOutputs, Prediction, QueryGroup, Targets

Match = Callable[[Mapping[str, QueryGroup], Targets], tuple[Mapping[str, QueryGroup], Any]]
"""All groups of queries with their matches, as ``Criterion.match`` gives them first."""

_SUMS = {
    "matched": (1, 0, 0, 0, 0),
    "unmatched": (0, 1, 0, 0, 0),
    "boxes": (0, 0, 1, 0, 0),
    "denoising": (0, 0, 0, 1, 1),
    "classes_in_all": (1, 1, 0, 1, 0),
    "boxes_in_all": (0, 0, 1, 0, 1),
    "total": (1, 1, 1, 1, 1),
}
"""Named sums of five vectors: classes at matched entries, at other entries, boxes; classes, boxes of denoising."""
PARTS = ("matched", "unmatched", "boxes", "denoising")
"""The four that add up to the whole."""


class GradientParts(NamedTuple):
    """Parts of a gradient with respect to all trained parameters, before clipping."""

    norms: dict[str, float]
    """Euclidean norm of each of ``PARTS``, of ``classes_in_all`` and ``boxes_in_all`` (denoising included), and of the
    ``total``."""
    shares: dict[str, float]
    """⟨part, total⟩ / ‖total‖² of each: those of ``PARTS`` add up to 1; negative where a part pulls the other way."""


def gradient_parts(step: OptimizerStep, match: Match, batches: Sequence[Batch], size: BatchSize) -> GradientParts:
    """Take a step's gradient apart, and leave gradients, weights and buffers as they are.

    The loss is differentiated by logits and boxes first; what belongs to each part is then sent back alone.

    Args:
        step: of one process; random generators are to be seeded as for the step.
        match: says which entries are matched. Groups whose matches were known beforehand are denoising.
        batches: all micro-batches of the step.
        size: of the global batch.
    """
    model, parameters = step.module, step.parameters
    buffers = [buffer.clone() for buffer in model.buffers()]
    vectors = torch.zeros(len(_SUMS["total"]), sum(p.numel() for p in parameters), device=step.device)
    for batch in batches:
        batch = batch.to(step.device)
        with autocast(step.device, step.precision):
            groups = model(batch.images, batch.targets).groups
        outputs = [tensor for group in groups.values() for tensor in group.prediction]
        slopes = _slopes(step, match, groups, batch.targets, size)
        for vector, part in zip(vectors, zip(*slopes, strict=True), strict=True):
            sent = [tensor for pair in part for tensor in pair]
            if any(tensor.any() for tensor in sent):
                found = torch.autograd.grad(outputs, parameters, sent, retain_graph=True, allow_unused=True)
                vector += _flat(found, parameters)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    exact = vectors.double()
    products = (exact @ exact.T / step.scaler.get_scale() ** 2).cpu()
    sums = torch.tensor(list(_SUMS.values()), dtype=torch.float64)
    norms = (sums @ products * sums).sum(-1).clamp(min=0).sqrt()
    shares = sums @ products.sum(-1) / products.sum().clamp(min=1e-300)
    return GradientParts(dict(zip(_SUMS, norms.tolist(), strict=True)), dict(zip(_SUMS, shares.tolist(), strict=True)))


def _slopes(
    step: OptimizerStep, match: Match, groups: Mapping[str, QueryGroup], targets: Targets, size: BatchSize
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each group the loss's gradient by its logits and boxes, in five parts that are zero elsewhere."""
    leaves = {
        name: group._replace(prediction=Prediction(*(tensor.detach().requires_grad_() for tensor in group.prediction)))
        for name, group in groups.items()
    }
    flat = [tensor for group in leaves.values() for tensor in group.prediction]
    total = step.scaler.scale(step.criterion(DetectorOutputs(leaves), targets, *size).total)
    found, matched = iter(torch.autograd.grad(total, flat, allow_unused=True)), match(leaves, targets)[0]
    for name, group in leaves.items():
        logits, boxes = (_or_zeros(next(found), tensor) for tensor in group.prediction)
        none, nowhere = torch.zeros_like(logits), torch.zeros_like(boxes)
        empty, of_boxes = (none, nowhere), (none, boxes)
        if group.matches is not None:
            yield [empty, empty, empty, (logits, nowhere), of_boxes]
            continue
        matches, special = matched[name].matches, torch.zeros_like(logits, dtype=torch.bool)
        assert matches is not None
        label = targets.labels[matches.target] * (not group.class_agnostic)
        special[matches.layer, matches.image, matches.query, label] = True
        yield [(logits * special, nowhere), (logits * ~special, nowhere), of_boxes, empty, empty]


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([_or_zeros(g, p).detach().flatten() for g, p in zip(gradients, parameters, strict=True)])


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def cosines(steps: Sequence[OptimizerStep]) -> Tensor:
    """Cosines [n, n] between the gradients that the parameters of equal models hold; NaN where one holds none."""
    flat = [_flat([p.grad for p in step.parameters], step.parameters).double() for step in steps]
    unit = torch.stack([(vector / vector.norm()).cpu() for vector in flat])
    return unit @ unit.T
