"""The values that flow between packages during one step of training or evaluation.

Sizes in the shape comments: L decoder layers, B images, Q queries, C classes, G targets in the batch, M matches.
Boxes are ``cxcywh``, relative to the unpadded image, unless the name says otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """Ground truth of a batch, concatenated over its images (empty images simply contribute nothing)."""

    labels: Tensor
    """[G] int64 in 0..C-1."""
    boxes: Tensor
    """[G, 4] float32 cxcywh in [0, 1] of the unpadded image."""
    counts: tuple[int, ...]
    """Targets per image, on the host: B integers that sum to G."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return Targets(
            self.labels.to(device, non_blocking=non_blocking),
            self.boxes.to(device, non_blocking=non_blocking),
            self.counts,
        )

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """(labels, boxes) of each image."""
        return list(zip(self.labels.split(self.counts), self.boxes.split(self.counts), strict=True))


class Batch(NamedTuple):
    """Images of different sizes, padded with zeros on the right and at the bottom only, so that sizes say it all."""

    images: Tensor
    """[B, 3, H, W] float32 RGB, normalised."""
    image_sizes: Tensor
    """[B, 2] int64 (height, width) of each image before padding."""
    targets: Targets
    image_ids: Tensor
    """[B] int64, as in the annotation file."""
    original_sizes: Tensor
    """[B, 2] int64 (height, width) of the image file, before any augmentation."""
    seeds: tuple[int, ...]
    """One seed per image, from which everything random about it is drawn: a result then depends neither on how the
    batch is split over processes nor on the number of data-loading workers."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            self.image_sizes.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking),
            self.image_ids.to(device, non_blocking=non_blocking),
            self.original_sizes.to(device, non_blocking=non_blocking),
            self.seeds,
        )


class Prediction(NamedTuple):
    """Class logits and boxes of some queries."""

    logits: Tensor
    """[..., Q, C], before the sigmoid."""
    boxes: Tensor
    """[..., Q, 4] cxcywh in [0, 1] of the unpadded image."""


class Matches(NamedTuple):
    """Pairs of a query and a target, as four parallel index vectors; a query appears at most once per layer."""

    layer: Tensor
    """[M] int64 index of the supervised layer."""
    image: Tensor
    """[M] int64 index into the batch."""
    query: Tensor
    """[M] int64 index of the query within its image."""
    target: Tensor
    """[M] int64 index into the concatenated targets of the batch."""


class Denoising(NamedTuple):
    """Predictions for noised targets, whose matches are known beforehand (DINO, arXiv 2203.03605, section 3.3)."""

    decoder: Prediction
    """[L, B, Qdn, ·]; images with fewer denoising queries than the largest are padded at the end."""
    matches: Matches
    """Which query denoises which target; the same for every layer, so ``layer`` is given for all L."""
    num_groups: Tensor
    """[B] float32: denoising groups of each image (at least 1); its loss is divided by it."""
    valid: Tensor
    """[B, Qdn] bool: False for padding, which must not be supervised."""


class DetectorOutputs(NamedTuple):
    """Everything a detector predicts for a batch."""

    decoder: Prediction
    """[L, B, Q, ·]; the last layer is the result."""
    encoder: Prediction | None
    """[B, Q, ·] proposals that were selected as queries; None for detectors without query selection."""
    denoising: Denoising | None
    """None outside training, or if switched off."""


class LossOutput(NamedTuple):
    """What the criterion returns."""

    total: Tensor
    """Scalar with gradient: the weighted sum of ``terms``."""
    terms: dict[str, Tensor]
    """Unweighted detached scalars, named decoder.5/giou, encoder/class, denoising.0/bbox."""
    diagnostics: dict[str, Tensor]
    """Detached scalars that describe the matching; never part of the loss."""


class Detections(NamedTuple):
    """Final detections of one image, best first."""

    scores: Tensor
    """[N] float32 in [0, 1]."""
    labels: Tensor
    """[N] int64 in 0..C-1."""
    boxes_xyxy: Tensor
    """[N, 4] float32 in pixels of the original image."""
