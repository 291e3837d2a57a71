"""The attention blocks of encoder and decoder: deformable, dense, and dense by content and by place apart."""

from __future__ import annotations

import math
from typing import Any

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
        draw_as_one(self.query_key_projection, self.value_projection)
        draw_alone(self.output_projection)

    def forward(self, content: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Attend.

        Args:
            content: [B, Q, embed_dim].
            position: [B, Q, embed_dim].
            mask: [B, 1, Q, Q] bool, True where a query (row) may look at another (column); None allows everything.

        Returns:
            [B, Q, embed_dim].
        """
        queries, keys = self.query_key_projection(content + position).chunk(2, dim=-1)
        return self.output_projection(_attend(self, queries, keys, self.value_projection(content), mask))


class MemoryAttention(nn.Module):
    """Dense attention of queries (or of the pixels themselves) to all pixels of the memory but its padding."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query_projection = nn.Linear(embed_dim, embed_dim)
        self.key_projection = nn.Linear(embed_dim, embed_dim)
        self.value_projection = nn.Linear(embed_dim, embed_dim)
        self.output_projection = nn.Linear(embed_dim, embed_dim)
        draw_as_one(self.query_projection, self.key_projection, self.value_projection)
        draw_alone(self.output_projection)

    def forward(self, query: Tensor, reference: Tensor | None, memory: Memory) -> Tensor:
        """Attend from every query [B, Q, embed_dim], position encoding included; no reference is needed."""
        queries, keys = self._project(query, memory)
        values = self.value_projection(memory.features)
        return self.output_projection(_attend(self, queries, keys, values, _pixels_inside(memory)))

    def looking(self, query: Tensor, reference: Tensor | None, memory: Memory) -> Looking:
        """Where the call with the same arguments looks: at the centres of all pixels."""
        return _look(self, *self._project(query, memory), memory, reference)

    def _project(self, query: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Queries and keys."""
        return self.query_projection(query), self.key_projection(memory.features + memory.positions)


class ConditionalSelfAttention(nn.Module):
    """Attention of the queries among themselves; content and position are projected apart (arXiv 2108.06152)."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.content_projection = nn.Linear(embed_dim, 2 * embed_dim)
        self.position_projection = nn.Linear(embed_dim, 2 * embed_dim)
        self.value_projection = nn.Linear(embed_dim, embed_dim)
        self.output_projection = nn.Linear(embed_dim, embed_dim)
        for projection in (self.content_projection, self.position_projection):
            draw_apart(projection)
        draw_alone(self.value_projection, self.output_projection)

    def forward(self, content: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Attend; arguments as in :class:`SelfAttention`."""
        queries, keys = (self.content_projection(content) + self.position_projection(position)).chunk(2, dim=-1)
        return self.output_projection(_attend(self, queries, keys, self.value_projection(content), mask))


class ConditionalAttention(nn.Module):
    """Dense attention in which content meets content and place meets place (Conditional DETR, arXiv 2108.06152).

    Each head's query and key are two halves, of which the second is about the place alone. In the first layer, whose
    queries have no content yet, positions are added to the first halves too.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float, is_first: bool) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.content_projection = nn.Linear(embed_dim, embed_dim)
        self.position_projection = nn.Linear(embed_dim, embed_dim) if is_first else None
        self.place_projection = nn.Linear(embed_dim, embed_dim)
        self.key_content_projection = nn.Linear(embed_dim, embed_dim)
        self.key_place_projection = nn.Linear(embed_dim, embed_dim)
        self.value_projection = nn.Linear(embed_dim, embed_dim)
        self.output_projection = nn.Linear(embed_dim, embed_dim)
        draw_alone(*(child for child in self.children() if isinstance(child, nn.Linear)))

    def forward(self, content: Tensor, position: Tensor, place: Tensor, memory: Memory) -> Tensor:
        """Attend.

        Args:
            content: [B, Q, embed_dim] of the queries.
            position: [B, Q, embed_dim] encoding of their positions, which only the first layer uses.
            place: [B, Q, embed_dim] sine features of where to look.
            memory: what is attended to.

        Returns:
            [B, Q, embed_dim].
        """
        queries, keys = self._project(content, position, place, memory)
        values = self.value_projection(memory.features)
        return self.output_projection(_attend(self, queries, keys, values, _pixels_inside(memory)))

    def looking(self, content: Tensor, position: Tensor, place: Tensor, memory: Memory) -> Looking:
        """Where the call with the same arguments looks: at the centres of all pixels."""
        return _look(self, *self._project(content, position, place, memory), memory, None)

    def _project(self, content: Tensor, position: Tensor, place: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Queries [B, Q, 2·embed_dim] and keys [B, S, 2·embed_dim], the halves side by side in each head."""
        queries, keys = self.content_projection(content), self.key_content_projection(memory.features)
        key_place = self.key_place_projection(memory.positions)
        if self.position_projection is not None:
            queries, keys = queries + self.position_projection(position), keys + key_place
        return self._side_by_side(queries, self.place_projection(place)), self._side_by_side(keys, key_place)

    def _side_by_side(self, first: Tensor, second: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        return torch.cat([first.unflatten(-1, heads), second.unflatten(-1, heads)], dim=-1).flatten(-2)


def _attend(module: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """[B, Q, values' width]: scaled dot-product attention in heads; ``mask`` is True where a row may look."""
    q, k, v = (part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in (queries, keys, values))
    dropout = module.dropout if module.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(-2)


def as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask, True where a row may look, as numbers to be added to attention logits: once instead of in every layer."""
    if mask is None:
        return None
    return torch.full(mask.shape, -torch.inf, dtype=dtype, device=mask.device).masked_fill_(mask, 0)


def _pixels_inside(memory: Memory) -> Tensor:
    """[B, 1, 1, S] bool, False where a pixel is padding."""
    return memory.inside[:, None, None]


def _look(module: Any, queries: Tensor, keys: Tensor, memory: Memory, reference: Tensor | None) -> Looking:
    queries, keys = (part.float().unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in (queries, keys))
    logits = queries @ keys.mT * queries.shape[-1] ** -0.5
    weights = logits.masked_fill(~_pixels_inside(memory), -math.inf).softmax(-1).transpose(1, 2)[..., None, :]
    locations = memory.centres[:, None, None, None].expand(*weights.shape, 2)
    return Looking(locations, weights, None if reference is None else reference.float())


def draw_as_one(*projections: nn.Linear) -> None:
    """Initialise projections as parts of one Xavier matrix of queries, keys and values, as published; biases 0.

    The bound follows from the shape of the whole matrix, [3·embed_dim, embed_dim].
    """
    bound = math.sqrt(6 / (4 * projections[0].in_features))
    for projection in projections:
        nn.init.uniform_(projection.weight, -bound, bound)
        nn.init.zeros_(projection.bias)


def draw_alone(*projections: nn.Linear) -> None:
    """Initialise projections by Xavier, each by itself; biases 0."""
    for projection in projections:
        nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(projection.bias)


def draw_apart(projection: nn.Linear) -> None:
    """Initialise the two square halves of a projection by Xavier, each by itself; biases 0."""
    for half in projection.weight.data.chunk(2):
        nn.init.xavier_uniform_(half)
    nn.init.zeros_(projection.bias)
