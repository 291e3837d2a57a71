"""DINO: a deformable DETR with query selection, box refinement and contrastive denoising (arXiv 2203.03605)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.parts.backbone import BackboneConfig
from models.parts.box_decoder import Decoder, DecoderLayer
from models.parts.denoising import DenoisingConfig, DenoisingGenerator, DenoisingQueries, attention_mask
from models.parts.encoder import Encoder, EncoderLayer, level_valid_sizes, pixel_centres
from models.parts.heads import PredictionHeads
from models.parts.neck import Neck
from models.parts.position_encoding import SinePositionEncoding
from models.parts.postprocess import postprocess
from models.parts.query_selection import QuerySelection
from structures import Batch, Denoising, Detections, DetectorOutputs, Matches, Prediction

_POSITIVE = (
    *("embed_dim", "num_heads", "num_points", "encoder_layers", "decoder_layers", "ffn_dim"),
    *("num_queries", "detections_per_image"),
)


@dataclass(frozen=True, kw_only=True)
class DINOConfig:
    """DINO; the defaults are the published 4-scale model."""

    name: Literal["dino"] = "dino"
    """Picks this detector."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Feature extractor."""
    num_levels: int = 4
    """Feature levels: those of the backbone and, beyond, stride-2 convolutions on the last of them."""
    embed_dim: int = 256
    """Width of the transformer."""
    num_heads: int = 8
    """Attention heads."""
    num_points: int = 4
    """Sampling points per head and level."""
    encoder_layers: int = 6
    """Encoder layers."""
    decoder_layers: int = 6
    """Decoder layers."""
    ffn_dim: int = 2048
    """Hidden width of the feed-forward blocks."""
    dropout: float = 0.0
    """Dropout in both stacks."""
    num_queries: int = 900
    """Queries that are selected from the encoder's proposals."""
    position_encoding: SinePositionEncoding = field(default_factory=SinePositionEncoding)
    """Encoding of pixels in the encoder."""
    padded_query_positions: bool = False
    """Encode query boxes relative to the padded image, as the published code does; true makes outputs depend on
    padding and is meant for weights that were trained so."""
    proposal_size: float = 0.05
    """Size of the boxes that pixels of the finest level propose from, relative to the image; doubles every level."""
    suppress_invalid_proposals: bool = True
    """Never select padding or border pixels while others are left; false as in the published code."""
    shared_heads: bool = True
    """One class and box head for all decoder layers, or one for each; the encoder always has its own."""
    look_forward_twice: bool = True
    """Let the gradient of a layer's boxes reach the layer before."""
    prediction_eps: float = 1e-3
    """How near to 0 or 1 a box may be when its logit is taken to predict from it (mmdetection: 1e-5). The boxes
    passed from layer to layer always use 1e-3."""
    denoising: DenoisingConfig | None = field(default_factory=DenoisingConfig)
    """Contrastive denoising in training; null switches it off."""
    detections_per_image: int = 300
    """Detections kept by the post-processing."""
    gradient_checkpointing: bool = False
    """Recompute activations of backbone, encoder and decoder in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in _POSITIVE}
        if min(sizes.values()) < 1:
            wrong = ", ".join(f"{name} {size}" for name, size in sizes.items() if size < 1)
            raise ValueError(f"these must be at least 1: {wrong}")
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ValueError(f"embed_dim {self.embed_dim} must be divisible by 4 and by num_heads {self.num_heads}")
        if self.num_levels < len(self.backbone.strides):
            raise ValueError(
                f"num_levels {self.num_levels} is less than the backbone's {len(self.backbone.strides)} strides"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), found {self.dropout}")
        if not 0 < self.proposal_size <= 1:
            raise ValueError(f"proposal_size must lie in (0, 1], found {self.proposal_size}")
        if not 0 < self.prediction_eps < 0.5:
            raise ValueError(f"prediction_eps must lie between 0 and 0.5, found {self.prediction_eps}")

    @property
    def has_encoder_output(self) -> bool:
        """Whether ``DetectorOutputs.encoder`` is supervised beside the decoder's layers."""
        return True

    def build(self, num_classes: int, load_backbone: bool = True) -> DINO:
        """Make the model, initialised as published.

        Args:
            num_classes: rows of the class heads.
            load_backbone: false where a checkpoint follows, so that the pretrained backbone need not be at hand.
        """
        return DINO(self, num_classes, load_backbone)


class EncodedImages(NamedTuple):
    """What the decoder and the query selection read."""

    memory: Tensor
    """[B, S, embed_dim]."""
    spatial_shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level."""
    valid_sizes: Tensor
    """[B, L, 2] unpadded part of each level."""


class DINO(nn.Module):
    """The detector; its parts are attributes named for what they are."""

    def __init__(self, config: DINOConfig, num_classes: int, load_backbone: bool = True) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError("a detector needs at least one class")
        self.config, self.num_classes = config, num_classes
        dim = config.embed_dim
        self.backbone = config.backbone.build(load_backbone)
        self.neck = Neck(self.backbone.channels, dim, config.num_levels)
        self.level_embedding = nn.Parameter(torch.empty(config.num_levels, dim).normal_())
        shape = (dim, config.num_heads, config.num_levels, config.num_points, config.ffn_dim, config.dropout)
        self.encoder = Encoder([EncoderLayer(*shape) for _ in range(config.encoder_layers)])
        self.query_selection = QuerySelection(
            dim, PredictionHeads(dim, num_classes), config.proposal_size, config.suppress_invalid_proposals
        )
        self.query_content = nn.Embedding(config.num_queries, dim)
        layers = [DecoderLayer(*shape) for _ in range(config.decoder_layers)]
        self.decoder = Decoder(
            layers, dim, config.look_forward_twice, config.padded_query_positions, config.prediction_eps
        )
        num_heads = 1 if config.shared_heads else config.decoder_layers
        self.heads = nn.ModuleList(PredictionHeads(dim, num_classes) for _ in range(num_heads))
        self.denoising = None if config.denoising is None else DenoisingGenerator(config.denoising, num_classes, dim)
        if config.gradient_checkpointing:
            self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = True
            self.backbone.set_gradient_checkpointing(True)

    def forward(self, batch: Batch) -> DetectorOutputs:
        """Predict all layers; in training, the noised targets too."""
        encoded = self.encode(batch.images, batch.image_sizes)
        selected = self.query_selection(*encoded, num_queries=self.config.num_queries)
        boxes = selected.prediction.boxes.detach()
        content = self.query_content.weight[: boxes.shape[1]].expand(boxes.shape[0], -1, -1)
        denoising, mask = None, None
        if self.training and self.denoising is not None:
            denoising = self.denoising(batch.targets, batch.seeds, self.config.decoder_layers)
            mask = attention_mask(denoising.groups, boxes.shape[1])
            content = torch.cat([denoising.content, content.to(denoising.content.dtype)], dim=1)
            boxes = torch.cat([denoising.boxes, boxes], dim=1)
            # Without any target the label embedding takes no part; every rank must have the same graph all the same.
            content = content + self.denoising.label_embedding.weight.sum() * 0
        heads = [self.heads[i % len(self.heads)] for i in range(self.config.decoder_layers)]
        prediction = self.decoder(content, boxes, *encoded, mask=mask, heads=heads)
        if denoising is None:
            return DetectorOutputs(prediction, selected.prediction, None)
        own, noised = _split(prediction, denoising.boxes.shape[1])
        return DetectorOutputs(own, selected.prediction, _denoising_outputs(noised, denoising))

    def encode(self, images: Tensor, image_sizes: Tensor) -> EncodedImages:
        """Backbone, neck and encoder.

        Args:
            images: [B, 3, H, W], padded right and at the bottom.
            image_sizes: [B, 2] (height, width) before padding.
        """
        levels = self.neck(self.backbone(images))
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in levels)
        valid_sizes = level_valid_sizes(image_sizes, (images.shape[-2], images.shape[-1]), shapes)
        return self.encode_levels(levels, valid_sizes)

    def encode_levels(self, levels: list[Tensor], valid_sizes: Tensor) -> EncodedImages:
        """The encoder alone: from maps [B, embed_dim, h, w] on, nothing depends on what lies in the padding."""
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in levels)
        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        encodings = [
            self.config.position_encoding(shape, valid_sizes[:, i], self.config.embed_dim) + self.level_embedding[i]
            for i, shape in enumerate(shapes)
        ]
        position = torch.cat(encodings, dim=1).to(memory.dtype)
        reference = pixel_centres(shapes, valid_sizes)
        memory = self.encoder(memory, position, reference, shapes, valid_sizes)
        return EncodedImages(memory, shapes, valid_sizes)

    def postprocess(self, outputs: DetectorOutputs, original_sizes: Tensor) -> list[Detections]:
        """Detections of the last layer, in pixels of the original images."""
        last = Prediction(outputs.decoder.logits[-1], outputs.decoder.boxes[-1])
        return postprocess(last, original_sizes, self.config.detections_per_image)


def _split(prediction: Prediction, at: int) -> tuple[Prediction, Prediction]:
    """(matching queries, denoising queries), where the latter come first."""
    logits, boxes = prediction
    return Prediction(logits[:, :, at:], boxes[:, :, at:]), Prediction(logits[:, :, :at], boxes[:, :, :at])


def _denoising_outputs(prediction: Prediction, queries: DenoisingQueries) -> Denoising:
    return Denoising(prediction, Matches(*queries.matches), queries.num_groups, queries.valid)
