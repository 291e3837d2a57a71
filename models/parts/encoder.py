"""The encoder: multi-scale deformable self-attention over all pixels of all levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.parts.attention import DeformableAttention, FeedForward


class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward, normalised after each (arXiv 2010.04159)."""

    def __init__(
        self, embed_dim: int, num_heads: int, num_levels: int, num_points: int, ffn_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.attention = DeformableAttention(embed_dim, num_heads, num_levels, num_points)
        self.norm = nn.LayerNorm(embed_dim)
        self.feed_forward = FeedForward(embed_dim, ffn_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        memory: Tensor,
        position: Tensor,
        reference: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        valid_sizes: Tensor,
    ) -> Tensor:
        """memory [B, S, embed_dim] → [B, S, embed_dim]; the other arguments as in :class:`Encoder`."""
        attended = self.attention(memory + position, reference, memory, spatial_shapes, valid_sizes)
        return self.feed_forward(self.norm(memory + self.dropout(attended)))


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, layers: Sequence[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.gradient_checkpointing = False

    def forward(
        self,
        memory: Tensor,
        position: Tensor,
        reference: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        valid_sizes: Tensor,
    ) -> Tensor:
        """Refine the features.

        Args:
            memory: [B, S, embed_dim] features of all levels.
            position: [B, S, embed_dim] position and level encoding.
            reference: [B, S, 2] pixel centres relative to the unpadded image, from :func:`pixel_centres`.
            spatial_shapes: (height, width) of each level.
            valid_sizes: [B, L, 2] unpadded (height, width) of each level.

        Returns:
            [B, S, embed_dim]; values at padded pixels are meaningless and never read.
        """
        for layer in self.layers:
            arguments = (memory, position, reference, spatial_shapes, valid_sizes)
            if self.gradient_checkpointing and self.training:
                memory = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                memory = layer(*arguments)
        return memory


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
