"""What the encoder looks at and makes: the pixels of all levels of an image as one sequence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.parts.constants import remembered


class Memory(NamedTuple):
    """Features of all pixels of all levels, flattened and concatenated: S pixels in L levels."""

    features: Tensor
    """[B, S, embed_dim]; values at padded pixels are meaningless and never read."""
    positions: Tensor
    """[B, S, embed_dim] encoding of the pixel's position and level."""
    centres: Tensor
    """[B, S, 2] (x, y) of the pixels' centres relative to the unpadded image, over 1 in the padding."""
    spatial_shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level; S is the sum of their products."""
    valid_sizes: Tensor
    """[B, L, 2] (height, width) of the unpadded part of each level."""

    @property
    def inside(self) -> Tensor:
        """[B, S] bool, False for padding."""
        return (self.centres < 1).all(-1)


class Grid(NamedTuple):
    """The lines of pixels of all levels: N rows and columns, and S pixels where they cross. Depends on shapes alone."""

    place: Tensor
    """[N] float32 number of each line in its level, from 1; rows of all levels, then their columns."""
    axis: Tensor
    """[N] int64 index of each line's axis among the 2·L axes: height and width of each level in turn."""
    pixel: Tensor
    """[S, 2] int64 row and column of each pixel, among the N lines."""
    level: Tensor
    """[S] int64."""
    sizes: Tensor
    """[L, 2] int64 (height, width)."""


def grid(spatial_shapes: Sequence[tuple[int, int]], device: torch.device) -> Grid:
    """The grid of levels (height, width), remembered from call to call."""
    return _grid(tuple(spatial_shapes), device)


@remembered
def _grid(spatial_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Grid:
    def count(length: int) -> Tensor:
        return torch.arange(length, device=device)

    heights, widths = zip(*spatial_shapes, strict=True)
    lengths = [*heights, *widths]
    first = list(itertools.accumulate(lengths, initial=0))
    axes = [*range(0, len(lengths), 2), *range(1, len(lengths), 2)]
    pixels = []
    for level, (height, width) in enumerate(spatial_shapes):
        rows, columns = first[level] + count(height), first[level + len(heights)] + count(width)
        pixels.append(torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1))
    return Grid(
        place=torch.cat([1.0 + count(length) for length in lengths]),
        axis=torch.cat(
            [torch.full((length,), axis, device=device) for length, axis in zip(lengths, axes, strict=True)]
        ),
        pixel=torch.cat(pixels),
        level=torch.cat([torch.full((h * w,), level, device=device) for level, (h, w) in enumerate(spatial_shapes)]),
        sizes=torch.stack([torch.full((), n, device=device) for shape in spatial_shapes for n in shape]).view(-1, 2),
    )


def level_valid_sizes(
    image_sizes: Tensor, padded_size: tuple[int, int], spatial_shapes: Sequence[tuple[int, int]]
) -> Tensor:
    """Unpadded part of each level: the pixels whose nearest image pixel is not padding.

    Args:
        image_sizes: [B, 2] int (height, width) before padding.
        padded_size: (height, width) of the batch.
        spatial_shapes: (height, width) of each level.

    Returns:
        [B, L, 2] int64.
    """
    # Rounded up; of whole numbers that the device has already, or they would be copied in every step.
    pixels = image_sizes[:, None] * grid(spatial_shapes, image_sizes.device).sizes
    height, width = ((pixels[..., axis] + (padded_size[axis] - 1)) // padded_size[axis] for axis in (0, 1))
    return torch.stack([height, width], dim=-1)


def pixel_centres(spatial_shapes: Sequence[tuple[int, int]], valid_sizes: Tensor) -> Tensor:
    """Centres (x, y) of all pixels of all levels, relative to the unpadded image: [B, S, 2]; over 1 in the padding."""
    lines = grid(spatial_shapes, valid_sizes.device)
    centres = (lines.place - 0.5) / valid_sizes.flatten(1).float()[:, lines.axis]
    return centres[:, lines.pixel.flip(-1)]
