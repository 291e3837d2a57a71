"""Augmentation: each transform is a frozen dataclass that is called with a labelled image and a source of randomness.

Pictures and boxes are torchvision ``tv_tensors`` and are changed by torchvision's v2 functionals. Nothing here touches
a global random state: a transform draws from the generator it is given, which is seeded for each sample, so that the
result depends neither on the worker process nor on what else was loaded.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Image


class LabelledImage(NamedTuple):
    """What transforms take and return."""

    image: Image
    """[3, H, W] uint8 RGB."""
    boxes: BoundingBoxes
    """[n, 4] float32 xyxy in pixels of ``image``; may reach beyond it until the end."""
    labels: Tensor
    """[n] int64."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        height, width = self.image.shape[-2:]
        return int(height), int(width)

    def keep(self, mask: Tensor) -> LabelledImage:
        """Without the boxes where ``mask`` [n] is False."""
        boxes = BoundingBoxes(self.boxes.as_subclass(Tensor)[mask], format="XYXY", canvas_size=self.size)
        return LabelledImage(self.image, boxes, self.labels[mask])


def resized_size(size: tuple[int, int], short_side: int, max_long_side: int | None) -> tuple[int, int]:
    """(height, width) with the short side as asked for, unless the long one would become too long (as DETR does it)."""
    height, width = size
    low, high = min(size), max(size)
    if max_long_side is not None and high / low * short_side > max_long_side:
        short_side = max(round(max_long_side * low / high), 1)
    if low == short_side:
        return size
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def _resize(sample: LabelledImage, size: tuple[int, int]) -> LabelledImage:
    if size == sample.size:
        return sample
    image = F.resize(sample.image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    return LabelledImage(image, F.resize(sample.boxes, list(size)), sample.labels)


def _crop(sample: LabelledImage, top: int, left: int, height: int, width: int) -> LabelledImage:
    """Cuts out a window; boxes that lose all their area are dropped, the others clipped."""
    cut = LabelledImage(
        F.crop(sample.image, top, left, height, width), F.crop(sample.boxes, top, left, height, width), sample.labels
    )
    return drop_lost_boxes(cut)


def drop_lost_boxes(sample: LabelledImage) -> LabelledImage:
    """Clips boxes to the image and drops those without area."""
    boxes = F.clamp_bounding_boxes(sample.boxes).as_subclass(Tensor)
    clipped = LabelledImage(sample.image, BoundingBoxes(boxes, format="XYXY", canvas_size=sample.size), sample.labels)
    return clipped.keep((boxes[:, 2:] > boxes[:, :2]).all(dim=1))


def _check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: probability must be in [0, 1], got {value}")


def _check_sides(name: str, sides: tuple[int, ...]) -> None:
    if not sides or min(sides) < 1:
        raise ValueError(f"{name}: give at least one side length, all of them positive, got {list(sides)}")


@dataclass(frozen=True, kw_only=True)
class RandomFlip:
    """Mirrors left and right."""

    name: Literal["random_flip"] = "random_flip"
    """Tag."""
    probability: float = 0.5
    """How often."""

    def __post_init__(self) -> None:
        _check_probability(self.name, self.probability)

    def __call__(self, sample: LabelledImage, rng: random.Random) -> LabelledImage:
        if rng.random() >= self.probability:
            return sample
        return LabelledImage(F.horizontal_flip(sample.image), F.horizontal_flip(sample.boxes), sample.labels)


@dataclass(frozen=True, kw_only=True)
class RandomVerticalFlip:
    """Mirrors top and bottom (for pictures without an up, such as those from microscopes)."""

    name: Literal["random_vertical_flip"] = "random_vertical_flip"
    """Tag."""
    probability: float = 0.5
    """How often."""

    def __post_init__(self) -> None:
        _check_probability(self.name, self.probability)

    def __call__(self, sample: LabelledImage, rng: random.Random) -> LabelledImage:
        if rng.random() >= self.probability:
            return sample
        return LabelledImage(F.vertical_flip(sample.image), F.vertical_flip(sample.boxes), sample.labels)


@dataclass(frozen=True, kw_only=True)
class RandomTranspose:
    """Swaps rows and columns; together with both flips it makes every rotation by 90 degrees."""

    name: Literal["random_transpose"] = "random_transpose"
    """Tag."""
    probability: float = 0.5
    """How often."""

    def __post_init__(self) -> None:
        _check_probability(self.name, self.probability)

    def __call__(self, sample: LabelledImage, rng: random.Random) -> LabelledImage:
        if rng.random() >= self.probability:
            return sample
        height, width = sample.size
        boxes = sample.boxes.as_subclass(Tensor)[:, [1, 0, 3, 2]]
        return LabelledImage(
            Image(sample.image.as_subclass(Tensor).transpose(1, 2)),
            BoundingBoxes(boxes, format="XYXY", canvas_size=(width, height)),
            sample.labels,
        )


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Resizes to a short side, unless the long one would become too long; keeps the aspect ratio."""

    name: Literal["resize"] = "resize"
    """Tag."""
    short_side: int = 800
    """Pixels of the shorter side."""
    max_long_side: int | None = 1333
    """The most pixels of the longer side."""

    def __post_init__(self) -> None:
        _check_sides(self.name, (self.short_side, self.max_long_side or 1))

    def __call__(self, sample: LabelledImage, rng: random.Random) -> LabelledImage:
        return _resize(sample, resized_size(sample.size, self.short_side, self.max_long_side))

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image of this size gets."""
        return resized_size(size, self.short_side, self.max_long_side)


@dataclass(frozen=True, kw_only=True)
class ResizeExact:
    """Resizes to one size whatever the aspect ratio was."""

    name: Literal["resize_exact"] = "resize_exact"
    """Tag."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""

    def __post_init__(self) -> None:
        _check_sides(self.name, (self.height, self.width))

    def __call__(self, sample: LabelledImage, rng: random.Random) -> LabelledImage:
        return _resize(sample, (self.height, self.width))

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image of this size gets."""
        return self.height, self.width


@dataclass(frozen=True, kw_only=True)
class RandomResize:
    """Resizes to one of several short sides."""

    name: Literal["random_resize"] = "random_resize"
    """Tag."""
    short_sides: tuple[int, ...]
    """The choices, in pixels."""
    max_long_side: int | None = 1333
    """The most pixels of the longer side."""

    def __post_init__(self) -> None:
        _check_sides(self.name, (*self.short_sides, self.max_long_side or 1))

    def __call__(self, sample: LabelledImage, rng: random.Random) -> LabelledImage:
        return _resize(sample, resized_size(sample.size, rng.choice(self.short_sides), self.max_long_side))


@dataclass(frozen=True, kw_only=True)
class RandomSizeCrop:
    """Cuts out a window of random size and place; boxes are clipped to it and dropped if nothing is left."""

    name: Literal["random_size_crop"] = "random_size_crop"
    """Tag."""
    min_size: int = 384
    """Least height and width in pixels (or the image's, if that is smaller)."""
    max_size: int = 600
    """Most height and width in pixels."""
    probability: float = 1.0
    """How often."""

    def __post_init__(self) -> None:
        _check_probability(self.name, self.probability)
        if not 1 <= self.min_size <= self.max_size:
            raise ValueError(f"{self.name}: need 1 <= min_size <= max_size, got {self.min_size} and {self.max_size}")

    def __call__(self, sample: LabelledImage, rng: random.Random) -> LabelledImage:
        if rng.random() >= self.probability:
            return sample
        height, width = (rng.randint(min(self.min_size, side), min(self.max_size, side)) for side in sample.size)
        top = rng.randint(0, sample.size[0] - height)
        left = rng.randint(0, sample.size[1] - width)
        return _crop(sample, top, left, height, width)


@dataclass(frozen=True, kw_only=True)
class DETRMultiScale:
    """DETR's augmentation: a random short side, and before it, for half of the images, a random crop.

    Source: Carion et al., arXiv 2005.12872, section 4 and appendix A.4. The same sizes are used by Deformable DETR and
    DINO.
    """

    name: Literal["detr_multi_scale"] = "detr_multi_scale"
    """Tag."""
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """Choices of the final short side, in pixels."""
    max_long_side: int = 1333
    """The most pixels of the final longer side."""
    crop_probability: float = 0.5
    """How often the crop comes first."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """Choices of the short side before the crop, in pixels."""
    crop_min_size: int = 384
    """Least height and width of the crop in pixels."""
    crop_max_size: int = 600
    """Most height and width of the crop in pixels."""

    def __post_init__(self) -> None:
        _check_probability(self.name, self.crop_probability)
        _check_sides(self.name, (*self.short_sides, self.max_long_side))
        _check_sides(self.name, self.crop_short_sides)
        RandomSizeCrop(min_size=self.crop_min_size, max_size=self.crop_max_size)

    def __call__(self, sample: LabelledImage, rng: random.Random) -> LabelledImage:
        if rng.random() < self.crop_probability:
            sample = RandomResize(short_sides=self.crop_short_sides, max_long_side=None)(sample, rng)
            sample = RandomSizeCrop(min_size=self.crop_min_size, max_size=self.crop_max_size)(sample, rng)
        return RandomResize(short_sides=self.short_sides, max_long_side=self.max_long_side)(sample, rng)


@dataclass(frozen=True, kw_only=True)
class RandomZoomOut:
    """Puts the image somewhere on a larger grey canvas, which makes objects smaller (SSD, arXiv 1512.02325)."""

    name: Literal["random_zoom_out"] = "random_zoom_out"
    """Tag."""
    max_scale: float = 2.0
    """The largest canvas, relative to the image's sides."""
    probability: float = 0.5
    """How often."""
    fill: int = 124
    """Grey level of the canvas, 0 to 255."""

    def __post_init__(self) -> None:
        _check_probability(self.name, self.probability)
        if self.max_scale < 1.0 or not 0 <= self.fill <= 255:
            raise ValueError(f"{self.name}: need max_scale >= 1 and fill in 0..255")

    def __call__(self, sample: LabelledImage, rng: random.Random) -> LabelledImage:
        if rng.random() >= self.probability:
            return sample
        scale = rng.uniform(1.0, self.max_scale)
        extra_y, extra_x = (int(side * (scale - 1.0)) for side in sample.size)
        top, left = rng.randint(0, extra_y), rng.randint(0, extra_x)
        padding = [left, top, extra_x - left, extra_y - top]
        return LabelledImage(F.pad(sample.image, padding, fill=self.fill), F.pad(sample.boxes, padding), sample.labels)


@dataclass(frozen=True, kw_only=True)
class ColourJitter:
    """Changes brightness, contrast and saturation by random factors, and hue by a random shift."""

    name: Literal["colour_jitter"] = "colour_jitter"
    """Tag."""
    brightness: float = 0.2
    """Factors are drawn from 1 ± this."""
    contrast: float = 0.2
    """Factors are drawn from 1 ± this."""
    saturation: float = 0.2
    """Factors are drawn from 1 ± this."""
    hue: float = 0.0
    """Shifts are drawn from ± this share of the colour circle; slow."""
    probability: float = 0.8
    """How often."""

    def __post_init__(self) -> None:
        _check_probability(self.name, self.probability)
        if not all(0.0 <= value <= 1.0 for value in (self.brightness, self.contrast, self.saturation)):
            raise ValueError(f"{self.name}: brightness, contrast and saturation must be in [0, 1]")
        if not 0.0 <= self.hue <= 0.5:
            raise ValueError(f"{self.name}: hue must be in [0, 0.5], got {self.hue}")

    def __call__(self, sample: LabelledImage, rng: random.Random) -> LabelledImage:
        if rng.random() >= self.probability:
            return sample
        brightness, contrast, saturation = (
            rng.uniform(1.0 - spread, 1.0 + spread) for spread in (self.brightness, self.contrast, self.saturation)
        )
        image = F.adjust_brightness(sample.image, brightness) if self.brightness else sample.image
        image = F.adjust_contrast(image, contrast) if self.contrast else image
        image = F.adjust_saturation(image, saturation) if self.saturation else image
        image = F.adjust_hue(image, rng.uniform(-self.hue, self.hue)) if self.hue else image
        return LabelledImage(image, sample.boxes, sample.labels)


Transform = (
    RandomFlip
    | RandomVerticalFlip
    | RandomTranspose
    | Resize
    | ResizeExact
    | RandomResize
    | RandomSizeCrop
    | DETRMultiScale
    | RandomZoomOut
    | ColourJitter
)
"""The index of transforms; a configuration picks one by its ``name``."""


def apply_transforms(
    transforms: tuple[Transform, ...], image: Tensor, boxes: Tensor, labels: Tensor, seed: int
) -> LabelledImage:
    """Runs the transforms one after the other with randomness from ``seed`` alone.

    Args:
        transforms: in order.
        image: [3, H, W] uint8.
        boxes: [n, 4] float32 xyxy in pixels.
        labels: [n] int64.
        seed: of this sample.
    """
    size = (int(image.shape[1]), int(image.shape[2]))
    sample = LabelledImage(Image(image), BoundingBoxes(boxes, format="XYXY", canvas_size=size), labels)
    rng = random.Random(seed)
    for transform in transforms:
        sample = transform(sample, rng)
    return drop_lost_boxes(sample)


def final_size(transforms: tuple[Transform, ...], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an evaluation image after the transforms.

    Raises:
        ValueError: one of them is not a resize: detections are mapped back to the file by the ratio of the sizes alone.
    """
    for transform in transforms:
        if not isinstance(transform, Resize | ResizeExact):
            raise ValueError(
                f"data.val.transforms: {transform.name} cannot be used for evaluation, only resize and resize_exact"
            )
        size = transform.output_size(size)
    return size


def relative_boxes(sample: LabelledImage) -> Tensor:
    """[n, 4] float32 cxcywh in [0, 1] of the image."""
    height, width = sample.size
    x0, y0, x1, y1 = sample.boxes.as_subclass(Tensor).unbind(dim=1)
    return torch.stack([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height], dim=1)
