"""Several looks at one image, merged: overlapping tiles of large images, mirrored and at other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from structures import Detections
from tools.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class Views:
    """Which looks are taken, and how their detections become one list."""

    tile: int | None = None
    """Side in pixels of the tiles that are looked at beside the whole image; None: the whole image alone."""
    overlap: float = 0.2
    """Share of a tile that the next one shows, too."""
    flip: bool = False
    """Whether each look is taken mirrored as well."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes of each look, as factors on that of evaluation."""
    merge_iou: float = 0.6
    """IoU above which the less confident of two detections of one class, from any looks, is dropped."""

    def __post_init__(self) -> None:
        if (self.tile is not None and self.tile < 16) or not 0.0 <= self.overlap < 0.9:
            raise ValueError(
                f"tiles need 16 pixels or more and an overlap in [0, 0.9), got {self.tile}, {self.overlap}"
            )
        if not self.scales or min(self.scales) <= 0.0 or not 0.0 < self.merge_iou <= 1.0:
            raise ValueError(f"scales must be positive and merge_iou in (0, 1], got {self.scales}, {self.merge_iou}")

    def __call__(self, predictor: Predictor, images: Sequence[Tensor], threshold: float) -> list[Detections]:
        """Detect in images [3, H, W] uint8 as the detector does, best first; a single look is left as it is."""
        if self == Views(merge_iou=self.merge_iou, overlap=self.overlap):
            return predictor(images, threshold)
        return [self._look(predictor, image, threshold) for image in images]

    def _look(self, predictor: Predictor, image: Tensor, threshold: float) -> Detections:
        size = int(image.shape[1]), int(image.shape[2])
        windows = [(0, 0, *size)] if self.tile is None else [(0, 0, *size), *tiles(size, self.tile, self.overlap)]
        parts = [image[:, top : top + height, left : left + width] for top, left, height, width in windows]
        found = []
        for scale in self.scales:
            for mirrored in (False, True) if self.flip else (False,):
                looks = predictor([part.flip(-1) if mirrored else part for part in parts], threshold, scale)
                found += [_placed(*look, mirrored, size) for look in zip(looks, windows, strict=True)]
        scores, labels, boxes = (torch.cat(values) for values in zip(*found, strict=True))
        kept = batched_nms(boxes, scores, labels, self.merge_iou)[: predictor.config.model.detections_per_image]
        return Detections(scores[kept], labels[kept], boxes[kept])


def tiles(size: tuple[int, int], tile: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of tiles that cover an image of (height, width); none if one covers all of it.

    They are evenly spaced, so that neighbours overlap by ``overlap`` of a tile or more.
    """
    starts = []
    for side in size:
        step = max(int(tile * (1.0 - overlap)), 1)
        count = 1 if side <= tile else -(-(side - tile) // step) + 1
        starts.append([round(i * (side - tile) / (count - 1)) if count > 1 else 0 for i in range(count)])
    if len(starts[0]) == len(starts[1]) == 1:
        return []
    return [(top, left, min(tile, size[0]), min(tile, size[1])) for top in starts[0] for left in starts[1]]


def _placed(found: Detections, window: tuple[int, int, int, int], mirrored: bool, size: tuple[int, int]) -> Detections:
    """Detections of a window, in pixels of the image; those that its inner borders cut are left out.

    Another tile shows them whole, or the whole image does.
    """
    top, left, height, width = window
    boxes = found.boxes_xyxy
    if mirrored:
        boxes = torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), dim=1)
    cut = torch.zeros(len(boxes), dtype=torch.bool)
    for inner, distance in (
        (left > 0, boxes[:, 0]),
        (top > 0, boxes[:, 1]),
        (left + width < size[1], width - boxes[:, 2]),
        (top + height < size[0], height - boxes[:, 3]),
    ):
        cut |= inner & (distance < 2.0)
    return Detections(found.scores[~cut], found.labels[~cut], (boxes + boxes.new_tensor([left, top] * 2))[~cut])
