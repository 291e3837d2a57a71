"""The matching cost: what it costs to match each query with each target of its image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
class MatchingCost:
    """``class·focal + bbox·L1 − giou·GIoU`` (arXiv 2010.04159; weights of DINO, arXiv 2203.03605).

    The class term is the focal loss of the entry if it were matched minus that if it were not,
    α(1−s)^γ·BCE(s, 1) − (1−α)s^γ·BCE(s, 0), computed from logits, so that it is exact where s rounds to 0 or 1.
    """

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
    position_modulation: float = 0.0
    """Exponent β of Stable-DINO's position-modulated cost (arXiv 2304.04742, equation 6), 0.5 there; 0 switches it off.
    The score becomes s·v^β, where v is (GIoU + 1)/2 scaled so that the best pair of the image has 1."""

    def __post_init__(self) -> None:
        if min(self.classification, self.bbox, self.giou) < 0 or not self.classification + self.bbox + self.giou > 0:
            raise ValueError("matching cost: classification, bbox and giou must not be negative, and not all zero")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"matching cost: alpha must be in [0, 1], not {self.alpha}")
        if self.gamma < 0 or self.position_modulation < 0:
            raise ValueError("matching cost: gamma and position_modulation must not be negative")

    @torch.no_grad()
    def __call__(self, prediction: Prediction, targets: Targets) -> Tensor:
        """Cost of every query of every layer with every target of its image, in float32 whatever the inputs.

        Args:
            prediction: logits [L, B, Q, C] and boxes [L, B, Q, 4].
            targets: of the same B images.

        Returns:
            [L, B, max G, Q] on the device of the prediction, targets before queries so that the row of a target is
            contiguous; rows beyond an image's own number of targets are meaningless. Nothing here synchronises.
        """
        logits, boxes = prediction
        num_layers, num_images, num_queries, _ = logits.shape
        with torch.autocast(logits.device.type, enabled=False):
            labels = torch.nn.utils.rnn.pad_sequence(list(targets.labels.split(targets.counts)), batch_first=True)
            target_boxes = torch.nn.utils.rnn.pad_sequence(
                list(targets.boxes.float().split(targets.counts)), batch_first=True
            )
            max_targets = labels.shape[1]
            cost = logits.new_empty((num_layers, num_images, max_targets, num_queries), dtype=torch.float32)
            if cost.numel() == 0:
                return cost
            elements = _CHUNK_ELEMENTS.get(logits.device.type, _DEFAULT_CHUNK_ELEMENTS)
            step = max(1, elements // (num_images * max_targets * num_queries))
            for first in range(0, num_layers, step):
                chunk = slice(first, first + step)
                cost[chunk] = self._chunk(logits[chunk], boxes[chunk].float(), labels, target_boxes, targets.counts)
            return cost

    def _chunk(
        self, logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        """[l, B, G, Q] from logits [l, B, Q, C], boxes [l, B, Q, 4], labels [B, G] and target_boxes [B, G, 4]."""
        distance, giou = _box_terms(boxes, target_boxes)
        image = torch.arange(len(counts), device=logits.device)[:, None]
        if self.position_modulation > 0:
            entries = logits.transpose(-1, -2)[:, image, labels].float()
            cost = self._modulated_class_term(entries, giou, counts)
        elif labels.shape[1] > logits.shape[-1]:  # fewer classes than targets: compute each entry once, then pick
            cost = self._class_term(logits.float()).transpose(-1, -2)[:, image, labels]
        else:
            cost = self._class_term(logits.transpose(-1, -2)[:, image, labels].float())
        return cost.mul_(self.classification).add_(distance, alpha=self.bbox).sub_(giou, alpha=self.giou)

    def _class_term(self, logits: Tensor) -> Tensor:
        """α(1−s)^γ·BCE(s, 1) − (1−α)s^γ·BCE(s, 0) of each entry of any shape."""
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

    def _modulated_class_term(self, logits: Tensor, giou: Tensor, counts: tuple[int, ...]) -> Tensor:
        """The class term with the score s·v^β in the place of s; all [l, B, G, Q]."""
        position = (giou + 1) * 0.5
        best = torch.stack([image[:, :count].flatten(1).amax(-1) if count else image.new_ones(len(image))
                            for image, count in zip(position.unbind(1), counts, strict=True)], dim=1)  # fmt: skip
        position = (position / best.clamp(min=_SATURATION)[:, :, None, None]).clamp(max=1)
        score = logits.sigmoid() * position.pow(self.position_modulation)
        positive = -(score + _SATURATION).log() * (1 - score).pow(self.gamma)
        negative = -(1 - score + _SATURATION).log() * score.pow(self.gamma)
        return positive.mul_(self.alpha).sub_(negative, alpha=1 - self.alpha)


def _box_terms(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and GIoU, each [l, B, G, Q], of boxes [l, B, Q, 4] with target_boxes [B, G, 4], all cxcywh.

    Along one axis let d be the distance of the two centres, h half the sum and e half the difference of the two
    extents, and m = max(d, e). The overlap is then max(h − m, 0) and the enclosing extent h + m: half the work of
    corners, and no loss of precision for small boxes far from the origin.
    """
    planes = boxes.movedim(-1, 0).unsqueeze(-2).contiguous()  # [4, l, B, 1, Q]: queries contiguous
    target_planes = target_boxes.movedim(-1, 0).unsqueeze(-1)  # [4, B, G, 1]
    overlaps, enclosings, distance = [], [], None
    for centre, extent in ((0, 2), (1, 3)):
        offset = (planes[centre] - target_planes[centre]).abs_()
        half = planes[extent] * 0.5
        target_half = target_planes[extent] * 0.5
        difference = (half - target_half).abs_()
        distance = offset.add(difference, alpha=2) if distance is None else distance.add_(offset)
        if centre == 1:
            distance.add_(difference, alpha=2)
        reach = torch.maximum(offset, difference, out=offset)
        half_sum = torch.add(half, target_half, out=difference)
        overlaps.append((half_sum - reach).clamp_(min=0))
        enclosings.append(half_sum.add_(reach))
    intersection = overlaps[0].mul_(overlaps[1])
    enclosing = enclosings[0].mul_(enclosings[1])
    area = planes[2] * planes[3] + target_planes[2] * target_planes[3]
    union = area.sub_(intersection)
    waste = (enclosing - union).div_(enclosing.add_(AREA_EPSILON))
    giou = intersection.div_(union.add_(AREA_EPSILON)).sub_(waste)
    assert distance is not None
    return distance, giou
