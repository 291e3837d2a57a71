"""Contrastive denoising: noised targets as additional queries of the decoder during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.parts.heads import inverse_sigmoid
from structures import Matches, Targets


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


class DenoisingQueries(NamedTuple):
    """Additional queries; Qdn is 0 where the batch has no targets."""

    content: Tensor
    """[B, Qdn, embed_dim]."""
    boxes: Tensor
    """[B, Qdn, 4] noised cxcywh boxes in (0, 1)."""
    matches: Matches
    """The positive queries' targets, repeated for every decoder layer."""
    num_groups: Tensor
    """[B] float32."""
    valid: Tensor
    """[B, Qdn] bool; images with fewer queries are padded at the end."""
    groups: Tensor
    """[B, Qdn] int64 group of each query, -1 for padding."""


class _Layout(NamedTuple):
    """Where the queries of one image go, and what is random about them; on the host."""

    target: Tensor
    """[N] index into the image's targets."""
    group: Tensor
    """[N]."""
    positive: Tensor
    """[N] bool."""
    noise: Tensor
    """[N, 10]: four magnitudes, four signs, one draw that decides about the label, one that picks it; in [0, 1)."""


class DenoisingGenerator(nn.Module):
    """Makes denoising queries out of targets.

    The number of groups is decided image by image. (The published code takes it from the most crowded image of the
    batch, so that one image changes what its neighbours learn, and the result depends on the batch's split.) With one
    image in the batch both are the same. The noise of an image is drawn from that image's own seed.
    """

    def __init__(self, config: DenoisingConfig, num_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.label_embedding = nn.Embedding(num_classes, embed_dim)

    def forward(self, targets: Targets, seeds: tuple[int, ...], num_layers: int) -> DenoisingQueries:
        """Make the queries of a batch.

        Args:
            targets: ground truth; its ``counts`` fix all shapes, so that nothing waits for the device.
            seeds: one per image.
            num_layers: decoder layers that are going to predict them.
        """
        device = targets.boxes.device
        layouts = [self._layout(count, seed) for count, seed in zip(targets.counts, seeds, strict=True)]
        length = max((len(layout.target) for layout in layouts), default=0)
        image_start, first = [], 0
        for count in targets.counts:
            image_start.append(first)
            first += count

        def pad(name: str, fill: float, offsets: list[int] | None = None) -> Tensor:
            rows = [getattr(layout, name) for layout in layouts]
            if offsets is not None:
                rows = [row + offset for row, offset in zip(rows, offsets, strict=True)]
            shape = (len(rows), length, *rows[0].shape[1:])
            padded = torch.full(shape, fill, dtype=rows[0].dtype)
            for i, row in enumerate(rows):
                padded[i, : len(row)] = row
            return padded

        positive, group, index = pad("positive", False), pad("group", -1), pad("target", 0, image_start)
        image, query = positive.nonzero(as_tuple=True)
        layer = torch.arange(num_layers).repeat_interleave(len(image))
        repeated = [layer, *(part.repeat(num_layers) for part in (image, query, index[positive]))]
        matches = Matches(*(part.to(device, non_blocking=True) for part in repeated))
        groups = group.to(device, non_blocking=True)
        num_groups = torch.tensor(
            [max(1, int(layout.group.max()) + 1) if len(layout.group) else 1 for layout in layouts]
        )
        if length == 0:
            labels, boxes = index.to(device), torch.zeros(len(layouts), 0, 4, device=device)
        else:
            noise = pad("noise", 0.5).to(device, non_blocking=True)
            index = index.to(device, non_blocking=True)
            labels = self._noised_labels(targets.labels[index], noise[..., 8], noise[..., 9])
            boxes = self._noised_boxes(targets.boxes[index], positive.to(device, non_blocking=True), noise)
        content = self.label_embedding(labels)
        return DenoisingQueries(
            content, boxes, matches, num_groups.float().to(device, non_blocking=True), groups >= 0, groups
        )

    def _layout(self, count: int, seed: int) -> _Layout:
        """Groups of ``count`` positives followed by ``count`` negatives."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        kept = min(count, self.config.max_targets)
        chosen = (
            torch.randperm(count, generator=generator)[:kept].sort().values if kept < count else torch.arange(count)
        )
        num_groups = max(1, self.config.queries // kept) if kept else 0
        size = 2 * kept * num_groups
        return _Layout(
            target=chosen.repeat(2 * num_groups),
            group=torch.arange(num_groups).repeat_interleave(2 * kept),
            positive=torch.tensor([True, False]).repeat_interleave(kept).repeat(num_groups),
            noise=torch.rand(size, 10, generator=generator),
        )

    def _noised_labels(self, labels: Tensor, decision: Tensor, draw: Tensor) -> Tensor:
        random = (draw * self.num_classes).long().clamp(max=self.num_classes - 1)
        return torch.where(decision < self.config.label_noise / 2, random, labels)

    def _noised_boxes(self, boxes: Tensor, positive: Tensor, noise: Tensor) -> Tensor:
        """Shift both corners; negatives by more than positives."""
        centre, size = boxes[..., :2], boxes[..., 2:]
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        magnitude = noise[..., :4] + (~positive)[..., None]
        sign = torch.where(noise[..., 4:8] < 0.5, -1.0, 1.0)
        shift = sign * magnitude * (size / 2).repeat(1, 1, 2) * self.config.box_noise
        corners = (corners + shift).clamp(0, 1)
        low, high = corners[..., :2], corners[..., 2:]
        noised = torch.cat([(low + high) / 2, high - low], dim=-1)
        return inverse_sigmoid(noised, 1e-3).sigmoid()


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
