"""DETR: learned queries, dense attention, a softmax over classes and "no object" (arXiv 2005.12872)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from models.parts.attention import MemoryAttention, SelfAttention
from models.parts.heads import PlainHeads
from models.parts.layers import Decoder, DecoderLayer
from models.parts.position_encoding import SinePositionEncoding
from models.parts.postprocess import best_classes
from models.parts.single_scale import SingleScaleConfig, SingleScaleDetector
from structures import DetectorOutputs, Images, Prediction, QueryGroup, Targets


@dataclass(frozen=True, kw_only=True)
class DETRConfig(SingleScaleConfig):
    """DETR; the defaults are the published model. DC5 is ``backbone: {strides: [16], dilation: true}``."""

    name: Literal["detr"] = "detr"
    num_queries: int = 100
    """Queries of the decoder."""
    position_encoding: SinePositionEncoding = field(default_factory=lambda: SinePositionEncoding(temperature=10000.0))
    """Encoding of pixels in the encoder."""
    detections_per_image: int = 100
    """Detections kept by the post-processing."""

    no_object: ClassVar[bool] = True

    def build(self, num_classes: int, load_backbone: bool = True) -> DETR:
        """Make the model, initialised as published; arguments as in ``DetectorConfig``."""
        return DETR(self, num_classes, load_backbone)


class DETR(SingleScaleDetector):
    """Queries that are learned vectors; every layer predicts boxes afresh."""

    config: DETRConfig

    def __init__(self, config: DETRConfig, num_classes: int, load_backbone: bool = True) -> None:
        super().__init__(config, num_classes, load_backbone)
        dim = config.embed_dim
        self.query_position = nn.Embedding(config.num_queries, dim)
        self.decoder = Decoder([self._decoder_layer() for _ in range(config.decoder_layers)], nn.LayerNorm(dim))
        self.decoder.gradient_checkpointing = config.gradient_checkpointing
        self.heads = PlainHeads(dim, num_classes + 1)

    def forward(self, images: Images, targets: Targets | None = None) -> DetectorOutputs:
        """Predict all layers."""
        memory = self.encode(images)
        position = self.query_position.weight.expand(images.pixels.shape[0], -1, -1)
        content, features = torch.zeros_like(position), []
        for index in range(self.config.decoder_layers):
            content = self.decoder.run(index, content, position, None, memory)
            features.append(self.decoder.norm(content))
        stacked = torch.stack(features)
        prediction = Prediction(self.heads.classify(stacked), self.heads.regress(stacked).sigmoid())
        return DetectorOutputs({"decoder": QueryGroup(prediction)})

    def scores(self, logits: Tensor) -> Tensor:
        """Softmax scores [..., C] of logits [..., C + 1]."""
        return logits.float().softmax(-1)[..., :-1]

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every query is one detection, of its best class."""
        return best_classes(scores, self.config.detections_per_image)

    def _decoder_layer(self) -> DecoderLayer:
        dim, heads, dropout = self.config.embed_dim, self.config.num_heads, self.config.dropout
        attention, cross = SelfAttention(dim, heads, dropout), MemoryAttention(dim, heads, dropout)
        return DecoderLayer(attention, cross, self.feed_forward(), dim, dropout)
