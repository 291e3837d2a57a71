"""The attention blocks of encoder and decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.parts.memory import Memory
from ops.ms_deform_attn import fused_ms_deform_attn
from structures import Looking


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3) around the fused op."""

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.value_projection = nn.Linear(embed_dim, embed_dim)
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.output_projection = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Published initialisation: uniform weights; point i of head h lies i + 1 pixels along the head's own ray."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
        rays = rays / rays.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = rays[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_projection, self.output_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Attend from every query to a few sampled places of every level.

        Args:
            query: [B, Q, embed_dim], position encoding included.
            reference: [B, Q, 2] points or [B, Q, 4] cxcywh boxes, relative to the unpadded image.
            memory: what is attended to; its padding counts as zero.

        Returns:
            [B, Q, embed_dim].
        """
        value = self.value_projection(memory.features).unflatten(-1, (self.num_heads, -1))
        offsets, logits = self._project(query)
        attended = fused_ms_deform_attn(value, memory.spatial_shapes, memory.valid_sizes, reference, offsets, logits)
        return self.output_projection(attended)

    def looking(self, query: Tensor, reference: Tensor, memory: Memory) -> Looking:
        """Where the call with the same arguments looks (Deformable DETR, section 4.1 and appendix A.3)."""
        offsets, logits = self._project(query)
        if reference.shape[-1] == 2:
            sizes = memory.valid_sizes.flip(-1)[:, None, None, :, None].to(offsets.dtype)  # (width, height)
            locations = reference[:, :, None, None, None] + offsets / sizes
        else:
            centre, size = reference[:, :, None, None, None].chunk(2, dim=-1)
            locations = centre + offsets / self.num_points * size * 0.5
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
        return Looking(locations.float(), weights.float(), reference.float())

    def _project(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Sampling offsets [B, Q, H, L, P, 2] and attention logits [B, Q, H, L, P]."""
        shape = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*shape, 2))
        return offsets, self.attention_weights(query).unflatten(-1, shape)


class SelfAttention(nn.Module):
    """Multi-head attention of the queries among themselves; positions enter queries and keys, not values."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query_key_projection = nn.Linear(embed_dim, 2 * embed_dim)
        self.value_projection = nn.Linear(embed_dim, embed_dim)
        self.output_projection = nn.Linear(embed_dim, embed_dim)
        # The published models draw query, key and value projections as one matrix; the bound follows from its shape.
        bound = math.sqrt(6 / (4 * embed_dim))
        nn.init.uniform_(self.query_key_projection.weight, -bound, bound)
        nn.init.uniform_(self.value_projection.weight, -bound, bound)
        nn.init.xavier_uniform_(self.output_projection.weight)
        for projection in (self.query_key_projection, self.value_projection, self.output_projection):
            nn.init.zeros_(projection.bias)

    def forward(self, content: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Attend.

        Args:
            content: [B, Q, embed_dim].
            position: [B, Q, embed_dim].
            mask: [B, 1, Q, Q] bool, True where a query (row) may look at another (column); None allows everything.

        Returns:
            [B, Q, embed_dim].
        """
        heads = (self.num_heads, -1)
        queries, keys = self.query_key_projection(content + position).chunk(2, dim=-1)
        queries = queries.unflatten(-1, heads).transpose(1, 2)
        keys = keys.unflatten(-1, heads).transpose(1, 2)
        values = self.value_projection(content).unflatten(-1, heads).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        return self.output_projection(attended.transpose(1, 2).flatten(-2))
