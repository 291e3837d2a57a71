"""Layers of encoder and decoder around whatever attention they are given, and the blocks inside them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.parts.memory import Memory


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        sizes = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))

    def forward(self, features: Tensor) -> Tensor:
        """[..., input_dim] → [..., output_dim]."""
        shape, features = features.shape[:-1], features.flatten(0, -2)  # in rows: what follows in place is no view
        for layer in self.layers[:-1]:
            features = F.relu_(layer(features))
        return self.layers[-1](features).view(*shape, -1)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them (ReLU unless another is given), residual, normalised after."""

    def __init__(
        self, embed_dim: int, hidden_dim: int, dropout: float = 0.0, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.expand = nn.Linear(embed_dim, hidden_dim)
        self.contract = nn.Linear(hidden_dim, embed_dim)
        self.activation = nn.ReLU(inplace=True) if activation is None else activation
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.expand, self.contract):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, features: Tensor) -> Tensor:
        """[..., embed_dim] → [..., embed_dim]."""
        # In rows, so that what follows in place is no view; a linear layer's gradients do not need its output.
        hidden = self.dropout(self.activation(self.expand(features.flatten(0, -2))))
        return self.norm(features + self.dropout(self.contract(hidden)).view_as(features))


class EncoderLayer(nn.Module):
    """Self-attention of pixels and feed-forward, normalised after each (arXiv 2005.12872, 2010.04159)."""

    def __init__(self, attention: nn.Module, feed_forward: FeedForward, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(embed_dim)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, memory: Memory) -> Tensor:
        """Features [B, S, embed_dim] of a memory → [B, S, embed_dim]."""
        attended = self.attention(memory.features + memory.positions, memory.centres, memory)
        return self.feed_forward(self.norm(memory.features + self.dropout(attended)))


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.gradient_checkpointing = False

    def forward(self, memory: Memory) -> Memory:
        """Refine the features of a memory."""
        for layer in self.layers:
            memory = memory._replace(features=run_layer(layer, self.gradient_checkpointing, memory))
        return memory


class DecoderLayer(nn.Module):
    """Self-attention of queries, cross-attention to the memory, feed-forward, normalised after each."""

    def __init__(
        self,
        self_attention: nn.Module,
        cross_attention: nn.Module,
        feed_forward: FeedForward,
        embed_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = cross_attention
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, content: Tensor, position: Tensor, reference: Tensor | None, memory: Memory, mask: Tensor | None = None
    ) -> Tensor:
        """Let the queries look at each other and at the memory.

        Args:
            content: [B, Q, embed_dim] of the queries.
            position: [B, Q, embed_dim] encoding of their positions.
            reference: [B, Q, 2] points or [B, Q, 4] cxcywh boxes, relative to the unpadded image, around which a
                deformable cross-attention samples; a dense one needs none.
            memory: encoder output.
            mask: [B, 1, Q, Q] bool, True where a query (row) may look at another; None allows everything.

        Returns:
            [B, Q, embed_dim].
        """
        content = self.self_norm(content + self.dropout(self.self_attention(content, position, mask)))
        attended = self.cross_attention(content + position, reference, memory)
        return self.feed_forward(self.cross_norm(content + self.dropout(attended)))


class ConditionalDecoderLayer(DecoderLayer):
    """A decoder layer whose cross-attention is given content and place apart (Conditional DETR, arXiv 2108.06152)."""

    def forward(
        self, content: Tensor, position: Tensor, place: Tensor | None, memory: Memory, mask: Tensor | None = None
    ) -> Tensor:
        """Arguments as in :class:`DecoderLayer`, but ``place`` [B, Q, embed_dim]: sine features of where to look."""
        content = self.self_norm(content + self.dropout(self.self_attention(content, position, mask)))
        attended = self.cross_attention(content, position, place, memory)
        return self.feed_forward(self.cross_norm(content + self.dropout(attended)))


class Decoder(nn.Module):
    """Decoder layers, and the normalisation of what is predicted from; detectors go through the layers themselves."""

    def __init__(self, layers: Sequence[DecoderLayer], norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.gradient_checkpointing = False

    def run(self, index: int, *arguments: Any) -> Tensor:
        """Content [B, Q, embed_dim] after layer ``index``, whose call takes the arguments."""
        return run_layer(self.layers[index], self.gradient_checkpointing, *arguments)


def run_layer(layer: Callable[..., Tensor], recompute: bool, *arguments: Any) -> Tensor:
    """Call a layer; where ``recompute`` and gradients are wanted, its activations are made again in the backward."""
    if recompute and torch.is_grad_enabled():
        result: Tensor = checkpoint(layer, *arguments, use_reentrant=False)
        return result
    return layer(*arguments)
