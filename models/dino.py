"""DINO: a deformable DETR with query selection, box refinement and contrastive denoising (arXiv 2203.03605)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from models.parts.box_decoder import BoxDecoder
from models.parts.denoising import DenoisingConfig, DenoisingGenerator, attention_mask
from models.parts.heads import PredictionHeads
from models.parts.multi_scale import MultiScaleConfig, MultiScaleDetector
from structures import DetectorOutputs, Images, QueryGroup, Targets


@dataclass(frozen=True, kw_only=True)
class DINOConfig(MultiScaleConfig):
    """DINO; the defaults are the published 4-scale model."""

    name: Literal["dino"] = "dino"
    shared_heads: bool = True
    """One class and box head for all decoder layers, or one for each; the encoder always has its own."""
    look_forward_twice: bool = True
    """Let the gradient of a layer's boxes reach the layer before."""
    denoising: DenoisingConfig | None = field(default_factory=DenoisingConfig)
    """Contrastive denoising in training; null switches it off."""

    @property
    def matched_layers(self) -> dict[str, int]:
        """The encoder's proposals and the decoder's layers."""
        return {"encoder": 1, "decoder": self.decoder_layers}

    @property
    def given_groups(self) -> tuple[str, ...]:
        """The noised targets."""
        return () if self.denoising is None else ("denoising",)

    def build(self, num_classes: int, load_backbone: bool = True) -> DINO:
        """Make the model, initialised as published; arguments as in ``DetectorConfig``."""
        return DINO(self, num_classes, load_backbone)


class DINO(MultiScaleDetector):
    """Box queries that are selected from the encoder's proposals, refined by every decoder layer."""

    config: DINOConfig

    def __init__(self, config: DINOConfig, num_classes: int, load_backbone: bool = True) -> None:
        super().__init__(config, num_classes, load_backbone)
        dim = config.embed_dim
        self.query_selection = self.make_query_selection(num_classes)
        self.query_content = nn.Embedding(config.num_queries, dim)
        nn.init.xavier_uniform_(self.query_content.weight)
        layers = [self.decoder_layer() for _ in range(config.decoder_layers)]
        self.decoder = BoxDecoder(layers, dim, config.look_forward_twice, config.published)
        self.decoder.gradient_checkpointing = config.gradient_checkpointing
        num_heads = 1 if config.shared_heads else config.decoder_layers
        self.heads = nn.ModuleList(PredictionHeads(dim, num_classes) for _ in range(num_heads))
        self.denoising = None if config.denoising is None else DenoisingGenerator(config.denoising, num_classes, dim)

    def forward(self, images: Images, targets: Targets | None = None) -> DetectorOutputs:
        """Predict all layers; in training, the noised targets too."""
        memory = self.encode(images)
        proposals = self.query_selection(memory, self.config.num_queries)
        groups = {"encoder": QueryGroup(proposals)}
        boxes = proposals.boxes[0].detach()
        content = self.query_content.weight[: boxes.shape[1]].expand(boxes.shape[0], -1, -1)
        noised, mask = None, None
        if self.training and self.denoising is not None and targets is not None:
            noised = self.denoising(targets, self.config.decoder_layers)
            mask = attention_mask(noised.groups, boxes.shape[1])
            content, boxes = noised.before(content, boxes)
        heads = [self.heads[i % len(self.heads)] for i in range(self.config.decoder_layers)]
        prediction = self.decoder(content, boxes, memory, heads, mask)
        if noised is None:
            return DetectorOutputs({**groups, "decoder": QueryGroup(prediction)})
        denoising, prediction = noised.split(prediction)
        return DetectorOutputs({**groups, "decoder": QueryGroup(prediction), "denoising": denoising})
