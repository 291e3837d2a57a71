"""Transforms that change colours and leave boxes where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.augmentation import Augmentation, Occasional, Source, by_torchvision
from datasets.labelled_image import LabelledImage


@dataclass(frozen=True, kw_only=True)
class ColourJitter(Occasional):
    """Changes brightness, contrast and saturation by random factors, and hue by a random shift."""

    keeps_size: ClassVar[bool] = True
    name: Literal["colour_jitter"] = "colour_jitter"
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
        super().__post_init__()
        factors = self.brightness, self.contrast, self.saturation
        self._need(all(0.0 <= value <= 1.0 for value in factors), "brightness, contrast and saturation in [0, 1]")
        self._need(0.0 <= self.hue <= 0.5, "hue in [0, 0.5]")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        brightness, contrast, saturation = (
            source.uniform(1.0 - spread, 1.0 + spread) for spread in (self.brightness, self.contrast, self.saturation)
        )
        image = F.adjust_brightness(sample.image, brightness) if self.brightness else sample.image
        image = F.adjust_contrast(image, contrast) if self.contrast else image
        image = F.adjust_saturation(image, saturation) if self.saturation else image
        image = F.adjust_hue(image, source.uniform(-self.hue, self.hue)) if self.hue else image
        return LabelledImage(image, sample.boxes, sample.labels)


@dataclass(frozen=True, kw_only=True)
class PhotometricDistortion(Augmentation):
    """Changes brightness, contrast, saturation, hue and the order of channels, each or not (SSD, arXiv 1512.02325)."""

    keeps_size: ClassVar[bool] = True
    name: Literal["photometric_distortion"] = "photometric_distortion"
    brightness: float = 0.125
    """Factors are drawn from 1 ± this."""
    contrast: float = 0.5
    """Factors are drawn from 1 ± this."""
    saturation: float = 0.5
    """Factors are drawn from 1 ± this."""
    hue: float = 0.05
    """Shifts are drawn from ± this share of the colour circle."""
    probability: float = 0.5
    """How often each of the five changes is made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        factors = self.brightness, self.contrast, self.saturation
        self._need(all(0.0 <= value <= 1.0 for value in factors), "brightness, contrast and saturation in [0, 1]")
        self._need(0.0 <= self.hue <= 0.5, "hue in [0, 0.5]")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        factors = [(1.0 - spread, 1.0 + spread) for spread in (self.brightness, self.contrast, self.saturation)]
        distort = v2.RandomPhotometricDistort(*factors, hue=(-self.hue, self.hue), p=self.probability)
        return by_torchvision(distort, sample, source)


@dataclass(frozen=True, kw_only=True)
class RandomErasing(Occasional):
    """Paints a random rectangle grey (arXiv 1708.04896); boxes stay, of what is hidden too."""

    keeps_size: ClassVar[bool] = True
    name: Literal["random_erasing"] = "random_erasing"
    min_area: float = 0.02
    """Least area of the rectangle, as a share of the image's."""
    max_area: float = 0.2
    """Most area of the rectangle, as a share of the image's."""
    fill: int = 124
    """Grey level, 0 to 255."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = 0.0 < self.min_area <= self.max_area < 1.0 and 0 <= self.fill <= 255
        self._need(fits, "0 < min_area <= max_area < 1 and fill in 0..255")

    def _change(self, sample: LabelledImage, source: Source) -> LabelledImage:
        erase = v2.RandomErasing(p=1.0, scale=(self.min_area, self.max_area), value=self.fill)
        return by_torchvision(lambda image, boxes: (erase(image), boxes), sample, source)
