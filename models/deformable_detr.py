"""Deformable DETR: plain, with iterative box refinement, or with queries from the encoder (arXiv 2010.04159)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from models.parts.attention import draw_alone
from models.parts.heads import PredictionHeads, refine_boxes
from models.parts.layers import Decoder
from models.parts.memory import Memory
from models.parts.multi_scale import MultiScaleConfig, MultiScaleDetector
from models.parts.position_encoding import SinePositionEncoding
from models.parts.query_selection import PositionFromBoxes
from structures import DetectorOutputs, Images, Prediction, QueryGroup, Targets

EPS = 1e-5
"""How near to 0 or 1 a reference may be when its logit is taken, as published."""


@dataclass(frozen=True, kw_only=True)
class DeformableDETRConfig(MultiScaleConfig):
    """Deformable DETR; the defaults are the published model without the two options."""

    name: Literal["deformable_detr"] = "deformable_detr"
    ffn_dim: int = 1024
    """Hidden width of the feed-forward blocks."""
    dropout: float = 0.1
    """Dropout in both stacks."""
    num_queries: int = 300
    """Queries of the decoder."""
    position_encoding: SinePositionEncoding = field(
        default_factory=lambda: SinePositionEncoding(temperature=10000.0, offset=-0.5)
    )
    """Encoding of pixels in the encoder."""
    detections_per_image: int = 100
    """Detections kept by the post-processing."""
    box_refinement: bool = False
    """Let every layer refine the boxes of the layer before, with heads of its own."""
    look_forward_twice: bool = False
    """Let the gradient of a layer's boxes reach the layer before."""
    two_stage: bool = False
    """Take the queries from the encoder's best proposals; needs ``box_refinement``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_stage and not self.box_refinement:
            raise ValueError("two_stage needs box_refinement: true")

    @property
    def matched_layers(self) -> dict[str, int]:
        """The encoder's proposals, if they become queries, and the decoder's layers."""
        encoder = {"encoder": 1} if self.two_stage else {}
        return {**encoder, "decoder": self.decoder_layers}

    def build(self, num_classes: int, load_backbone: bool = True) -> DeformableDETR:
        """Make the model, initialised as published; arguments as in ``DetectorConfig``."""
        return DeformableDETR(self, num_classes, load_backbone)


class DeformableDETR(MultiScaleDetector):
    """Queries that sample the memory around a point, or around the box of the layer before."""

    config: DeformableDETRConfig
    query_position: nn.Embedding
    query_content: nn.Embedding

    def __init__(self, config: DeformableDETRConfig, num_classes: int, load_backbone: bool = True) -> None:
        super().__init__(config, num_classes, load_backbone)
        dim = config.embed_dim
        self.decoder = Decoder([self.decoder_layer() for _ in range(config.decoder_layers)], nn.Identity())
        self.decoder.gradient_checkpointing = config.gradient_checkpointing
        count = config.decoder_layers if config.box_refinement else 1
        # Points start with boxes of about a tenth of the image.
        sizes = [0.0 if config.two_stage or i else -2.0 for i in range(count)]
        self.heads = nn.ModuleList(PredictionHeads(dim, num_classes, log_size=size) for size in sizes)
        if config.two_stage:
            # The proposals are about whether there is an object, not which.
            self.query_selection = self.make_query_selection(1)
            self.query_from_box = PositionFromBoxes(dim)
        else:
            self.query_position = nn.Embedding(config.num_queries, dim)
            self.query_content = nn.Embedding(config.num_queries, dim)
            self.point_head = nn.Linear(dim, 2)
            draw_alone(self.point_head)

    def forward(self, images: Images, targets: Targets | None = None) -> DetectorOutputs:
        """Predict all layers."""
        memory = self.encode(images)
        if not self.config.two_stage:
            position = self.query_position.weight.expand(images.pixels.shape[0], -1, -1)
            content = self.query_content.weight.expand(images.pixels.shape[0], -1, -1)
            points = self.point_head(position).float().sigmoid()
            return DetectorOutputs({"decoder": QueryGroup(self.decode(content, position, points, memory))})
        proposals, boxes = self.query_selection.supervise_all(memory, self.config.num_queries)
        position, content = self.query_from_box(boxes).to(memory.features.dtype).chunk(2, dim=-1)
        decoder = QueryGroup(self.decode(content, position, boxes, memory))
        return DetectorOutputs({"encoder": proposals, "decoder": decoder})

    def decode(
        self, content: Tensor, position: Tensor, reference: Tensor, memory: Memory, mask: Tensor | None = None
    ) -> Prediction:
        """Predict from every layer, around points [B, Q, 2] or boxes [B, Q, 4]."""
        logits, boxes = [], []
        previous = reference  # with the gradient of the layer before, for look-forward-twice
        for index in range(self.config.decoder_layers):
            content = self.decoder.run(index, content, position, reference, memory, mask)
            head: PredictionHeads = self.heads[index % len(self.heads)]  # type: ignore[assignment]
            changes = head.regress(content)
            logits.append(head.classify(content))
            boxes.append(refine_boxes(previous, changes, EPS))
            if self.config.box_refinement:
                refined = refine_boxes(reference, changes, EPS)
                reference = refined.detach()
                previous = refined if self.config.look_forward_twice else reference
        return Prediction(torch.stack(logits), torch.stack(boxes))
