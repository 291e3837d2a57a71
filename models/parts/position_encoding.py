"""Sine encodings of grid positions (for the encoder) and of boxes (for the decoder's queries)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def __call__(self, shape: tuple[int, int], valid_sizes: Tensor, embed_dim: int) -> Tensor:
        """Encode one feature map.

        Args:
            shape: (height, width) of the padded map.
            valid_sizes: [B, 2] (height, width) of the unpadded part of each image's map.
            embed_dim: channels; half of them encode the row, the others the column.

        Returns:
            [B, height · width, embed_dim] float32.
        """
        height, width = shape
        rows = self._axis(height, valid_sizes[:, 0], embed_dim // 2)
        columns = self._axis(width, valid_sizes[:, 1], embed_dim // 2)
        grid = torch.cat(
            [rows[:, :, None].expand(-1, -1, width, -1), columns[:, None].expand(-1, height, -1, -1)], dim=-1
        )
        return grid.flatten(1, 2)

    def _axis(self, length: int, valid: Tensor, channels: int) -> Tensor:
        positions = torch.arange(1, length + 1, device=valid.device, dtype=torch.float32)
        valid = valid.float()[:, None]
        normalised = (torch.minimum(positions, valid) + self.offset) / (valid + 1e-6)
        return sine_features(normalised, channels, self.temperature)


def sine_features(values: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Interleaved sines and cosines of values in [0, 1], times 2π.

    Args:
        values: [...] float.
        channels: even number of features per value.
        temperature: base of the geometric series of wavelengths.

    Returns:
        [..., channels] float32: sin, cos, sin, cos, … from the shortest wavelength to the longest.
    """
    exponents = torch.arange(channels // 2, device=values.device, dtype=torch.float32) * (2 / channels)
    angles = values.float()[..., None] * (2 * math.pi) / temperature**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


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
