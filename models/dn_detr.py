"""DN-DETR: DAB-DETR that learns to restore noised targets in training (arXiv 2203.01305)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.dab_detr import DABDETR, DABDETRConfig
from models.parts.denoising import DenoisingGenerator, attention_mask
from structures import DetectorOutputs, Images, QueryGroup, Targets


@dataclass(frozen=True, kw_only=True)
class RestorationConfig:
    """Noise of the targets that are restored (arXiv 2203.01305, section 4.2)."""

    groups: int = 5
    """Noised copies of all targets of an image."""
    label_noise: float = 0.2
    """Probability that a query's label is drawn anew."""
    box_noise: float = 0.4
    """Largest shift of a centre in halves of the box's size, and largest change of a size in sizes."""
    max_targets: int = 300
    """Targets that are denoised in one image at most, drawn at random beyond; bounds memory."""

    def __post_init__(self) -> None:
        if self.groups < 1 or self.max_targets < 1:
            raise ValueError("denoising needs groups and max_targets of at least 1")
        if not 0 <= self.label_noise <= 1 or self.box_noise < 0:
            raise ValueError("label_noise must lie in [0, 1] and box_noise must not be negative")

    @property
    def redrawn_labels(self) -> float:
        """Probability that a query's label is drawn anew."""
        return self.label_noise


@dataclass(frozen=True, kw_only=True)
class DNDETRConfig(DABDETRConfig):
    """DN-DETR; the defaults are the published model."""

    name: Literal["dn_detr"] = "dn_detr"  # type: ignore[assignment]
    denoising: RestorationConfig = field(default_factory=RestorationConfig)
    """Restoration of noised targets in training."""

    @property
    def given_groups(self) -> tuple[str, ...]:
        """The noised targets."""
        return ("denoising",)

    def build(self, num_classes: int, load_backbone: bool = True) -> DNDETR:
        """Make the model, initialised as published; arguments as in ``DetectorConfig``."""
        return DNDETR(self, num_classes, load_backbone)


class DNDETR(DABDETR):
    """Box queries, whose content says that they are to find objects; and noised targets, whose content is a label."""

    config: DNDETRConfig

    def __init__(self, config: DNDETRConfig, num_classes: int, load_backbone: bool = True) -> None:
        super().__init__(config, num_classes, load_backbone)
        self.denoising = Restoration(config.denoising, num_classes, config.embed_dim)

    def forward(self, images: Images, targets: Targets | None = None) -> DetectorOutputs:
        """Predict all layers; in training, the noised targets too."""
        memory = self.encode(images)
        boxes = self.query_boxes.weight.sigmoid().expand(images.pixels.shape[0], -1, -1)
        content = self.denoising.unknown().expand(*boxes.shape[:2], -1)
        heads = [self.heads] * self.config.decoder_layers
        if not self.training or targets is None:
            return DetectorOutputs({"decoder": QueryGroup(self.decoder(content, boxes, memory, heads))})
        noised = self.denoising(targets, self.config.decoder_layers)
        mask = attention_mask(noised.groups, boxes.shape[1])
        denoising, prediction = noised.split(self.decoder(*noised.before(content, boxes), memory, heads, mask))
        return DetectorOutputs({"decoder": QueryGroup(prediction), "denoising": denoising})


class Restoration(DenoisingGenerator):
    """A fixed number of groups of positives; contents are labels, with a last channel that marks noised targets."""

    config: RestorationConfig
    signs: ClassVar[tuple[bool, ...]] = (True,)

    def __init__(self, config: RestorationConfig, num_classes: int, embed_dim: int) -> None:
        super().__init__(config, num_classes, embed_dim - 1)  # type: ignore[arg-type]
        self.no_label = nn.Parameter(torch.empty(embed_dim - 1).normal_())

    def embed(self, labels: Tensor) -> Tensor:
        """Content [..., embed_dim] of labels [...], marked."""
        return F.pad(self.label_embedding(labels), (0, 1), value=1.0)

    def unknown(self) -> Tensor:
        """Content [embed_dim] of queries that are to find objects."""
        return F.pad(self.no_label, (0, 1))

    def groups_of(self, count: int) -> int:
        """The same number of groups for any number of targets."""
        return self.config.groups

    def _shifts(self, noise: NDArray[np.float32], positive: NDArray[np.bool_]) -> NDArray[np.float32]:
        """[B, N, 4] by how many widths and heights centre and size change."""
        return super()._shifts(noise, positive) * np.array([1, 1, 2, 2], dtype=np.float32)

    def _noised_boxes(self, boxes: Tensor, shift: Tensor) -> Tensor:
        return (boxes + shift * boxes[..., 2:].repeat(1, 1, 2)).clamp(1e-3, 1 - 1e-3)
