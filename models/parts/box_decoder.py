"""The decoder: queries conditioned on boxes that every layer refines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.parts.attention import MLP, DeformableAttention, FeedForward, SelfAttention
from models.parts.heads import PredictionHeads, refine_boxes
from models.parts.position_encoding import encode_boxes
from structures import Prediction


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable cross-attention, feed-forward (arXiv 2010.04159)."""

    def __init__(
        self, embed_dim: int, num_heads: int, num_levels: int, num_points: int, ffn_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attention = SelfAttention(embed_dim, num_heads, dropout)
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = DeformableAttention(embed_dim, num_heads, num_levels, num_points)
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = FeedForward(embed_dim, ffn_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        boxes: Tensor,
        memory: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        valid_sizes: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """content [B, Q, embed_dim] → [B, Q, embed_dim]; the other arguments as in :class:`Decoder`."""
        content = self.self_norm(content + self.dropout(self.self_attention(content, position, mask)))
        attended = self.cross_attention(content + position, boxes, memory, spatial_shapes, valid_sizes)
        return self.feed_forward(self.cross_norm(content + self.dropout(attended)))


class Decoder(nn.Module):
    """A stack of decoder layers with iterative box refinement, looking forward twice (DINO, arXiv 2203.03605)."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        embed_dim: int,
        look_forward_twice: bool,
        padded_query_positions: bool,
        prediction_eps: float = 1e-3,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_dim)
        self.position_head = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        for layer in self.position_head.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
        self.embed_dim = embed_dim
        self.look_forward_twice = look_forward_twice
        self.padded_query_positions = padded_query_positions
        self.prediction_eps = prediction_eps
        self.gradient_checkpointing = False

    def forward(
        self,
        content: Tensor,
        boxes: Tensor,
        memory: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        valid_sizes: Tensor,
        mask: Tensor | None,
        heads: Sequence[PredictionHeads],
    ) -> Prediction:
        """Predict from every layer.

        Args:
            content: [B, Q, embed_dim] content of the queries.
            boxes: [B, Q, 4] initial cxcywh boxes in (0, 1), without gradient.
            memory: [B, S, embed_dim] encoder output.
            spatial_shapes: (height, width) of each level.
            valid_sizes: [B, L, 2] unpadded (height, width) of each level.
            mask: [B, 1, Q, Q] bool, True where a query (row) may look at another; None allows everything.
            heads: class and box heads of each layer (the same object where they are shared).

        Returns:
            Logits [L, B, Q, C] and boxes [L, B, Q, 4] of all layers, float32.
        """
        logits, predicted = [], []
        previous = boxes  # with the gradient of the layer before, for look-forward-twice
        for layer, head in zip(self.layers, heads, strict=True):
            position = self.position_head(encode_boxes(self._seen(boxes, spatial_shapes, valid_sizes), self._channels))
            arguments = (content, position.to(content.dtype), boxes, memory, spatial_shapes, valid_sizes, mask)
            if self.gradient_checkpointing and self.training:
                content = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                content = layer(*arguments)
            normalised = self.norm(content)
            logits.append(head.classify(normalised))
            predicted.append(refine_boxes(previous, head.regress(normalised), self.prediction_eps))
            # The published models refine with the features before the last normalisation, but predict with those
            # after it; with weights trained that way it makes a difference.
            refined = refine_boxes(boxes, head.regress(content))
            boxes = refined.detach()
            previous = refined if self.look_forward_twice else boxes
        return Prediction(torch.stack(logits), torch.stack(predicted))

    @property
    def _channels(self) -> int:
        return self.embed_dim // 2

    def _seen(self, boxes: Tensor, spatial_shapes: Sequence[tuple[int, int]], valid_sizes: Tensor) -> Tensor:
        """Boxes as the position encoding sees them."""
        if not self.padded_query_positions:
            return boxes
        height, width = spatial_shapes[0]
        rows, columns = valid_sizes[:, 0].float().unbind(-1)
        ratios = torch.stack([columns / width, rows / height], dim=-1).repeat(1, 2)
        return boxes * ratios[:, None]
