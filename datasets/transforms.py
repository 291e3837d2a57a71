"""Augmentation: each transform is a frozen dataclass that is called with a labelled image and a source of randomness.

Pictures and boxes are torchvision ``tv_tensors`` and are changed by torchvision's v2 functionals. Nothing here touches
a global random state: a transform draws from the source it is given, which is seeded for each sample, so that the
result depends neither on the worker process nor on what else was loaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Image

from datasets.augmentation import Occasional, Source
from datasets.geometric import IoUCrop, RandomRotation, ScaleJitter
from datasets.labelled_image import LabelledImage, drop_lost_boxes
from datasets.mixing import CopyPaste, Mixing, MixUp, Mosaic
from datasets.photometric import ColourJitter, PhotometricDistortion, RandomErasing
from datasets.sizes import (
    DETRMultiScale,
    RandomResize,
    RandomSizeCrop,
    RandomZoomOut,
    Resize,
    ResizeExact,
)


@dataclass(frozen=True, kw_only=True)
class RandomFlip(Occasional):
    """Mirrors left and right."""

    name: Literal["random_flip"] = "random_flip"

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        return LabelledImage(F.horizontal_flip(sample.image), F.horizontal_flip(sample.boxes), sample.labels)


@dataclass(frozen=True, kw_only=True)
class RandomVerticalFlip(Occasional):
    """Mirrors top and bottom (for pictures without an up, such as those from microscopes)."""

    name: Literal["random_vertical_flip"] = "random_vertical_flip"

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        return LabelledImage(F.vertical_flip(sample.image), F.vertical_flip(sample.boxes), sample.labels)


@dataclass(frozen=True, kw_only=True)
class RandomTranspose(Occasional):
    """Swaps rows and columns; together with both flips it makes every rotation by 90 degrees."""

    name: Literal["random_transpose"] = "random_transpose"

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        height, width = sample.size
        boxes = sample.boxes.as_subclass(Tensor)[:, [1, 0, 3, 2]]
        return LabelledImage(
            Image(sample.image.as_subclass(Tensor).transpose(1, 2)),
            BoundingBoxes(boxes, format="XYXY", canvas_size=(width, height)),
            sample.labels,
        )


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
    | PhotometricDistortion
    | RandomErasing
    | IoUCrop
    | ScaleJitter
    | RandomRotation
    | Mosaic
    | MixUp
    | CopyPaste
)
"""The index of transforms; a configuration picks one by its ``name``."""


def apply_transforms(
    transforms: tuple[Transform, ...],
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    seed: int,
    progress: float = 0.0,
    load: Callable[[random.Random], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> LabelledImage:
    """Runs the transforms one after the other with randomness from ``seed`` alone.

    Args:
        transforms: in order.
        image: [3, H, W] uint8.
        boxes: [n, 4] float32 xyxy in pixels.
        labels: [n] int64.
        seed: of this sample.
        progress: share of the training that is over.
        load: draws another image of the data set, as (image, boxes, labels), for transforms that mix.
    """
    size = (int(image.shape[1]), int(image.shape[2]))
    sample = LabelledImage(Image(image), BoundingBoxes(boxes, format="XYXY", canvas_size=size), labels)
    source = Source(seed)
    source.progress = progress
    before: list[Transform] = []
    for transform in transforms:
        if load is not None and isinstance(transform, Mixing):
            source.others = partial(_another, tuple(before), load)
        sample = transform(sample, source)
        before += [] if isinstance(transform, Mixing) else [transform]
    return drop_lost_boxes(sample)


def _another(
    before: tuple[Transform, ...], load: Callable[[random.Random], tuple[Tensor, Tensor, Tensor]], source: Source
) -> LabelledImage:
    return apply_transforms(before, *load(source), source.getrandbits(63), source.progress)


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
        if transform.until < 1.0:
            raise ValueError(f"data.val.transforms: {transform.name} cannot have an 'until' in evaluation")
        size = transform.output_size(size)
    return size
