"""What annotators said nothing about is not background: entries that take no part in the classification loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from losses.pairs import Block
from ops.boxes import cxcywh_to_xyxy
from structures import QueryGroup, Targets

Unlabelled = Literal["background", "ignored"]
"""What the negatives of queries are of which nothing is known: background, as published, or ignored."""

_ABSENT = -1e4
"""A logit whose score, loss and gradient are exactly 0, under a sigmoid as under a softmax, in every floating type."""


def without_unlabelled(block: Block, targets: Targets) -> Tensor:
    """Logits [N, C] of a block in which the unmatched entries of which nothing is known are absent.

    Args:
        block: groups side by side; matched entries always take part.
        targets: of the same images, with ``unlabelled``.
    """
    absent = torch.cat([_unknown(group, targets).flatten(0, 2) for group in block.groups])
    absent[block.rows, block.labels] = False
    return block.logits.masked_fill(absent, _ABSENT)


def _unknown(group: QueryGroup, targets: Targets) -> Tensor:
    """[L, B, Q, C] bool, entries of which nothing is known.

    These are the classes that an image says nothing about, and those of an ignored region in queries that lie mostly in
    it: by more than half of their predicted area. A class-agnostic group knows regions only.
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
    return absent
