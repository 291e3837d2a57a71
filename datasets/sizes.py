"""Transforms that change the size of an image. Only the first two give every image a size known beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchvision.transforms.v2 import functional as F

from datasets.augmentation import Augmentation, Occasional, Source
from datasets.images import MAX_PIXELS
from datasets.labelled_image import LabelledImage, crop, resize

MAX_ASPECT_RATIO = 16
"""Longer pictures are strips, not photographs: they could become as long as they like, so their long side is cut."""


def resized_size(size: tuple[int, int], short_side: int, max_long_side: int | None) -> tuple[int, int]:
    """(height, width) with the short side as asked for, unless the long one would become too long (as DETR does it).

    DETR's own rounding may pass ``max_long_side`` by a few pixels; strips longer than ``MAX_ASPECT_RATIO`` do not, and
    without a ``max_long_side`` get no longer than that many short sides.
    """
    height, width = size
    low, high = min(size), max(size)
    if high > MAX_ASPECT_RATIO * low:
        longest = max_long_side or MAX_ASPECT_RATIO * short_side
        long = min(high * short_side // low, longest)
        short = min(max(round(long * low / high), 1), short_side)
        return (long, short) if width < height else (short, long)
    if max_long_side is not None and high / low * short_side > max_long_side:
        short_side = max(round(max_long_side * low / high), 1)
    if low == short_side:
        return size
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def check_sides(name: str, sides: tuple[int, ...]) -> None:
    if not sides or min(sides) < 1:
        raise ValueError(f"{name}: give at least one side length, all of them positive, got {list(sides)}")


@dataclass(frozen=True, kw_only=True)
class Resize(Augmentation):
    """Resizes to a short side, unless the long one would become too long; keeps the aspect ratio."""

    name: Literal["resize"] = "resize"
    short_side: int = 800
    """Pixels of the shorter side."""
    max_long_side: int | None = 1333
    """The most pixels of the longer side; null: as the short side makes it, but for strips."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sides(self.name, (self.short_side, self.max_long_side or 1))

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        return resize(sample, resized_size(sample.size, self.short_side, self.max_long_side))

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image of this size gets."""
        return resized_size(size, self.short_side, self.max_long_side)


@dataclass(frozen=True, kw_only=True)
class ResizeExact(Augmentation):
    """Resizes to one size whatever the aspect ratio was."""

    name: Literal["resize_exact"] = "resize_exact"
    height: int
    """Pixels."""
    width: int
    """Pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sides(self.name, (self.height, self.width))

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        return resize(sample, (self.height, self.width))

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image of this size gets."""
        return self.height, self.width


@dataclass(frozen=True, kw_only=True)
class RandomResize(Augmentation):
    """Resizes to one of several short sides."""

    name: Literal["random_resize"] = "random_resize"
    short_sides: tuple[int, ...]
    """The choices, in pixels."""
    max_long_side: int | None = 1333
    """The most pixels of the longer side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sides(self.name, self.short_sides)
        check_sides(self.name, (self.max_long_side or 1,))

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        return resize(sample, resized_size(sample.size, source.choice(self.short_sides), self.max_long_side))


@dataclass(frozen=True, kw_only=True)
class RandomSizeCrop(Occasional):
    """Cuts out a window of random size and place; boxes are clipped to it and dropped if nothing is left."""

    name: Literal["random_size_crop"] = "random_size_crop"
    min_size: int = 384
    """Least height and width in pixels (or the image's, if that is smaller)."""
    max_size: int = 600
    """Most height and width in pixels."""
    probability: float = 1.0
    """How often."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(1 <= self.min_size <= self.max_size, "1 <= min_size <= max_size")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        height, width = (source.randint(min(self.min_size, side), min(self.max_size, side)) for side in sample.size)
        top = source.randint(0, sample.size[0] - height)
        left = source.randint(0, sample.size[1] - width)
        return crop(sample, top, left, height, width)


@dataclass(frozen=True, kw_only=True)
class DETRMultiScale(Augmentation):
    """DETR's augmentation: a random short side, and before it, for half of the images, a random crop.

    Source: Carion et al., arXiv 2005.12872, section 4 and appendix A.4. The same sizes are used by Deformable DETR and
    DINO.
    """

    name: Literal["detr_multi_scale"] = "detr_multi_scale"
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
        super().__post_init__()
        self._need(0.0 <= self.crop_probability <= 1.0, "crop_probability in [0, 1]")
        for sides in (self.short_sides, self.crop_short_sides, (self.max_long_side,)):
            check_sides(self.name, sides)
        RandomSizeCrop(min_size=self.crop_min_size, max_size=self.crop_max_size)

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        if source.random() < self.crop_probability:
            sample = RandomResize(short_sides=self.crop_short_sides, max_long_side=None)(sample, source)
            sample = RandomSizeCrop(min_size=self.crop_min_size, max_size=self.crop_max_size)(sample, source)
        return RandomResize(short_sides=self.short_sides, max_long_side=self.max_long_side)(sample, source)


@dataclass(frozen=True, kw_only=True)
class RandomZoomOut(Occasional):
    """Puts the image somewhere on a larger grey canvas, which makes objects smaller (SSD, arXiv 1512.02325)."""

    name: Literal["random_zoom_out"] = "random_zoom_out"
    max_scale: float = 2.0
    """The largest canvas, relative to the image's sides."""
    fill: int = 124
    """Grey level of the canvas, 0 to 255."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(self.max_scale >= 1.0 and 0 <= self.fill <= 255, "max_scale >= 1 and fill in 0..255")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        height, width = sample.size
        # A huge picture is not made larger than one that would be decoded.
        scale = min(source.uniform(1.0, self.max_scale), max((MAX_PIXELS / (height * width)) ** 0.5, 1.0))
        extra_y, extra_x = (int(side * (scale - 1.0)) for side in sample.size)
        top, left = source.randint(0, extra_y), source.randint(0, extra_x)
        padding = [left, top, extra_x - left, extra_y - top]
        return LabelledImage(F.pad(sample.image, padding, fill=self.fill), F.pad(sample.boxes, padding), sample.labels)
