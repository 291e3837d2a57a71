"""The contract of a detector: what training, evaluation, tools and analysis may ask of any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from models.parts.backbone import BackboneConfig
from models.parts.layers import DecoderLayer, EncoderLayer
from models.parts.position_encoding import SinePositionEncoding
from models.parts.postprocess import best_pairs, to_pixels, without_duplicates
from structures import Detections, DetectorOutputs, Images, Targets


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(ABC):
    """What the configurations of all detectors have in common."""

    name: str
    """The detector's name in a configuration."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Feature extractor."""
    embed_dim: int = 256
    """Width of the transformer."""
    num_heads: int = 8
    """Attention heads."""
    encoder_layers: int = 6
    """Encoder layers."""
    decoder_layers: int = 6
    """Decoder layers."""
    ffn_dim: int = 2048
    """Hidden width of the feed-forward blocks."""
    dropout: float = 0.0
    """Dropout in both stacks."""
    num_queries: int = 900
    """Queries of the decoder."""
    position_encoding: SinePositionEncoding = field(default_factory=SinePositionEncoding)
    """Encoding of pixels in the encoder."""
    detections_per_image: int = 300
    """Detections kept by the post-processing."""
    nms_iou: float | None = None
    """Overlap above which a detection that repeats a better one of its class is dropped; null keeps all, as published.
    After short training queries still repeat each other, long training leaves little to drop."""
    gradient_checkpointing: bool = False
    """Recompute activations of backbone, encoder and decoder in the backward pass: less memory, more time."""

    no_object: ClassVar[bool] = False
    """Whether the last logit stands for "no object", under a softmax over classes."""

    def __post_init__(self) -> None:
        self.require_positive(
            *("embed_dim", "num_heads", "encoder_layers", "decoder_layers", "ffn_dim"),
            *("num_queries", "detections_per_image"),
        )
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ValueError(f"embed_dim {self.embed_dim} must be divisible by 4 and by num_heads {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), found {self.dropout}")
        if self.nms_iou is not None and not 0 < self.nms_iou <= 1:
            raise ValueError(f"nms_iou must lie in (0, 1], or be null, found {self.nms_iou}")

    def require_positive(self, *names: str) -> None:
        """Raise ValueError where one of the named fields is less than 1."""
        wrong = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) < 1]
        if wrong:
            raise ValueError(f"these must be at least 1: {', '.join(wrong)}")

    @property
    def matched_layers(self) -> dict[str, int]:
        """Layers of each group of queries that is matched with targets in training, in the order of supervision."""
        return {"decoder": self.decoder_layers}

    @property
    def given_groups(self) -> tuple[str, ...]:
        """Names of the groups of queries whose matches are known beforehand."""
        return ()

    @abstractmethod
    def build(self, num_classes: int, load_backbone: bool = True) -> Detector:
        """Make the model, initialised as published.

        Args:
            num_classes: classes to tell apart.
            load_backbone: false where a checkpoint follows, so that the pretrained backbone need not be at hand.
        """


class Detector(nn.Module, ABC):
    """A detector; its parts are attributes named for what they are."""

    config: Any
    backbone: Any
    decoder: Any
    class_parts: ClassVar[tuple[str, ...]] = ("class_head", "label_embedding")
    """Modules with one row per class, wherever they are in the model."""

    def __init__(self, config: DetectorConfig, num_classes: int, load_backbone: bool) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError("a detector needs at least one class")
        self.config, self.num_classes = config, num_classes
        self.backbone = config.backbone.build(load_backbone)
        self.backbone.set_gradient_checkpointing(config.gradient_checkpointing)

    @abstractmethod
    def forward(self, images: Images, targets: Targets | None = None) -> DetectorOutputs:
        """Predict all layers.

        Args:
            images: padded and normalised.
            targets: of the same images; in training, detectors that learn from noised targets make them of these.
        """

    def compile_layers(self, **options: Any) -> None:
        """Compile each layer of encoder and decoder by ``torch.compile``: with few compilations for all sizes of
        images and numbers of targets, where the whole model, whose parts look at both, would need one for each.

        Args:
            options: of ``torch.compile``.
        """
        for module in self.modules():
            if isinstance(module, (EncoderLayer, DecoderLayer)):
                module.compile(**options)

    @property
    def last_cross_attention(self) -> nn.Module:
        """That of the last decoder layer; its ``looking`` takes what its call takes, and says where queries look."""
        attention: nn.Module = self.decoder.layers[-1].cross_attention
        return attention

    @property
    def pretrained_part(self) -> str | None:
        """Module that weights of a backbone fill; None if the backbone starts from random weights."""
        return None if self.config.backbone.pretrained is False else "backbone.body"

    def scores(self, logits: Tensor) -> Tensor:
        """Scores [..., C] in [0, 1] of logits [..., C] (or [..., C + 1], the last for "no object"), float32."""
        return logits.float().sigmoid()

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which queries are detections, best first: of scores [B, Q, C] the score, label and query, each [B, N]."""
        return best_pairs(scores, self.config.detections_per_image)

    def detect(self, outputs: DetectorOutputs, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detections as tensors, best first, with tensor operations only.

        Args:
            outputs: of :meth:`forward`.
            sizes: [B, 2] (height, width) in pixels to which the boxes are scaled.

        Returns:
            scores [B, N] (0 for what ``nms_iou`` drops), labels [B, N] int64, boxes [B, N, 4] xyxy in pixels, clipped
            to the image.
        """
        logits, boxes = outputs.result
        scores, labels, query = self.select(self.scores(logits))
        boxes = boxes.float().gather(1, query[..., None].expand(-1, -1, 4))
        found = scores, labels, to_pixels(boxes, sizes)
        return found if self.config.nms_iou is None else without_duplicates(*found, self.config.nms_iou)

    def postprocess(self, outputs: DetectorOutputs, original_sizes: Tensor) -> list[Detections]:
        """Detections of each image, in pixels of the original images of [B, 2] (height, width)."""
        detections = [Detections(*image) for image in zip(*self.detect(outputs, original_sizes), strict=True)]
        if self.config.nms_iou is None:
            return detections
        return [Detections(*(part[found.scores > 0] for part in found)) for found in detections]
