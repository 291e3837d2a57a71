"""Sine encodings of grid positions (for the encoder) and of boxes (for the decoder's queries)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.parts.constants import remembered
from models.parts.memory import grid


@dataclass(frozen=True, kw_only=True)
class SinePositionEncoding:
    """Sine encoding of the rows and columns of a feature map, counted inside the unpadded part.

    Source: DETR (arXiv 2005.12872, appendix A.4). Published detectors differ in the two fields: DINO uses temperature
    20 and offset 0, Deformable DETR temperature 10000 and offset -0.5.
    """

    temperature: float = 20.0
    """Base of the geometric series of wavelengths."""
    offset: float = 0.0
    """Added to positions 1, 2, 3, … before they are normalised; -0.5 puts them at pixel centres."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, found {self.temperature}")

    def __call__(self, shapes: Sequence[tuple[int, int]], valid_sizes: Tensor, embed_dim: int) -> Tensor:
        """Encode the pixels of feature maps.

        Args:
            shapes: (height, width) of the padded maps.
            valid_sizes: [B, L, 2] (height, width) of the unpadded part of each image's maps.
            embed_dim: channels; half of them encode the row, the others the column.

        Returns:
            [B, S, embed_dim] float32.
        """
        lines = grid(shapes, valid_sizes.device)
        valid = valid_sizes.flatten(1).float()[:, lines.axis]
        places = (torch.minimum(lines.place, valid) + self.offset) / (valid + 1e-6)
        return sine_features(places, embed_dim // 2, self.temperature)[:, lines.pixel].flatten(2)


def sine_features(values: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Interleaved sines and cosines of values in [0, 1], times 2π.

    Args:
        values: [...] float.
        channels: even number of features per value.
        temperature: base of the geometric series of wavelengths.

    Returns:
        [..., channels] float32: sin, cos, sin, cos, … from the shortest wavelength to the longest.
    """
    frequencies, phases = _waves(channels, temperature, values.device)
    return torch.addcmul(phases, values.float()[..., None], frequencies).sin()


@remembered
def _waves(channels: int, temperature: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Angular frequency and phase of each feature: a cosine is a sine a quarter turn ahead."""
    exponents = torch.arange(channels // 2, device=device, dtype=torch.float64) * (2 / channels)
    frequencies = (2 * math.pi / temperature**exponents).repeat_interleave(2)
    phases = torch.arange(channels, device=device) % 2 * (math.pi / 2)
    return frequencies.float(), phases


def encode_boxes(boxes: Tensor, channels: int) -> Tensor:
    """Sine features of boxes, in the order y, x, w, h (DAB-DETR, arXiv 2201.12329, equation 7).

    Args:
        boxes: [..., 4] cxcywh, or [..., 2] points.
        channels: features per coordinate.

    Returns:
        [..., 4 · channels] float32, or [..., 2 · channels].
    """
    # Slices: a list of indices would be copied from the host, once in every layer.
    ordered = torch.cat([boxes[..., 1:2], boxes[..., 0:1], boxes[..., 2:]], dim=-1)
    return sine_features(ordered, channels).flatten(-2)
