"""DAB-DETR: queries are boxes that every layer refines, and whose size shapes the attention (arXiv 2201.12329)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.parts.box_decoder import BoxDecoder
from models.parts.heads import PredictionHeads
from models.parts.layers import (
    MLP,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    run_layer,
)
from models.parts.memory import Memory
from models.parts.position_encoding import encode_boxes
from models.parts.single_scale import SingleScaleConfig, SingleScaleDetector
from structures import DetectorOutputs, Images, QueryGroup, Targets


@dataclass(frozen=True, kw_only=True)
class DABDETRConfig(SingleScaleConfig):
    """DAB-DETR; the defaults are the published model."""

    name: Literal["dab_detr"] = "dab_detr"
    dropout: float = 0.0
    """Dropout in both stacks."""

    def build(self, num_classes: int, load_backbone: bool = True) -> DABDETR:
        """Make the model, initialised as published; arguments as in ``DetectorConfig``."""
        return DABDETR(self, num_classes, load_backbone)


class DABDETR(SingleScaleDetector):
    """Learned box queries without content of their own, refined by every decoder layer."""

    config: DABDETRConfig

    def __init__(self, config: DABDETRConfig, num_classes: int, load_backbone: bool = True) -> None:
        super().__init__(config, num_classes, load_backbone)
        dim = config.embed_dim
        self.query_boxes = nn.Embedding(config.num_queries, 4)
        layers = [self.conditional_layer(index == 0) for index in range(config.decoder_layers)]
        self.decoder = ModulatedBoxDecoder(layers, dim)
        self.decoder.gradient_checkpointing = config.gradient_checkpointing
        self.heads = PredictionHeads(dim, num_classes)

    def forward(self, images: Images, targets: Targets | None = None) -> DetectorOutputs:
        """Predict all layers."""
        memory = self.encode(images)
        boxes = self.query_boxes.weight.sigmoid().expand(images.pixels.shape[0], -1, -1)
        content = boxes.new_zeros(*boxes.shape[:2], self.config.embed_dim)
        prediction = self.decoder(content, boxes, memory, [self.heads] * self.config.decoder_layers)
        return DetectorOutputs({"decoder": QueryGroup(prediction)})

    def make_encoder(self, layers: list[EncoderLayer]) -> Encoder:
        """An encoder whose positions are scaled by the content of the pixels."""
        return ScaledPositionEncoder(layers, self.config.embed_dim)

    def feed_forward(self) -> FeedForward:
        """With a PReLU, as published."""
        return FeedForward(self.config.embed_dim, self.config.ffn_dim, self.config.dropout, nn.PReLU())


class ScaledPositionEncoder(Encoder):
    """An encoder in which every pixel's content scales the encoding of its position, in each layer anew."""

    def __init__(self, layers: Sequence[nn.Module], embed_dim: int) -> None:
        super().__init__(layers)
        self.position_scale = MLP(embed_dim, embed_dim, embed_dim, 2)

    def forward(self, memory: Memory) -> Memory:
        """Refine the features of a memory."""
        for layer in self.layers:
            scaled = memory._replace(positions=memory.positions * self.position_scale(memory.features))
            memory = memory._replace(features=run_layer(layer, self.gradient_checkpointing, scaled))
        return memory


class ModulatedBoxDecoder(BoxDecoder):
    """Layers that look for the place of a box, the wider the larger the box is (arXiv 2201.12329, section 4.3)."""

    def __init__(self, layers: Sequence[DecoderLayer], embed_dim: int) -> None:
        super().__init__(layers, embed_dim)
        self.place_scale = MLP(embed_dim, embed_dim, embed_dim, 2)
        self.size_head = MLP(embed_dim, embed_dim, 2, 2)

    def look(self, index: int, content: Tensor, boxes: Tensor, memory: Memory, mask: Tensor | None) -> Tensor:
        """Content [B, Q, embed_dim] of the queries after layer ``index``."""
        dim = content.shape[-1]
        sine = encode_boxes(boxes, dim // 2).to(content.dtype)
        place = sine[..., :dim] if index == 0 else sine[..., :dim] * self.place_scale(content)
        # The first half of the features encodes y, the second x: the expected size over that of the box, in each.
        ratio = self.size_head(content).sigmoid() / boxes[..., 2:]
        place = torch.cat([place[..., : dim // 2] * ratio[..., 1:], place[..., dim // 2 :] * ratio[..., :1]], dim=-1)
        return self.run(index, content, self.position_head(sine), place, memory, mask)
