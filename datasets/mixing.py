"""Transforms that make one sample of several images.

The other images have gone through what stands before the transform in the list, except for transforms that mix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, Image

from datasets.augmentation import Occasional, Source
from datasets.labelled_image import LabelledImage, crop, resize

GREY = 124
"""Where a mixed image has no pixels of its own."""


@dataclass(frozen=True, kw_only=True)
class Mosaic(Occasional):
    """Four images around a random point of a square (YOLOv4, arXiv 2004.10934)."""

    name: Literal["mosaic"] = "mosaic"
    size: int = 640
    """Pixels of the square's side."""
    min_scale: float = 0.4
    """Least long side of an image before it is cut to its quarter, as a share of the square's side."""
    max_scale: float = 1.0
    """Largest long side of an image, likewise."""
    min_visible: float = 0.2
    """Boxes that keep less than this share of their area are dropped."""
    probability: float = 1.0
    """How often."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.size > 0 and 0.0 < self.min_scale <= self.max_scale and 0.0 <= self.min_visible <= 1.0
        self._need(fits, "size > 0, 0 < min_scale <= max_scale and min_visible in [0, 1]")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        middle = [round(source.uniform(0.25, 0.75) * self.size) for _ in range(2)]
        canvas, boxes, labels = _canvas(self.size, self.size), [], []
        for quarter in range(4):
            part = source.another() if quarter else sample
            factor = source.uniform(self.min_scale, self.max_scale) * self.size / max(part.size)
            height, width = (max(round(side * factor), 1) for side in part.size)
            # Each image touches the middle with the corner that looks there.
            sides = list(zip((height, width), middle, divmod(quarter, 2), strict=True))
            shown = [min(side, self.size - at if after else at) for side, at, after in sides]
            cut = [0 if after else side - seen for (side, _, after), seen in zip(sides, shown, strict=True)]
            top, left = (at if after else at - seen for (_, at, after), seen in zip(sides, shown, strict=True))
            part = _visible(resize(part, (height, width)), cut[0], cut[1], shown[0], shown[1], self.min_visible)
            canvas[:, top : top + shown[0], left : left + shown[1]] = part.image
            boxes.append(part.boxes.as_subclass(Tensor) + torch.tensor([left, top] * 2))
            labels.append(part.labels)
        return _labelled(canvas, torch.cat(boxes), torch.cat(labels))


@dataclass(frozen=True, kw_only=True)
class MixUp(Occasional):
    """A weighted mean of two images, with the boxes of both (arXiv 1710.09412; for detection, arXiv 1902.04103)."""

    name: Literal["mixup"] = "mixup"
    alpha: float = 1.5
    """The weight is drawn from Beta(alpha, alpha)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(self.alpha > 0.0, "a positive alpha")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        other, weight = source.another(), source.betavariate(self.alpha, self.alpha)
        size = [max(sides) for sides in zip(sample.size, other.size, strict=True)]
        first, second = _canvas(*size), _canvas(*size)
        for canvas, part in ((first, sample), (second, other)):
            canvas[:, : part.size[0], : part.size[1]] = part.image
        mixed = (first * weight + second * (1.0 - weight)).round().byte()
        boxes = torch.cat([part.boxes.as_subclass(Tensor) for part in (sample, other)])
        return _labelled(mixed, boxes, torch.cat((sample.labels, other.labels)))


@dataclass(frozen=True, kw_only=True)
class CopyPaste(Occasional):
    """Pastes the contents of some boxes of another image at random places (after arXiv 2012.07177, without masks)."""

    name: Literal["copy_paste"] = "copy_paste"
    max_objects: int = 3
    """The most boxes that are pasted; at least one is, where the other image has any."""
    min_scale: float = 0.5
    """Least factor on the size of what is pasted."""
    max_scale: float = 1.5
    """Largest factor, as far as it fits the image."""
    min_visible: float = 0.3
    """Boxes of which less than this share is left to be seen are dropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.max_objects > 0 and 0.0 < self.min_scale <= self.max_scale and 0.0 <= self.min_visible <= 1.0
        self._need(fits, "max_objects >= 1, 0 < min_scale <= max_scale and min_visible in [0, 1]")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        other = source.another()
        objects = (other.labels >= 0).nonzero()[:, 0].tolist()  # labels below 0 are regions to ignore
        for place in source.sample(objects, min(source.randint(1, self.max_objects), len(objects))):
            left, top, right, bottom = other.boxes.as_subclass(Tensor)[place].round().int().clamp(min=0).tolist()
            height, width = min(bottom, other.size[0]) - top, min(right, other.size[1]) - left
            if min(height, width) < 1:
                continue
            # With it comes what else is to be seen there.
            patch = _visible(other, top, left, height, width, self.min_visible)
            factor = source.uniform(self.min_scale, self.max_scale)
            factor = min(factor, sample.size[0] / height, sample.size[1] / width)
            patch = resize(patch, (max(int(height * factor), 1), max(int(width * factor), 1)))
            sample = self._paste(sample, patch, source)
        return sample

    def _paste(self, sample: LabelledImage, patch: LabelledImage, source: Source) -> LabelledImage:
        top, left = (source.randint(0, side - own) for side, own in zip(sample.size, patch.size, strict=True))
        image = sample.image.as_subclass(Tensor).clone()
        image[:, top : top + patch.size[0], left : left + patch.size[1]] = patch.image
        boxes = sample.boxes.as_subclass(Tensor)
        window = torch.tensor([left, top, left + patch.size[1], top + patch.size[0]])
        kept = sample.keep(_share_within(boxes, window) <= 1.0 - self.min_visible)
        pasted = patch.boxes.as_subclass(Tensor) + window[[0, 1, 0, 1]]
        both = torch.cat((kept.boxes.as_subclass(Tensor), pasted))
        return _labelled(image, both, torch.cat((kept.labels, patch.labels)))


Mixing = Mosaic | MixUp | CopyPaste


def _canvas(height: int, width: int) -> Tensor:
    return torch.full((3, height, width), GREY, dtype=torch.uint8)


def _labelled(image: Tensor, boxes: Tensor, labels: Tensor) -> LabelledImage:
    size = int(image.shape[1]), int(image.shape[2])
    return LabelledImage(Image(image), BoundingBoxes(boxes, format="XYXY", canvas_size=size), labels)


def _visible(sample: LabelledImage, top: int, left: int, height: int, width: int, least: float) -> LabelledImage:
    """A window of the image, without boxes that keep less than ``least`` of their area."""
    shares = _share_within(sample.boxes.as_subclass(Tensor), torch.tensor([left, top, left + width, top + height]))
    return crop(sample.keep(shares >= least), top, left, height, width)


def _share_within(boxes_xyxy: Tensor, window: Tensor) -> Tensor:
    """[n] of each box's area inside the window."""
    common = torch.minimum(boxes_xyxy, window)[:, 2:] - torch.maximum(boxes_xyxy, window)[:, :2]
    return common.clamp(min=0).prod(dim=1) / (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(dim=1)
