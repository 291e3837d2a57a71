"""What annotators said nothing about is not background: entries that take no part in the classification loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ops.boxes import cxcywh_to_xyxy
from structures import QueryGroup, Targets

Unlabelled = Literal["background", "ignored"]
"""What the negatives of queries are of which nothing is known: background, as published, or ignored."""

_ABSENT = -1e4
"""A logit whose score, loss and gradient are exactly 0, under a sigmoid as under a softmax, in every floating type."""


def without_unlabelled(group: QueryGroup, targets: Targets, rows: Tensor, labels: Tensor) -> Tensor:
    """Logits [L·B·Q, C] of a group in which the unmatched entries of which nothing is known are absent.

    These are the classes that an image says nothing about, and those of an ignored region in queries that lie mostly in
    it: by more than half of their predicted area. A class-agnostic group knows regions only.

    Args:
        group: the group.
        targets: of the same images, with ``unlabelled``.
        rows: [M] int64, rows that are matched.
        labels: [M] int64, their entries, which always take part.
    """
    logits = group.prediction.logits
    unknown = targets.unlabelled
    assert unknown is not None
    absent = torch.zeros_like(logits, dtype=torch.bool)
    num_classes = unknown.classes.shape[1]
    if not group.class_agnostic:
        absent[..., :num_classes] = unknown.classes[:, None]
    boxes = cxcywh_to_xyxy(group.prediction.boxes.detach().float())
    for image, (labels_of, regions) in enumerate(unknown.split()):
        if not len(regions):
            continue
        own, others = boxes[:, image, :, None], cxcywh_to_xyxy(regions)[None, None]  # [L, Q, 1, 4] and [1, 1, R, 4]
        overlap = (torch.minimum(own[..., 2:], others[..., 2:]) - torch.maximum(own[..., :2], others[..., :2])).clamp(
            min=0
        )
        inside = overlap.prod(-1) > 0.5 * (own[..., 2:] - own[..., :2]).prod(-1)
        if group.class_agnostic:
            absent[:, image] |= inside.any(-1, keepdim=True)
        else:
            classes = torch.arange(num_classes, device=logits.device)
            of_class = (labels_of[:, None] == classes) | (labels_of[:, None] < 0)
            absent[:, image, :, :num_classes] |= (inside[..., None] & of_class).any(-2)
    absent = absent.reshape(-1, logits.shape[-1])
    absent[rows, labels] = False
    return logits.reshape(absent.shape).masked_fill(absent, _ABSENT)
