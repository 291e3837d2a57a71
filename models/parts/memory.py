"""What the encoder looks at and makes: the pixels of all levels of an image as one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
    (padded_height, padded_width), levels = padded_size, []
    for height, width in spatial_shapes:
        # Python numbers as operands: a tensor made of them here would have to be copied to the device.
        rows = (image_sizes[:, 0] * height + padded_height - 1).div(padded_height, rounding_mode="floor")
        columns = (image_sizes[:, 1] * width + padded_width - 1).div(padded_width, rounding_mode="floor")
        levels.append(torch.stack([rows, columns], dim=-1))
    return torch.stack(levels, dim=1)


def pixel_centres(spatial_shapes: Sequence[tuple[int, int]], valid_sizes: Tensor) -> Tensor:
    """Centres (x, y) of all pixels of all levels, relative to the unpadded image: [B, S, 2]; over 1 in the padding."""
    centres = []
    for level, (height, width) in enumerate(spatial_shapes):
        size = valid_sizes[:, level].float()
        y = (torch.arange(height, device=size.device) + 0.5) / size[:, :1]
        x = (torch.arange(width, device=size.device) + 0.5) / size[:, 1:]
        grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
        centres.append(grid.flatten(1, 2))
    return torch.cat(centres, dim=1)
