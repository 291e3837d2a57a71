"""Index of matching costs: what it costs to match each query with each target of its image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ops.boxes import AREA_EPSILON
from structures import Prediction, Targets

_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_DEFAULT_CHUNK_ELEMENTS = 1 << 24
"""Costs computed at a time: bounds the temporaries. Small on a CPU, where they then stay in its cache; large
elsewhere, where launches would dominate."""
_SATURATION = 1e-8
"""Added inside the logarithms of the modulated cost, as in the released code of Stable-DINO."""


@dataclass(frozen=True, kw_only=True)
class FocalCost:
    """``class·focal + bbox·L1 − giou·GIoU`` (arXiv 2010.04159; weights of DINO, arXiv 2203.03605).

    The class term is the focal loss of the entry if it were matched minus that if it were not,
    α(1−s)^γ·BCE(s, 1) − (1−α)s^γ·BCE(s, 0), computed from logits, so that it is exact where s rounds to 0 or 1.
    """

    name: Literal["focal"] = "focal"
    classification: float = 2.0
    """Weight of the classification term."""
    bbox: float = 5.0
    """Weight of the L1 distance between boxes (cxcywh, relative to the image)."""
    giou: float = 2.0
    """Weight of the generalised IoU."""
    alpha: float = 0.25
    """Focal balance of the classification term, in [0, 1]."""
    gamma: float = 2.0
    """Focal exponent of the classification term, at least 0."""

    def __post_init__(self) -> None:
        _check_weights(self)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"matching cost: alpha must be in [0, 1], not {self.alpha}")
        if self.gamma < 0:
            raise ValueError("matching cost: gamma must not be negative")

    def __call__(self, prediction: Prediction, targets: Targets) -> Tensor:
        """Cost of every query with every target; see :func:`pairwise_cost`."""
        return pairwise_cost(self, prediction, targets)

    def _focal(self, logits: Tensor) -> Tensor:
        """The class term of each entry, α(1−s)^γ·BCE(s, 1) − (1−α)s^γ·BCE(s, 0); logits of any shape."""
        score = logits.sigmoid()
        negative = F.softplus(logits)  # BCE(s, 0); BCE(s, 1) is negative − logit
        positive = negative - logits
        if self.gamma == 2:
            positive.mul_((1 - score).square_())
            negative.mul_(score.square_())
        else:
            positive.mul_((1 - score).pow_(self.gamma))
            negative.mul_(score.pow_(self.gamma))
        return positive.mul_(self.alpha).sub_(negative, alpha=1 - self.alpha)

    def class_term(self, logits: Tensor, labels: Tensor, giou: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Class term [l, B, G, Q] of logits [l, B, Q, C] and labels [B, G]; ``giou`` [l, B, G, Q] is not needed."""
        if labels.shape[1] > logits.shape[-1]:  # fewer classes than targets: compute each entry once, then pick
            return _entries(self._focal(logits.float()), labels)
        return self._focal(_entries(logits, labels).float())


@dataclass(frozen=True, kw_only=True)
class PositionModulatedCost(FocalCost):
    """Focal cost with the score s·v^β in the place of s (Stable-DINO, arXiv 2304.04742, equation 6).

    v is (GIoU + 1)/2, scaled so that the best pair of the image has 1.
    """

    name: Literal["position_modulated"] = "position_modulated"  # type: ignore[assignment]
    beta: float = 0.5
    """Exponent of the position in the score, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise ValueError("matching cost: beta must not be negative")

    def class_term(self, logits: Tensor, labels: Tensor, giou: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Class term [l, B, G, Q] of logits [l, B, Q, C], labels [B, G] and the pairs' GIoU [l, B, G, Q]."""
        position = (giou + 1) * 0.5
        best = [
            image[:, :count].flatten(1).amax(-1) if count else image.new_ones(len(image))
            for image, count in zip(position.unbind(1), counts, strict=True)
        ]
        position = (position / torch.stack(best, dim=1).clamp(min=_SATURATION)[:, :, None, None]).clamp(max=1)
        score = _entries(logits, labels).float().sigmoid() * position.pow(self.beta)
        positive = -(score + _SATURATION).log() * (1 - score).pow(self.gamma)
        negative = -(1 - score + _SATURATION).log() * score.pow(self.gamma)
        return positive.mul_(self.alpha).sub_(negative, alpha=1 - self.alpha)


@dataclass(frozen=True, kw_only=True)
class SoftmaxCost:
    """``−class·p + bbox·L1 − giou·GIoU``, p the softmax of the target's class (DETR, arXiv 2005.12872, section 3.1)."""

    name: Literal["softmax"] = "softmax"
    classification: float = 1.0
    """Weight of the classification term."""
    bbox: float = 5.0
    """Weight of the L1 distance between boxes (cxcywh, relative to the image)."""
    giou: float = 2.0
    """Weight of the generalised IoU."""

    def __post_init__(self) -> None:
        _check_weights(self)

    def __call__(self, prediction: Prediction, targets: Targets) -> Tensor:
        """Cost of every query with every target; see :func:`pairwise_cost`."""
        return pairwise_cost(self, prediction, targets)

    def class_term(self, logits: Tensor, labels: Tensor, giou: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Class term [l, B, G, Q] of logits [l, B, Q, C] and labels [B, G]; ``giou`` is not needed."""
        return -_entries(logits.float().softmax(-1), labels)


Cost = FocalCost | PositionModulatedCost | SoftmaxCost
"""Picked by ``name`` in a configuration."""


def _check_weights(cost: Cost) -> None:
    if min(cost.classification, cost.bbox, cost.giou) < 0 or not cost.classification + cost.bbox + cost.giou > 0:
        raise ValueError("matching cost: classification, bbox and giou must not be negative, and not all zero")


@torch.no_grad()
def pairwise_cost(cost: Cost, prediction: Prediction, targets: Targets) -> Tensor:
    """Cost of every query of every layer with every target of its image, in float32 whatever the inputs.

    Args:
        cost: says what the class entry of a pair costs, and the weights.
        prediction: logits [L, B, Q, C] and boxes [L, B, Q, 4].
        targets: of the same B images.

    Returns:
        [L, B, max G, Q] on the device of the prediction, targets before queries so that the row of a target is
        contiguous; rows beyond an image's own number of targets are meaningless. Nothing here synchronises.
    """
    logits, boxes = prediction
    num_layers, num_images, num_queries, _ = logits.shape
    with torch.autocast(logits.device.type, enabled=False):
        counts = np.array(targets.counts)[:, None]
        max_targets = int(counts.max(initial=0))
        result = logits.new_empty((num_layers, num_images, max_targets, num_queries), dtype=torch.float32)
        if result.numel() == 0:
            return result
        # Row by row the targets of each image; those of the images after it beyond its own number.
        rows = np.minimum(np.cumsum(counts)[:, None] - counts + np.arange(max_targets), counts.sum() - 1)
        index = to_device(rows, logits.device)
        labels, target_boxes = targets.labels[index], targets.boxes.float()[index]
        elements = _CHUNK_ELEMENTS.get(logits.device.type, _DEFAULT_CHUNK_ELEMENTS)
        step = max(1, elements // (num_images * max_targets * num_queries))
        for first in range(0, num_layers, step):
            chunk = slice(first, first + step)
            distance, giou = _box_terms(boxes[chunk].float(), target_boxes)
            entries = cost.class_term(logits[chunk], labels, giou, targets.counts)
            result[chunk] = (
                entries.mul_(cost.classification).add_(distance, alpha=cost.bbox).sub_(giou, alpha=cost.giou)
            )
        return result


def to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy of whole numbers on a device, for which the host does not wait."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # only from pinned memory is the copy queued
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _entries(values: Tensor, labels: Tensor) -> Tensor:
    """[l, B, G, Q]: of values [l, B, Q, C] those of the class of each target, labels [B, G]."""
    image = torch.arange(len(labels), device=values.device)[:, None]
    return values.transpose(-1, -2)[:, image, labels]


def _box_terms(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and GIoU, each [l, B, G, Q], of boxes [l, B, Q, 4] with target_boxes [B, G, 4], all cxcywh.

    Along one axis let d be the distance of the two centres, h half the sum and e half the difference of the two
    extents, and m = max(d, e). The overlap is then max(h − m, 0) and the enclosing extent h + m: half the work of
    corners, and no loss of precision for small boxes far from the origin.
    """
    planes = boxes.movedim(-1, 0).unsqueeze(-2).contiguous()  # [4, l, B, 1, Q]: queries contiguous
    target_planes = target_boxes.movedim(-1, 0).unsqueeze(-1)  # [4, B, G, 1]
    distances, overlaps, enclosings = [], [], []
    for axis, (half, target_half) in enumerate(zip(planes[2:] * 0.5, target_planes[2:] * 0.5, strict=True)):
        offset = (planes[axis] - target_planes[axis]).abs_()
        difference = (half - target_half).abs_()
        distances.append(offset.add(difference, alpha=2))
        # Into the buffers that are read here for the last time: these tensors are the largest of the criterion.
        reach = torch.maximum(offset, difference, out=offset)
        half_sum = torch.add(half, target_half, out=difference)
        overlaps.append((half_sum - reach).clamp_(min=0))
        enclosings.append(half_sum.add_(reach))
    intersection = overlaps[0].mul_(overlaps[1])
    enclosing = enclosings[0].mul_(enclosings[1])
    union = (planes[2] * planes[3] + target_planes[2] * target_planes[3]).sub_(intersection)
    waste = (enclosing - union).div_(enclosing.add_(AREA_EPSILON))
    giou = intersection.div_(union.add_(AREA_EPSILON)).sub_(waste)
    return distances[0].add_(distances[1]), giou
