"""Contrastive denoising: noised targets as additional queries of the decoder during training."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from structures import Matches, Prediction, QueryGroup, Targets


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """Contrastive denoising (DINO, arXiv 2203.03605, section 3.3)."""

    queries: int = 100
    """Denoising queries of either sign per image: an image with G targets has max(1, queries // G) groups."""
    label_noise: float = 0.5
    """Probability that a query's label is redrawn is half of this."""
    box_noise: float = 1.0
    """Largest shift of a corner in halves of the box's size: up to this for positives, up to twice for negatives."""
    max_targets: int = 300
    """Targets that are denoised in one image at most, drawn at random beyond; bounds memory."""

    def __post_init__(self) -> None:
        if self.queries < 1 or self.max_targets < 1:
            raise ValueError("denoising needs queries and max_targets of at least 1; null switches it off")
        if not 0 <= self.label_noise <= 1 or self.box_noise < 0:
            raise ValueError("label_noise must lie in [0, 1] and box_noise must not be negative")

    @property
    def redrawn_labels(self) -> float:
        """Probability that a query's label is drawn anew."""
        return self.label_noise / 2


class DenoisingQueries(NamedTuple):
    """Additional queries, which come before those that are matched; Qdn is 0 where the batch has no targets."""

    content: Tensor
    """[B, Qdn, embed_dim]."""
    boxes: Tensor
    """[B, Qdn, 4] noised cxcywh boxes in (0, 1)."""
    groups: Tensor
    """[B, Qdn] int64 group of each query; -1 for padding, at the end of images with fewer queries than the largest."""
    matches: Matches
    """The positive queries' targets, repeated for every decoder layer."""
    num_groups: Tensor
    """[B] float32, at least 1; the losses of an image are divided by it."""

    def before(self, content: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Content [B, Qdn + Q, embed_dim] and boxes [B, Qdn + Q, 4] of these and the given queries."""
        content = torch.cat([self.content, content.to(self.content.dtype)], dim=1)
        return content, torch.cat([self.boxes, boxes], dim=1)

    def split(self, prediction: Prediction) -> tuple[QueryGroup, Prediction]:
        """The supervised group of these queries, and the prediction of those that came after them."""
        noised, others = prediction.split(self.boxes.shape[1])
        scale = self.num_groups.reciprocal()
        return QueryGroup(noised, self.matches, image_scale=scale, valid=self.groups >= 0), others


class _Layout(NamedTuple):
    """Where the queries of an image go; padded, those of a batch. Counted on the host."""

    target: NDArray[np.int64]
    """[N] index into the targets of the batch; 0 for padding."""
    group: NDArray[np.int64]
    """[N]; -1 for padding."""
    positive: NDArray[np.bool_]
    """[N]; false for padding."""


class DenoisingGenerator(nn.Module):
    """Makes denoising queries out of targets.

    The number of groups is decided image by image. (The published code takes it from the most crowded image of the
    batch, so that one image changes what its neighbours learn, and the result depends on the batch's split.) With one
    image in the batch both are the same. The noise of an image is drawn from that image's own seed.
    """

    config: Any
    signs: ClassVar[tuple[bool, ...]] = (True, False)
    """In each group, positives of all targets, then negatives."""

    def __init__(self, config: DenoisingConfig, num_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.label_embedding = nn.Embedding(num_classes, embed_dim)

    def forward(self, targets: Targets, num_layers: int) -> DenoisingQueries:
        """Make the queries of a batch.

        Args:
            targets: ground truth; its ``counts`` fix all shapes, so that nothing waits for the device. Without
                ``seeds``, they are drawn from torch's generator.
            num_layers: decoder layers that are going to predict the queries.
        """
        device = targets.boxes.device
        seeds = targets.seeds or torch.randint(2**62, (len(targets.counts),)).tolist()
        generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        firsts = itertools.accumulate(targets.counts, initial=0)
        layouts = [self._layout(*image) for image in zip(targets.counts, firsts, generators, strict=False)]
        longest = max((len(layout.group) for layout in layouts), default=0)
        layout = _Layout(
            *(
                np.stack([np.pad(row, (0, longest - len(row)), constant_values=fill) for row in rows])
                for rows, fill in zip(zip(*layouts, strict=True), (0, -1, 0), strict=True)
            )
        )
        noise = np.full((len(layouts), longest, 10), 0.5, dtype=np.float32)
        for row, own, generator in zip(noise, layouts, generators, strict=True):
            row[: len(own.group)] = self._draw(len(own.group), generator)
        redrawn = np.minimum((noise[..., 9] * self.num_classes).astype(np.int64), self.num_classes - 1)
        redrawn[noise[..., 8] >= self.config.redrawn_labels] = -1
        image, query = layout.positive.nonzero()
        layer = np.arange(num_layers).repeat(len(image))
        repeated = (np.tile(part, num_layers) for part in (image, query, layout.target[layout.positive]))
        num_groups = 1 + layout.group.max(axis=1, initial=0)
        # Two copies to the device, of whole numbers and of others.
        indices = np.concatenate(
            [part.reshape(-1) for part in (layer, *repeated, layout.target, layout.group, redrawn, num_groups)]
        )
        matched, shape = len(layer), layout.group.shape
        sizes = [matched] * 4 + [layout.group.size] * 3 + [len(layouts)]
        *matches, target, group, label, count = torch.from_numpy(indices).to(device, non_blocking=True).split(sizes)
        shift = torch.from_numpy(self._shifts(noise, layout.positive)).to(device, non_blocking=True)
        target, label = target.view(shape), label.view(shape)
        content = self.embed(torch.where(label < 0, targets.labels[target], label))
        boxes = self._noised_boxes(targets.boxes[target], shift)
        return DenoisingQueries(content, boxes, group.view(shape), Matches(*matches), count.float())

    def embed(self, labels: Tensor) -> Tensor:
        """Content [..., embed_dim] of labels [...]."""
        return self.label_embedding(labels)

    def groups_of(self, count: int) -> int:
        """Number of groups for this many targets, at least one."""
        return max(1, self.config.queries // count)

    def _layout(self, count: int, first: int, generator: torch.Generator) -> _Layout:
        """Groups of each of ``signs`` for ``count`` targets, of those from ``first`` on."""
        kept = min(count, self.config.max_targets)
        chosen = np.arange(count)
        if kept < count:
            chosen = np.sort(torch.randperm(count, generator=generator)[:kept].numpy())
        num_groups = self.groups_of(kept) if kept else 0
        return _Layout(
            target=first + np.tile(chosen, len(self.signs) * num_groups),
            group=np.repeat(np.arange(num_groups), len(self.signs) * kept),
            positive=np.tile(np.repeat(self.signs, kept), num_groups),
        )

    def _draw(self, count: int, generator: torch.Generator) -> NDArray[np.float32]:
        """[count, 10] in [0, 1): four magnitudes, four signs, one that decides about the label, one that picks it."""
        drawn: NDArray[np.float32] = torch.rand(count, 10, generator=generator).numpy()
        return drawn

    def _shifts(self, noise: NDArray[np.float32], positive: NDArray[np.bool_]) -> NDArray[np.float32]:
        """[B, N, 4] by how many widths and heights of its box each corner moves; of negatives by more."""
        magnitude = noise[..., :4] + ~positive[..., None]
        return np.where(noise[..., 4:8] < 0.5, -magnitude, magnitude) * np.float32(self.config.box_noise / 2)

    def _noised_boxes(self, boxes: Tensor, shift: Tensor) -> Tensor:
        """Shift both corners."""
        corners = cxcywh_to_xyxy(boxes) + shift * boxes[..., 2:].repeat(1, 1, 2)
        return xyxy_to_cxcywh(corners.clamp(0, 1)).clamp(1e-3, 1 - 1e-3)


def attention_mask(groups: Tensor, num_queries: int) -> Tensor:
    """Which decoder query may look at which.

    Matching queries see only each other, or the targets would leak; a denoising query sees its own group and the
    matching queries.

    Args:
        groups: [B, Qdn] group of each denoising query, -1 for padding.
        num_queries: matching queries, which follow the denoising ones.

    Returns:
        [B, 1, Qdn + Q, Qdn + Q] bool, True where a query (row) may look.
    """
    batch, denoising = groups.shape
    total = denoising + num_queries
    mask = torch.zeros(batch, total, total, dtype=torch.bool, device=groups.device)
    mask[:, :, denoising:] = True
    mask[:, :denoising, :denoising] = groups[:, :, None] == groups[:, None, :]
    return mask[:, None]
