"""Boxes: conversions, and the paired overlaps that torchvision.ops lacks.

torchvision's ``box_iou`` and ``generalized_box_iou`` compare every box with every other; a loss needs box m with
target m only, and taking the diagonal of an M×M matrix wastes memory and time that grow with M².
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

AREA_EPSILON = 1e-6
"""Added to the areas that overlaps are divided by, as in the released code of DINO and Align-DETR: it keeps empty
boxes finite, and is felt in relative coordinates (a pixel of a 1000 × 1000 image is 1e-6)."""


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] (centre x, centre y, width, height) to (left, top, right, bottom), in the same unit."""
    centre, size = boxes.chunk(2, dim=-1)
    half = size * 0.5
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] (left, top, right, bottom) to (centre x, centre y, width, height), in the same unit."""
    top_left, bottom_right = boxes.chunk(2, dim=-1)
    return torch.cat(((top_left + bottom_right) * 0.5, bottom_right - top_left), dim=-1)


class Overlap(NamedTuple):
    """How box m lies to other m."""

    intersection: Tensor
    """[...] area."""
    union: Tensor
    """[...] area."""
    hull: Tensor
    """[..., 2] width and height of the smallest box that encloses both."""
    offset: Tensor
    """[..., 2] distance of the centres along either axis."""


def paired_overlap(boxes: Tensor, others: Tensor) -> Overlap:
    """How box m lies to other m, both [..., 4] cxcywh.

    Along one axis, with h half the sum of the two extents, e half their difference and d the distance of the
    centres, the overlap is max(h − max(d, e), 0) and the hull h + max(d, e): small boxes far from the origin lose no
    precision.
    """
    (centre, size), (other_centre, other_size) = boxes.chunk(2, dim=-1), others.chunk(2, dim=-1)
    half, other_half = size * 0.5, other_size * 0.5
    offset = (centre - other_centre).abs()
    reach = torch.maximum(offset, (half - other_half).abs())
    half_sum = half + other_half
    intersection = _area((half_sum - reach).clamp(min=0))
    union = _area(size) + _area(other_size) - intersection
    return Overlap(intersection, union, half_sum + reach, offset)


def _area(size: Tensor) -> Tensor:
    """[..., 2] to [...]. (The gradient of ``prod`` takes four times as many operations.)"""
    width, height = size.unbind(-1)
    return width * height


def paired_iou(boxes: Tensor, others: Tensor, epsilon: float = AREA_EPSILON, overlap: Overlap | None = None) -> Tensor:
    """Intersection over union of box m with other m.

    Args:
        boxes: [..., 4] cxcywh, any unit.
        others: [..., 4], the same unit.
        epsilon: added to the divisors, in square units.
        overlap: :func:`paired_overlap` of the two, where it is known.

    Returns:
        [...] in [0, 1]; 0 where both boxes are empty.
    """
    intersection, union, _, _ = overlap or paired_overlap(boxes, others)
    return intersection / (union + epsilon)


def paired_giou(boxes: Tensor, others: Tensor, epsilon: float = AREA_EPSILON, overlap: Overlap | None = None) -> Tensor:
    """Generalised intersection over union of box m with other m (arXiv 1902.09630, algorithm 1).

    Args:
        boxes: [..., 4] cxcywh, any unit.
        others: [..., 4], the same unit.
        epsilon: added to the divisors, in square units.
        overlap: :func:`paired_overlap` of the two, where it is known.

    Returns:
        [...] in [-1, 1].
    """
    intersection, union, hull, _ = overlap or paired_overlap(boxes, others)
    enclosing = _area(hull)
    return intersection / (union + epsilon) - (enclosing - union) / (enclosing + epsilon)


def paired_diou(boxes: Tensor, others: Tensor, epsilon: float = 1e-7, overlap: Overlap | None = None) -> Tensor:
    """IoU minus the squared distance of the centres over that of the enclosing corners (arXiv 1911.08287, equation 7).

    The value of 1 − torchvision's ``distance_box_iou_loss``, which selects by a mask and so makes the host wait for the
    device.

    Args:
        boxes: [..., 4] cxcywh, any unit.
        others: [..., 4], the same unit.
        epsilon: added to the divisors, in square units; the default is torchvision's.
        overlap: :func:`paired_overlap` of the two, where it is known.

    Returns:
        [...] in [-1, 1].
    """
    intersection, union, hull, offset = overlap or paired_overlap(boxes, others)
    return intersection / (union + epsilon) - offset.square().sum(-1) / (hull.square().sum(-1) + epsilon)


def paired_ciou(boxes: Tensor, others: Tensor, epsilon: float = 1e-7, overlap: Overlap | None = None) -> Tensor:
    """DIoU minus a penalty of different aspect ratios (arXiv 1911.08287, equations 8 to 11).

    The value of 1 − torchvision's ``complete_box_iou_loss``, with a finite gradient for empty boxes too.

    Args:
        boxes: [..., 4] cxcywh, any unit.
        others: [..., 4], the same unit.
        epsilon: added to the divisors, in square units; the default is torchvision's.
        overlap: :func:`paired_overlap` of the two, where it is known.

    Returns:
        [...] at most 1.
    """
    overlap = overlap or paired_overlap(boxes, others)
    angles = [torch.atan2(*size.clamp(min=epsilon).unbind(-1)) for size in (boxes[..., 2:], others[..., 2:])]
    difference = 4 / torch.pi**2 * (angles[1] - angles[0]).square()
    with torch.no_grad():
        balance = difference / (1 - paired_iou(boxes, others, epsilon, overlap) + difference + epsilon)
    return paired_diou(boxes, others, epsilon, overlap) - balance * difference
