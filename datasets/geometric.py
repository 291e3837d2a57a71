"""Transforms that move, crop or turn an image with its boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchvision.transforms import v2

from datasets.augmentation import Augmentation, Occasional, Source, by_torchvision
from datasets.labelled_image import LabelledImage, crop, drop_lost_boxes, resize


@dataclass(frozen=True, kw_only=True)
class IoUCrop(Augmentation):
    """Cuts out a window that overlaps some box by a random least IoU, or leaves the image (SSD, arXiv 1512.02325).

    Boxes whose centre is outside the window are dropped.
    """

    name: Literal["iou_crop"] = "iou_crop"
    min_iou: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    """The choices, each below 1; one further choice is to leave the image as it is."""
    min_scale: float = 0.3
    """Least height and width of the window, as a share of the image's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = bool(self.min_iou) and all(0.0 <= least < 1.0 for least in self.min_iou) and 0.0 < self.min_scale < 1.0
        self._need(fits, "min_iou of at least one number in [0, 1), and min_scale in (0, 1)")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        if not len(sample.boxes) or min(sample.size) * self.min_scale < 1.0:
            return sample
        iou_crop = v2.RandomIoUCrop(min_scale=self.min_scale, sampler_options=[*self.min_iou, 1.0])
        return drop_lost_boxes(by_torchvision(iou_crop, sample, source))


@dataclass(frozen=True, kw_only=True)
class ScaleJitter(Augmentation):
    """Resizes by a random factor and cuts out what fits a square (large-scale jitter, arXiv 2012.07177).

    What is smaller is not padded here: the batch is, and the detector knows where its padding is.
    """

    name: Literal["scale_jitter"] = "scale_jitter"
    size: int = 1024
    """Pixels of the square's side; at factor 1 the image just fits it."""
    min_scale: float = 0.1
    """Least factor."""
    max_scale: float = 2.0
    """Largest factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(self.size > 0 and 0.0 < self.min_scale <= self.max_scale, "size > 0 and 0 < min_scale <= max_scale")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        factor = source.uniform(self.min_scale, self.max_scale) * self.size / max(sample.size)
        height, width = (max(round(side * factor), 1) for side in sample.size)
        fitting = min(height, self.size), min(width, self.size)
        top, left = source.randint(0, height - fitting[0]), source.randint(0, width - fitting[1])
        return crop(resize(sample, (height, width)), top, left, *fitting)


@dataclass(frozen=True, kw_only=True)
class RandomRotation(Occasional):
    """Turns the image about its centre; the corners that appear are grey.

    A box becomes the box around the turned one, which is larger than the object: keep the angles small.
    """

    name: Literal["random_rotation"] = "random_rotation"
    degrees: float = 10.0
    """Angles are drawn from ± this."""
    fill: int = 124
    """Grey level of the corners, 0 to 255."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(0.0 <= self.degrees <= 45.0 and 0 <= self.fill <= 255, "degrees in 0..45 and fill in 0..255")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        turn = v2.RandomRotation(self.degrees, v2.InterpolationMode.BILINEAR, fill=self.fill)
        return drop_lost_boxes(by_torchvision(turn, sample, source))
