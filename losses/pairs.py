"""Matched pairs of queries and targets of all groups, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losses.binary import at_least_float32
from ops.boxes import cxcywh_to_xyxy, paired_iou
from structures import Matches, QueryGroup, Targets

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


class Pairs(NamedTuple):
    """M matched pairs of all groups, in the order of the groups: what concerns pairs is computed once for all."""

    rows: list[Tensor]
    """For each group, indices of its pairs into its [L·B·Q] rows."""
    labels: list[Tensor]
    """For each group, the logit that stands for the target of each of its pairs."""
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
    scale: Tensor | None
    """[M] factor of each pair's losses; None for 1."""

    def split(self, values: Tensor) -> list[Tensor]:
        """Parts of [M] values that belong to each group."""
        return list(values.split([len(rows) for rows in self.rows]))


def collect_pairs(groups: Sequence[QueryGroup], targets: Targets, score: Score) -> Pairs:
    """The matched pairs of all groups.

    Args:
        groups: with their matches.
        targets: of the same images.
        score: of the target's class, from logits [N, C], rows [M] and labels [M]: [M], detached.
    """
    layers, rows, labels, boxes, scores, scales = [], [], [], [], [], []
    layers_before = 0
    for group in groups:
        prediction, matches = group.prediction, matches_of(group)
        num_layers, num_images, num_queries, num_logits = prediction.logits.shape
        row = (matches.layer * num_images + matches.image) * num_queries + matches.query
        label = targets.labels[matches.target]
        label = torch.zeros_like(label) if group.class_agnostic else label
        layers.append(matches.layer + layers_before)
        rows.append(row)
        labels.append(label)
        boxes.append(at_least_float32(prediction.boxes.reshape(-1, 4)[row]))
        scores.append(score(prediction.logits.reshape(-1, num_logits), row, label))
        scales.append(None if group.image_scale is None else group.image_scale[matches.image])
        layers_before += num_layers
    target = torch.cat([matches_of(group).target for group in groups])
    matched = torch.cat(boxes)
    target_boxes = targets.boxes[target].to(matched.dtype)
    scale = None
    if any(part is not None for part in scales):
        ones = [matched.new_ones(len(row)) if part is None else part for part, row in zip(scales, rows, strict=True)]
        scale = torch.cat(ones)
    return Pairs(
        rows=rows,
        labels=labels,
        layer=torch.cat(layers),
        target=target,
        score=torch.cat(scores),
        iou=paired_iou(cxcywh_to_xyxy(matched.detach()), cxcywh_to_xyxy(target_boxes)),
        boxes=matched,
        target_boxes=target_boxes,
        scale=scale,
    )


def matches_of(group: QueryGroup) -> Matches:
    """The matches of a group that has them."""
    assert group.matches is not None
    return group.matches
