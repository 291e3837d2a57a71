"""H-DETR: in training, a second set of queries is matched one-to-many (arXiv 2207.13080)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.deformable_detr import DeformableDETR, DeformableDETRConfig
from structures import DetectorOutputs, Images, QueryGroup, Targets


@dataclass(frozen=True, kw_only=True)
class HDETRConfig(DeformableDETRConfig):
    """H-DETR; the defaults are the published model, a two-stage Deformable DETR that looks forward twice.

    Each target is meant to be matched with six of the one-to-many queries: ``criterion.groups.one_to_many.matcher``.
    """

    name: Literal["h_detr"] = "h_detr"  # type: ignore[assignment]
    ffn_dim: int = 2048
    """Hidden width of the feed-forward blocks."""
    dropout: float = 0.0
    """Dropout in both stacks."""
    one_to_many_queries: int = 1500
    """Queries of the second set, in training only."""
    box_refinement: bool = True
    """Let every layer refine the boxes of the layer before, with heads of its own."""
    look_forward_twice: bool = True
    """Let the gradient of a layer's boxes reach the layer before."""
    two_stage: bool = True
    """Take the queries from the encoder's best proposals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("one_to_many_queries")
        if not self.two_stage:
            raise ValueError("h_detr needs two_stage: true")

    @property
    def matched_layers(self) -> dict[str, int]:
        """Encoder, decoder, and the layers of the second set."""
        return {**super().matched_layers, "one_to_many": self.decoder_layers}

    def build(self, num_classes: int, load_backbone: bool = True) -> HDETR:
        """Make the model, initialised as published; arguments as in ``DetectorConfig``."""
        return HDETR(self, num_classes, load_backbone)


class HDETR(DeformableDETR):
    """Queries with learned content at the places of the best proposals; the two sets do not see each other."""

    config: HDETRConfig

    def __init__(self, config: HDETRConfig, num_classes: int, load_backbone: bool = True) -> None:
        super().__init__(config, num_classes, load_backbone)
        self.query_content = nn.Embedding(config.num_queries + config.one_to_many_queries, config.embed_dim)

    def forward(self, images: Images, targets: Targets | None = None) -> DetectorOutputs:
        """Predict all layers; in training, those of the second set of queries too."""
        first = self.config.num_queries
        count = first + self.config.one_to_many_queries if self.training else first
        memory = self.encode(images)
        proposals, boxes = self.query_selection.supervise_all(memory, count)
        position, _ = self.query_from_box(boxes).to(memory.features.dtype).chunk(2, dim=-1)
        content = self.query_content.weight[: boxes.shape[1]].expand(boxes.shape[0], -1, -1)
        mask = apart(boxes.shape[1], first, boxes.device) if self.training else None
        prediction = self.decode(content, position, boxes, memory, mask)
        prediction, one_to_many = prediction.split(first)
        groups = {"encoder": proposals, "decoder": QueryGroup(prediction)}
        if self.training:
            groups["one_to_many"] = QueryGroup(one_to_many)
        return DetectorOutputs(groups)


def apart(num_queries: int, first: int, device: torch.device) -> Tensor:
    """[1, 1, Q, Q] bool, True where a query may look at another: the first ones and the others at their own kind."""
    is_first = torch.arange(num_queries, device=device) < first
    return (is_first[:, None] == is_first)[None, None]
