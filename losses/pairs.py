"""Matched pairs of queries and targets of all groups, side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losses.binary import at_least_float32
from ops.boxes import Overlap, paired_iou, paired_overlap
from structures import Matches, QueryGroup, Targets

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(NamedTuple):
    """Groups of the same kind of logits, one after the other, as one table of N rows with M matched pairs."""

    groups: list[QueryGroup]
    """With their matches."""
    logits: Tensor
    """[N, C]."""
    rows: Tensor
    """[M] index of each pair's query into the N rows."""
    labels: Tensor
    """[M] logit that stands for each pair's target."""
    images: Tensor
    """[M] image of a layer of a group: a number of its own for each."""

    @property
    def class_agnostic(self) -> bool:
        """Whether its groups are about any object."""
        return self.groups[0].class_agnostic

    def split(self, losses: Tensor) -> list[Tensor]:
        """Parts [L, B, Q] of losses [N] that belong to each group."""
        shapes = [group.prediction.logits.shape[:-1] for group in self.groups]
        parts = losses.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class Pairs(NamedTuple):
    """M matched pairs of all groups, in the order of the groups: what concerns pairs is computed once for all."""

    blocks: list[Block]
    """The groups, side by side as far as their logits allow."""
    layer: Tensor
    """[M] index into the layers of all groups together."""
    target: Tensor
    """[M] index into the targets of the batch."""
    score: Tensor
    """[M] of the target's class, detached."""
    iou: Tensor
    """[M] of the predicted box with its target, detached."""
    boxes: Tensor
    """[M, 4] predicted."""
    target_boxes: Tensor
    """[M, 4] of the target."""
    overlap: Overlap
    """How the two lie to each other, of [M] pairs."""
    scale: Tensor | None
    """[M] factor of each pair's losses; None for 1."""

    def split(self, values: Tensor) -> list[Tensor]:
        """Parts of [M] values that belong to each block."""
        return list(values.split([len(block.rows) for block in self.blocks]))


def collect_pairs(groups: Sequence[QueryGroup], targets: Targets, score: Score) -> Pairs:
    """The matched pairs of all groups.

    Args:
        groups: with their matches.
        targets: of the same images.
        score: of the target's class, from logits [N, C], rows [M] and labels [M]: [M], detached.
    """
    blocks, layers, boxes, scores, scales = [], [], [], [], []
    layers_before = 0
    for _, alike in itertools.groupby(
        groups, key=lambda group: (group.prediction.logits.shape[-1], group.class_agnostic)
    ):
        members = list(alike)
        rows, images, rows_before = [], [], 0
        for group in members:
            matches = matches_of(group)
            num_layers, num_images, num_queries, _ = group.prediction.logits.shape
            layers.append(matches.layer + layers_before)
            images.append(torch.add(matches.image, layers[-1], alpha=num_images))
            first = rows_before - layers_before * num_images * num_queries
            rows.append(torch.add(matches.query, images[-1], alpha=num_queries) + first)
            scales.append(None if group.image_scale is None else group.image_scale[matches.image])
            rows_before += num_layers * num_images * num_queries
            layers_before += num_layers
        row, logits = (
            _join(rows),
            _join([g.prediction.logits.reshape(-1, g.prediction.logits.shape[-1]) for g in members]),
        )
        label = targets.labels[_join([matches_of(group).target for group in members])]
        label = torch.zeros_like(label) if members[0].class_agnostic else label
        blocks.append(Block(members, logits, row, label, _join(images)))
        boxes.append(at_least_float32(_join([group.prediction.boxes.reshape(-1, 4) for group in members])[row]))
        scores.append(score(logits, row, label))
    target = torch.cat([matches_of(group).target for group in groups])
    matched = _join(boxes)
    target_boxes = targets.boxes[target].to(matched.dtype)
    overlap = paired_overlap(matched, target_boxes)
    scale = None
    if any(part is not None for part in scales):
        like = zip(scales, layers, strict=True)
        scale = torch.cat([matched.new_ones(len(layer)) if part is None else part for part, layer in like])
    return Pairs(
        blocks=blocks,
        layer=torch.cat(layers),
        target=target,
        score=_join(scores),
        iou=paired_iou(matched, target_boxes, overlap=overlap).detach(),
        boxes=matched,
        target_boxes=target_boxes,
        overlap=overlap,
        scale=scale,
    )


def matches_of(group: QueryGroup) -> Matches:
    """The matches of a group that has them."""
    assert group.matches is not None
    return group.matches


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
