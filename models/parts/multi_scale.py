"""Detectors on features of several scales: from pixels to a memory by deformable self-attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.detector import Detector, DetectorConfig
from models.parts.attention import DeformableAttention, SelfAttention
from models.parts.heads import PredictionHeads
from models.parts.layers import DecoderLayer, Encoder, EncoderLayer, FeedForward
from models.parts.memory import Memory, level_valid_sizes, pixel_centres
from models.parts.neck import Neck
from models.parts.query_selection import QuerySelection
from structures import Images


@dataclass(frozen=True, kw_only=True)
class PublishedDetails:
    """How published code computes: for weights that it trained, or to train exactly as it does."""

    padded_query_positions: bool = False
    """Encode query boxes relative to the padded image; true makes outputs depend on padding."""
    suppress_invalid_proposals: bool = True
    """Never select padding or border pixels while others are left; false as in the published code."""
    prediction_eps: float = 1e-3
    """How near to 0 or 1 a box may be when its logit is taken to predict from it (mmdetection: 1e-5). The boxes
    passed from layer to layer always use 1e-3."""

    def __post_init__(self) -> None:
        if not 0 < self.prediction_eps < 0.5:
            raise ValueError(f"prediction_eps must lie between 0 and 0.5, found {self.prediction_eps}")


@dataclass(frozen=True, kw_only=True)
class MultiScaleConfig(DetectorConfig):
    """What detectors with deformable attention have in common."""

    num_levels: int = 4
    """Feature levels: those of the backbone and, beyond, stride-2 convolutions on the last of them."""
    num_points: int = 4
    """Sampling points per head and level."""
    proposal_size: float = 0.05
    """Size of the boxes that pixels of the finest level propose from, relative to the image; doubles every level."""
    published: PublishedDetails = field(default_factory=PublishedDetails)
    """Details of published code, for its weights or to train as it does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_points")
        if self.num_levels < len(self.backbone.strides):
            raise ValueError(
                f"num_levels {self.num_levels} is less than the backbone's {len(self.backbone.strides)} strides"
            )
        if not 0 < self.proposal_size <= 1:
            raise ValueError(f"proposal_size must lie in (0, 1], found {self.proposal_size}")


class MultiScaleDetector(Detector):
    """Backbone, neck and encoder; a subclass adds what becomes of the memory."""

    config: MultiScaleConfig

    def __init__(self, config: MultiScaleConfig, num_classes: int, load_backbone: bool) -> None:
        super().__init__(config, num_classes, load_backbone)
        self.neck = Neck(self.backbone.channels, config.embed_dim, config.num_levels)
        self.level_embedding = nn.Parameter(torch.empty(config.num_levels, config.embed_dim).normal_())
        self.encoder = Encoder([self._encoder_layer() for _ in range(config.encoder_layers)])
        self.encoder.gradient_checkpointing = config.gradient_checkpointing

    def encode(self, images: Images) -> Memory:
        """Backbone, neck and encoder."""
        levels = self.neck(self.backbone(images.pixels))
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in levels)
        height, width = images.pixels.shape[-2:]
        return self.encode_levels(levels, level_valid_sizes(images.sizes, (height, width), shapes))

    def encode_levels(self, levels: list[Tensor], valid_sizes: Tensor) -> Memory:
        """The encoder alone: from maps [B, embed_dim, h, w] on, nothing depends on what lies in the padding."""
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in levels)
        features = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        embeddings = [own.expand(h * w, -1) for own, (h, w) in zip(self.level_embedding, shapes, strict=True)]
        encoded = self.config.position_encoding(shapes, valid_sizes, self.config.embed_dim)
        positions = (encoded + torch.cat(embeddings)).to(features.dtype)
        return self.encoder(Memory(features, positions, pixel_centres(shapes, valid_sizes), shapes, valid_sizes))

    def decoder_layer(self) -> DecoderLayer:
        """A layer of queries that look at each other and, by deformable attention, at the memory."""
        dim, dropout = self.config.embed_dim, self.config.dropout
        attention = SelfAttention(dim, self.config.num_heads, dropout)
        return DecoderLayer(attention, self._deformable(), self._feed_forward(), dim, dropout)

    def make_query_selection(self, num_logits: int) -> QuerySelection:
        """The choice of queries among the encoder's proposals, by this many class logits."""
        config = self.config
        heads = PredictionHeads(config.embed_dim, num_logits)
        return QuerySelection(
            config.embed_dim, heads, config.proposal_size, config.published.suppress_invalid_proposals
        )

    def _encoder_layer(self) -> EncoderLayer:
        return EncoderLayer(self._deformable(), self._feed_forward(), self.config.embed_dim, self.config.dropout)

    def _deformable(self) -> DeformableAttention:
        config = self.config
        return DeformableAttention(config.embed_dim, config.num_heads, config.num_levels, config.num_points)

    def _feed_forward(self) -> FeedForward:
        return FeedForward(self.config.embed_dim, self.config.ffn_dim, self.config.dropout)
