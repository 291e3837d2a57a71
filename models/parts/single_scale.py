"""Detectors on the features of one scale: from pixels to a memory by dense self-attention."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from models.detector import Detector, DetectorConfig
from models.parts.attention import ConditionalAttention, ConditionalSelfAttention, MemoryAttention
from models.parts.backbone import BackboneConfig
from models.parts.layers import ConditionalDecoderLayer, Encoder, EncoderLayer, FeedForward
from models.parts.memory import Memory, level_valid_sizes, pixel_centres
from structures import Images


@dataclass(frozen=True, kw_only=True)
class SingleScaleConfig(DetectorConfig):
    """What detectors with dense attention have in common."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(strides=(32,)))
    """Feature extractor; its one level is attended to."""
    dropout: float = 0.1
    """Dropout in both stacks."""
    num_queries: int = 300
    """Queries of the decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.backbone.strides) != 1:
            found = list(self.backbone.strides)
            raise ValueError(f"model.backbone.strides: {self.name} looks at one level, such as [32], found {found}")


class SingleScaleDetector(Detector):
    """Backbone, projection and encoder; a subclass adds what becomes of the memory."""

    config: SingleScaleConfig

    def __init__(self, config: SingleScaleConfig, num_classes: int, load_backbone: bool) -> None:
        super().__init__(config, num_classes, load_backbone)
        self.input_projection = nn.Conv2d(self.backbone.channels[-1], config.embed_dim, 1)
        self.encoder = self.make_encoder([self._encoder_layer() for _ in range(config.encoder_layers)])
        self.encoder.gradient_checkpointing = config.gradient_checkpointing

    def encode(self, images: Images) -> Memory:
        """Backbone, projection and encoder."""
        features = self.input_projection(self.backbone(images.pixels)[0])
        shape, padded = (features.shape[-2], features.shape[-1]), (images.pixels.shape[-2], images.pixels.shape[-1])
        return self.encode_levels([features], level_valid_sizes(images.sizes, padded, (shape,)))

    def encode_levels(self, levels: list[Tensor], valid_sizes: Tensor) -> Memory:
        """The encoder alone: from a map [B, embed_dim, h, w] on, nothing depends on what lies in the padding."""
        (features,) = levels
        shape = (features.shape[-2], features.shape[-1])
        positions = self.config.position_encoding((shape,), valid_sizes, self.config.embed_dim).to(features.dtype)
        centres = pixel_centres((shape,), valid_sizes)
        return self.encoder(Memory(features.flatten(2).transpose(1, 2), positions, centres, (shape,), valid_sizes))

    def make_encoder(self, layers: list[EncoderLayer]) -> Encoder:
        """The stack of these layers."""
        return Encoder(layers)

    def feed_forward(self) -> FeedForward:
        """The feed-forward block of a layer."""
        return FeedForward(self.config.embed_dim, self.config.ffn_dim, self.config.dropout)

    def conditional_layer(self, is_first: bool) -> ConditionalDecoderLayer:
        """A layer of queries that look at each other, and at the memory by content and by place."""
        dim, heads, dropout = self.config.embed_dim, self.config.num_heads, self.config.dropout
        attention = ConditionalSelfAttention(dim, heads, dropout)
        cross = ConditionalAttention(dim, heads, dropout, is_first)
        return ConditionalDecoderLayer(attention, cross, self.feed_forward(), dim, dropout)

    def _encoder_layer(self) -> EncoderLayer:
        dim, dropout = self.config.embed_dim, self.config.dropout
        attention = MemoryAttention(dim, self.config.num_heads, dropout)
        return EncoderLayer(attention, self.feed_forward(), dim, dropout)
