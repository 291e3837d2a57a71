"""Conditional DETR: where a query looks is told apart from what it looks for (arXiv 2108.06152)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from models.parts.heads import PredictionHeads, refine_boxes
from models.parts.layers import MLP, Decoder
from models.parts.position_encoding import SinePositionEncoding, encode_boxes
from models.parts.single_scale import SingleScaleConfig, SingleScaleDetector
from structures import DetectorOutputs, Images, Prediction, QueryGroup, Targets


@dataclass(frozen=True, kw_only=True)
class ConditionalDETRConfig(SingleScaleConfig):
    """Conditional DETR; the defaults are the published model."""

    name: Literal["conditional_detr"] = "conditional_detr"
    position_encoding: SinePositionEncoding = field(default_factory=lambda: SinePositionEncoding(temperature=10000.0))
    """Encoding of pixels in the encoder."""
    detections_per_image: int = 100
    """Detections kept by the post-processing."""

    def build(self, num_classes: int, load_backbone: bool = True) -> ConditionalDETR:
        """Make the model, initialised as published; arguments as in ``DetectorConfig``."""
        return ConditionalDETR(self, num_classes, load_backbone)


class ConditionalDETR(SingleScaleDetector):
    """Queries with a learned point each, from which all layers predict boxes."""

    config: ConditionalDETRConfig

    def __init__(self, config: ConditionalDETRConfig, num_classes: int, load_backbone: bool = True) -> None:
        super().__init__(config, num_classes, load_backbone)
        dim = config.embed_dim
        self.query_position = nn.Embedding(config.num_queries, dim)
        self.point_head = MLP(dim, dim, 2, 2)
        self.place_scale = MLP(dim, dim, dim, 2)
        layers = [self.conditional_layer(index == 0) for index in range(config.decoder_layers)]
        self.decoder = Decoder(layers, nn.LayerNorm(dim))
        self.decoder.gradient_checkpointing = config.gradient_checkpointing
        self.heads = PredictionHeads(dim, num_classes)

    def forward(self, images: Images, targets: Targets | None = None) -> DetectorOutputs:
        """Predict all layers."""
        memory = self.encode(images)
        position = self.query_position.weight.expand(images.pixels.shape[0], -1, -1)
        points = self.point_head(position).float().sigmoid()
        sine = encode_boxes(points, self.config.embed_dim // 2).to(position.dtype)
        content, features = torch.zeros_like(position), []
        for index in range(self.config.decoder_layers):
            place = sine if index == 0 else sine * self.place_scale(content)
            content = self.decoder.run(index, content, position, place, memory)
            features.append(self.decoder.norm(content))
        stacked = torch.stack(features)
        boxes = refine_boxes(points, self.heads.regress(stacked), eps=1e-5)
        return DetectorOutputs({"decoder": QueryGroup(Prediction(self.heads.classify(stacked), boxes))})
