"""Boxes: conversions, and the paired overlaps that torchvision.ops lacks.

torchvision's ``box_iou`` and ``generalized_box_iou`` compare every box with every other; a loss needs box m with
target m only, and taking the diagonal of an M×M matrix wastes memory and time that grow with M².
"""

from __future__ import annotations

import torch
from torch import Tensor

AREA_EPSILON = 1e-6
"""Added to the areas that overlaps are divided by, as in the released code of DINO and Align-DETR: it keeps empty
boxes finite, and is felt in relative coordinates (a pixel of a 1000 × 1000 image is 1e-6)."""


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] (centre x, centre y, width, height) to (left, top, right, bottom), in the same unit."""
    centre, half = boxes[..., :2], boxes[..., 2:] * 0.5
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] (left, top, right, bottom) to (centre x, centre y, width, height), in the same unit."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((top_left + bottom_right) * 0.5, bottom_right - top_left), dim=-1)


def _paired_overlap(boxes_xyxy: Tensor, others_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union area of box m with other m: two [...] tensors."""
    size = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0)
    other_size = (others_xyxy[..., 2:] - others_xyxy[..., :2]).clamp(min=0)
    top_left = torch.maximum(boxes_xyxy[..., :2], others_xyxy[..., :2])
    bottom_right = torch.minimum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    return intersection, size.prod(dim=-1) + other_size.prod(dim=-1) - intersection


def paired_iou(boxes_xyxy: Tensor, others_xyxy: Tensor, epsilon: float = AREA_EPSILON) -> Tensor:
    """Intersection over union of box m with other m.

    Args:
        boxes_xyxy: [..., 4] (left, top, right, bottom), any unit.
        others_xyxy: [..., 4], the same unit.
        epsilon: added to the divisors, in square units.

    Returns:
        [...] in [0, 1]; 0 where both boxes are empty.
    """
    intersection, union = _paired_overlap(boxes_xyxy, others_xyxy)
    return intersection / (union + epsilon)


def paired_giou(boxes_xyxy: Tensor, others_xyxy: Tensor, epsilon: float = AREA_EPSILON) -> Tensor:
    """Generalised intersection over union of box m with other m (arXiv 1902.09630, algorithm 1).

    Args:
        boxes_xyxy: [..., 4] (left, top, right, bottom), any unit.
        others_xyxy: [..., 4], the same unit.
        epsilon: added to the divisors, in square units.

    Returns:
        [...] in [-1, 1].
    """
    intersection, union = _paired_overlap(boxes_xyxy, others_xyxy)
    top_left = torch.minimum(boxes_xyxy[..., :2], others_xyxy[..., :2])
    bottom_right = torch.maximum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])
    enclosing = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    return intersection / (union + epsilon) - (enclosing - union) / (enclosing + epsilon)


def paired_diou(boxes_xyxy: Tensor, others_xyxy: Tensor, epsilon: float = 1e-7) -> Tensor:
    """IoU minus the squared distance of the centres over that of the enclosing corners (arXiv 1911.08287, equation 7).

    The value of 1 − torchvision's ``distance_box_iou_loss``, which selects by a mask and so makes the host wait for the
    device.

    Args:
        boxes_xyxy: [..., 4] (left, top, right, bottom), any unit.
        others_xyxy: [..., 4], the same unit.
        epsilon: added to the divisors, in square units; the default is torchvision's.

    Returns:
        [...] in [-1, 1].
    """
    top_left = torch.minimum(boxes_xyxy[..., :2], others_xyxy[..., :2])
    bottom_right = torch.maximum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])
    diagonal = (bottom_right - top_left).square().sum(-1)
    offset = (boxes_xyxy[..., :2] + boxes_xyxy[..., 2:] - others_xyxy[..., :2] - others_xyxy[..., 2:]) * 0.5
    return paired_iou(boxes_xyxy, others_xyxy, epsilon) - offset.square().sum(-1) / (diagonal + epsilon)


def paired_ciou(boxes_xyxy: Tensor, others_xyxy: Tensor, epsilon: float = 1e-7) -> Tensor:
    """DIoU minus a penalty of different aspect ratios (arXiv 1911.08287, equations 8 to 11).

    The value of 1 − torchvision's ``complete_box_iou_loss``, with a finite gradient for empty boxes too.

    Args:
        boxes_xyxy: [..., 4] (left, top, right, bottom), any unit.
        others_xyxy: [..., 4], the same unit.
        epsilon: added to the divisors, in square units; the default is torchvision's.

    Returns:
        [...] at most 1.
    """
    angles = []
    for corners in (boxes_xyxy, others_xyxy):
        width, height = (corners[..., 2:] - corners[..., :2]).clamp(min=epsilon).unbind(-1)
        angles.append(torch.atan2(width, height))
    difference = 4 / torch.pi**2 * (angles[1] - angles[0]).square()
    with torch.no_grad():
        balance = difference / (1 - paired_iou(boxes_xyxy, others_xyxy, epsilon) + difference + epsilon)
    return paired_diou(boxes_xyxy, others_xyxy, epsilon) - balance * difference
