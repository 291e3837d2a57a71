"""Losses between the box of a matched query and that of its target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from losses.binary import at_least_float32
from ops.boxes import Overlap, paired_ciou, paired_diou, paired_giou

OverlapLoss = Literal["giou", "diou", "ciou"]
"""1 − GIoU (arXiv 1902.09630), 1 − DIoU or 1 − CIoU (arXiv 1911.08287)."""

_OVERLAPS = {"giou": paired_giou, "diou": paired_diou, "ciou": paired_ciou}


def box_losses(
    boxes: Tensor, target_boxes: Tensor, overlap: OverlapLoss = "giou", paired: Overlap | None = None
) -> tuple[Tensor, Tensor]:
    """L1 and overlap loss of each pair.

    Args:
        boxes: [M, 4] cxcywh, relative to the image.
        target_boxes: [M, 4] cxcywh, relative to the image.
        overlap: which overlap loss.
        paired: how the boxes lie to each other, where it is known.

    Returns:
        L1 summed over the four coordinates [M], and the overlap loss [M], in float32 (float64 for float64 boxes).
    """
    with torch.autocast(boxes.device.type, enabled=False):
        boxes = at_least_float32(boxes)
        target_boxes = target_boxes.to(boxes.dtype)
        distance = (boxes - target_boxes).abs().sum(-1)
        return distance, 1 - _OVERLAPS[overlap](boxes, target_boxes, overlap=paired)
