"""How often an image is drawn for training, by the classes in it: for data in which some classes are rare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from datasets.annotations import PackedAnnotations


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every image once in an epoch."""

    name: Literal["uniform"] = "uniform"

    def weights(self, annotations: PackedAnnotations, classes: int) -> Tensor | None:
        return None


@dataclass(frozen=True, kw_only=True)
class RepeatFactor:
    """An image as often as its rarest class asks for: max over c of max(1, √(t / f(c))), in proportion.

    f(c) is the share of images with class c (LVIS, arXiv 1908.03195, on repeat factor sampling). An epoch stays as long
    as it is, so that images of frequent classes alone come a little less than once in it.
    """

    name: Literal["repeat_factor"] = "repeat_factor"
    threshold: float = 0.001
    """t, the share of images below which a class is drawn more often."""

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"repeat_factor: threshold must be in (0, 1], got {self.threshold}")

    def weights(self, annotations: PackedAnnotations, classes: int) -> Tensor:
        """[N] float64 repeat factor of each image; 1 for those without boxes."""
        images, labels = _classes_in_images(annotations)
        shares = torch.bincount(labels, minlength=classes).double() / len(annotations.image_ids)
        of_class = (self.threshold / shares).sqrt().clamp(min=1.0)
        return torch.ones(len(annotations.image_ids), dtype=torch.float64).scatter_reduce(
            0, images, of_class[labels], "amax"
        )


@dataclass(frozen=True, kw_only=True)
class ClassBalanced:
    """As if a class were drawn first, and then an image with it; images without boxes are never drawn."""

    name: Literal["class_balanced"] = "class_balanced"

    def weights(self, annotations: PackedAnnotations, classes: int) -> Tensor:
        """[N] float64: for each class in an image, one over the number of images with it."""
        images, labels = _classes_in_images(annotations)
        of_class = 1.0 / torch.bincount(labels, minlength=classes).double()
        return torch.zeros(len(annotations.image_ids), dtype=torch.float64).scatter_add(0, images, of_class[labels])


Sampling = Uniform | RepeatFactor | ClassBalanced


def _classes_in_images(annotations: PackedAnnotations) -> tuple[Tensor, Tensor]:
    """(image, label) of every class that an image has, once each."""
    counts = annotations.counts()
    images = torch.arange(len(counts)).repeat_interleave(counts)
    pairs = torch.stack((images, annotations.labels)).unique(dim=1)
    return pairs[0], pairs[1]
