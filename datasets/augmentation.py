"""What all transforms have in common: how often and how long they apply, and where their randomness comes from."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torchvision.tv_tensors import BoundingBoxes, Image

from datasets.labelled_image import LabelledImage


class Source(random.Random):
    """What one sample draws from: random numbers, and other images of the data set."""

    progress: float = 0.0
    """Share of the training that was over before this sample's step."""
    others: Callable[[Source], LabelledImage] | None = None
    """Gives another image, as it is before the transform that asks for it; None where there are no others."""

    def another(self) -> LabelledImage:
        """Another image, with what is in it.

        Raises:
            ValueError: there is none to be had.
        """
        if self.others is None:
            raise ValueError("mosaic, mixup and copy_paste need a data set to take other images from")
        return self.others(self)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A transform that may end before the training does."""

    keeps_size: ClassVar[bool] = False
    """Whether an image is known to have the same size afterwards, whatever is drawn."""
    until: float = 1.0
    """Share of the training after which it is left out (0.9: the last tenth goes without)."""

    def __post_init__(self) -> None:
        self._need(0.0 < self.until <= 1.0, "until in (0, 1]")

    def __call__(self, sample: LabelledImage, source: Source) -> LabelledImage:
        return sample if self.until < 1.0 and source.progress >= self.until else self._change(sample, source)

    def _need(self, fulfilled: bool, what: str) -> None:
        if not fulfilled:
            raise ValueError(f"{getattr(self, 'name', '')}: needs {what}")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Occasional(Augmentation):
    """A transform that applies to some of the samples."""

    probability: float = 0.5
    """How often."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(0.0 <= self.probability <= 1.0, "probability in [0, 1]")

    def __call__(self, sample: LabelledImage, source: Source) -> LabelledImage:
        return sample if source.random() >= self.probability else super().__call__(sample, source)


def by_torchvision(transform: Callable[..., Any], sample: LabelledImage, source: Source) -> LabelledImage:
    """What torchvision's transform makes of a sample, with its randomness from ``source``.

    It draws from torch's global generator, which is put back to where it was.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(source.getrandbits(63))
    try:
        image, boxes = transform(
            Image(sample.image), BoundingBoxes(sample.boxes, format="XYXY", canvas_size=sample.size)
        )
    finally:
        torch.default_generator.set_state(before)
    return LabelledImage(image, boxes, sample.labels)
