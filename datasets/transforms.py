"""Augmentation: each transform is a frozen dataclass that is called with a labelled image and a source of randomness.

Pictures and boxes are torchvision ``tv_tensors`` and are changed by torchvision's v2 functionals. Nothing here touches
a global random state: a transform draws from the generator it is given, which is seeded for each sample, so that the
result depends neither on the worker process nor on what else was loaded.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Image

from datasets.labelled_image import LabelledImage, drop_lost_boxes
from datasets.sizes import (
    DETRMultiScale,
    RandomResize,
    RandomSizeCrop,
    RandomZoomOut,
    Resize,
    ResizeExact,
    check_probability,
)

__all__ = [
    "ColourJitter",
    "DETRMultiScale",
    "LabelledImage",
    "RandomFlip",
    "RandomResize",
    "RandomSizeCrop",
    "RandomTranspose",
    "RandomVerticalFlip",
    "RandomZoomOut",
    "Resize",
    "ResizeExact",
    "Transform",
    "apply_transforms",
    "final_size",
]


@dataclass(frozen=True, kw_only=True)
class RandomFlip:
    """Mirrors left and right."""

    name: Literal["random_flip"] = "random_flip"
    """Tag."""
    probability: float = 0.5
    """How often."""

    def __post_init__(self) -> None:
        check_probability(self.name, self.probability)

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
        check_probability(self.name, self.probability)

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
        check_probability(self.name, self.probability)

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
        check_probability(self.name, self.probability)
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
