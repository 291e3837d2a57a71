"""The criterion again, slow and obvious: layer by layer and image by image, straight from the equations.

Tests hold the real one to it, and the benchmark measures what the real one gains over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from structures import DetectorOutputs, Prediction, Targets

EPSILON = 1e-6
Pairs = list[tuple[int, int]]
"""(query, target within the image), sorted by target, then query."""


def bce(x: Tensor, t: Tensor | float) -> Tensor:
    return -t * F.logsigmoid(x) - (1 - t) * F.logsigmoid(-x)


def focal(x: Tensor, matched: Tensor, u: Tensor, w: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    s = x.sigmoid()
    return torch.where(matched, alpha * (w - s).abs() ** gamma * bce(x, w), (1 - alpha) * s**gamma * bce(x, 0.0))


def ia_bce(
    x: Tensor,
    matched: Tensor,
    u: Tensor,
    w: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    matched_focal: str = "none",
    matched_weight: float = 1.0,
    negative_scale: float = 1.0,
    negative_detached: bool = False,
    smallest_target: float = 0.01,
    smallest_iou: float = 0.0,
    mean_over_queries: int | None = None,
) -> Tensor:
    s = x.sigmoid()
    t = w * (s.detach() ** alpha * u.clamp(min=smallest_iou) ** (1 - alpha)).clamp(min=smallest_target)
    if matched_focal == "none":
        own = bce(x, t)
    elif matched_focal == "distance":
        own = (t - s).abs() ** gamma * bce(x, t)
    elif matched_focal == "soft":
        own = (t * (1 - s) + (1 - t) * s) ** gamma * bce(x, t)
    else:
        factor = (t - s) ** gamma if matched_focal == "signed_entries" else (t - s).abs() ** gamma
        own = factor * bce(x, 1.0) + (1 - t) * s**gamma * bce(x, 0.0)
    modulation = s.detach() ** gamma if negative_detached else s**gamma
    return torch.where(matched, matched_weight * own, negative_scale * modulation * bce(x, 0.0))


def align(x: Tensor, matched: Tensor, u: Tensor, w: Tensor, matched_focal: str = "distance", **fields: Any) -> Tensor:
    return ia_bce(x, matched, u, w, matched_focal=matched_focal, **fields)


def qfl(x: Tensor, matched: Tensor, u: Tensor, w: Tensor, beta: float = 2.0) -> Tensor:
    s = x.sigmoid()
    return torch.where(matched, (w * u - s).abs() ** beta * bce(x, w * u), s**beta * bce(x, 0.0))


def vfl(x: Tensor, matched: Tensor, u: Tensor, w: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    return torch.where(matched, w * u * bce(x, w * u), alpha * x.sigmoid() ** gamma * bce(x, 0.0))


def position_supervised(
    x: Tensor, matched: Tensor, u: Tensor, w: Tensor, alpha: float = 0.25, beta: float = 2.0, gamma: float = 2.0
) -> Tensor:
    s = x.sigmoid()
    f = u**beta
    best = f[matched].max() if matched.any() else f.new_ones(())
    t = w * f * max(1.0, 1 / (best.item() + 1e-8))
    return torch.where(matched, alpha * (t - s).abs() ** gamma * bce(x, t), (1 - alpha) * s**gamma * bce(x, 0.0))


def matchability_aware(x: Tensor, matched: Tensor, u: Tensor, w: Tensor, gamma: float = 1.5) -> Tensor:
    return torch.where(matched, bce(x, w * u**gamma), x.sigmoid().detach() ** gamma * bce(x, 0.0))


def cross_entropy(x: Tensor, matched: Tensor, u: Tensor, w: Tensor, no_object_weight: float = 0.1) -> Tensor:
    target = torch.where(matched.any(-1), matched.double().argmax(-1), x.shape[-1] - 1)
    chosen = F.one_hot(target, x.shape[-1]).bool()
    weight = torch.where(matched, w, no_object_weight)
    return torch.where(chosen, -weight * x.log_softmax(-1), 0.0)


LOSSES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (focal, ia_bce, align, qfl, vfl, position_supervised, matchability_aware, cross_entropy)
}
"""By configuration name: loss of every entry, [Q, C], of logits x of one image, given which entries are matched and
the IoU u and the weight w of those."""


def quality(name: str, s: Tensor, u: Tensor, alpha: float = 0.25) -> Tensor:
    return (s**alpha * u ** (1 - alpha)).clamp(min=0.01) if name in ("ia_bce", "align") else u


def class_normaliser(name: str, num_targets: float, logits: Tensor) -> float:
    """For logits [B, Q, C]: the targets; for DETR's cross entropy the sum of the weights of all queries."""
    if name != "cross_entropy":
        return num_targets
    return num_targets + 0.1 * (logits.shape[0] * logits.shape[1] - num_targets)


def to_corners(boxes: Tensor) -> Tensor:
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def all_overlaps(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU [N, M] of every box with every other, both cxcywh."""
    a, b = to_corners(boxes)[:, None], to_corners(others)[None]
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    iou = overlap / (union + EPSILON)
    return iou, iou - (hull - union) / (hull + EPSILON)


def cost_matrix(logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor) -> Tensor:
    """[Q, G]: 2·focal + 5·L1 − 2·GIoU."""
    x = logits[:, labels]
    s = x.sigmoid()
    classification = 0.25 * (1 - s) ** 2 * bce(x, 1.0) - 0.75 * s**2 * bce(x, 0.0)
    distance = (boxes[:, None] - target_boxes[None]).abs().sum(-1)
    return 2 * classification + 5 * distance - 2 * all_overlaps(boxes, target_boxes)[1]


def match(cost: Tensor, k: int) -> Pairs:
    """The pairs of least total cost in which every target has k queries."""
    num_queries, num_targets = cost.shape
    if num_targets == 0:
        return []
    k = max(1, min(k, num_queries // num_targets))
    query, slot = linear_sum_assignment(cost.detach().cpu().repeat(1, k).numpy())
    return sorted(zip(query.tolist(), (slot % num_targets).tolist(), strict=True), key=lambda pair: pair[::-1])


class Layer(NamedTuple):
    """Summed losses of one layer of one image."""

    classification: Tensor
    bbox: Tensor
    giou: Tensor


def layer_losses(
    loss: str, logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, pairs: Pairs, tau: float | None
) -> Layer:
    query = torch.tensor([q for q, _ in pairs], dtype=torch.long)
    target = torch.tensor([g for _, g in pairs], dtype=torch.long)
    iou, giou = (torch.diag(overlap) for overlap in all_overlaps(boxes[query], target_boxes[target]))
    iou = iou.detach()
    score = logits.detach()[query, labels[target]].sigmoid()
    weight = torch.ones_like(iou)
    if tau is not None:
        ranks = [0] * len(pairs)
        best = quality(loss, score, iou).tolist()
        candidates: dict[int, list[int]] = {}
        for m, (_, g) in enumerate(pairs):
            candidates.setdefault(g, []).append(m)
        for members in candidates.values():
            for rank, m in enumerate(sorted(members, key=lambda m: -best[m])):
                ranks[m] = rank
        weight = torch.exp(-torch.tensor(ranks, dtype=iou.dtype) / tau)
    matched = torch.zeros(logits.shape, dtype=torch.bool)
    u, w = torch.zeros_like(logits), torch.zeros_like(logits)
    matched[query, labels[target]] = True
    u[query, labels[target]] = iou
    w[query, labels[target]] = weight
    classification = LOSSES[loss](logits, matched, u.detach(), w).sum()
    distance = (boxes[query] - target_boxes[target]).abs().sum(-1)
    return Layer(classification, (weight * distance).sum(), (weight * (1 - giou)).sum())


def criterion(
    outputs: DetectorOutputs,
    targets: Targets,
    loss: str,
    candidates: list[int],
    tau: float | None,
    num_targets: float | None = None,
    pairs: dict[tuple[str, int], Pairs] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total and terms; ``candidates`` lists the encoder output first. ``pairs`` by layer name and image, if given."""
    layers: dict[str, Prediction] = {}
    for group, (prediction, matches, *_) in outputs.groups.items():
        for i, (logits, boxes) in enumerate(zip(*prediction, strict=True)):
            if matches is None:
                layers["encoder" if group == "encoder" else f"{group}.{i}"] = Prediction(logits, boxes)
    normaliser = max(1.0, len(targets.labels) if num_targets is None else num_targets)
    terms: dict[str, Tensor] = {}
    for (name, layer), k in zip(layers.items(), candidates, strict=True):
        images = []
        for b, (labels, target_boxes) in enumerate(targets.split()):
            logits, boxes = layer.logits[b], layer.boxes[b]
            target_boxes = target_boxes.to(boxes.dtype)
            found = pairs[name, b] if pairs else match(cost_matrix(logits, boxes, labels, target_boxes), k)
            images.append(layer_losses(loss, logits, boxes, labels, target_boxes, found, tau))
        for term, values in zip(("class", "bbox", "giou"), zip(*images, strict=True), strict=True):
            divisor = class_normaliser(loss, normaliser, layer.logits) if term == "class" else normaliser
            terms[f"{name}/{term}"] = torch.stack(values).sum() / divisor
    if "denoising" in outputs.groups:
        terms |= _denoising(outputs, targets, loss, normaliser)
    factor = {"class": 1.0, "bbox": 5.0, "giou": 2.0}
    return torch.stack([factor[name.split("/")[1]] * term for name, term in terms.items()]).sum(), terms


def _denoising(outputs: DetectorOutputs, targets: Targets, loss: str, normaliser: float) -> dict[str, Tensor]:
    denoising = outputs.groups["denoising"]
    assert denoising.matches is not None
    assert denoising.valid is not None
    assert denoising.image_scale is not None
    rows = list(zip(*(index.tolist() for index in denoising.matches), strict=True))
    offsets = [sum(targets.counts[:b]) for b in range(len(targets.counts))]
    terms: dict[str, Tensor] = {}
    for i, (logits, boxes) in enumerate(zip(*denoising.prediction, strict=True)):
        images = []
        for b, (labels, target_boxes) in enumerate(targets.split()):
            real = int(denoising.valid[b].sum())  # padding is at the end
            pairs = [(q, g - offsets[b]) for layer, image, q, g in rows if (layer, image) == (i, b)]
            losses = layer_losses(
                loss, logits[b, :real], boxes[b, :real], labels, target_boxes.to(boxes.dtype), pairs, None
            )
            images.append(Layer(*(value * denoising.image_scale[b] for value in losses)))
        for term, values in zip(("class", "bbox", "giou"), zip(*images, strict=True), strict=True):
            divisor = class_normaliser(loss, normaliser, logits) if term == "class" else normaliser
            terms[f"denoising.{i}/{term}"] = torch.stack(values).sum() / divisor
    return terms
