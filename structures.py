"""The values that flow between packages during one step of training or evaluation.

Sizes in the shape comments: L layers, B images, Q queries, C classes, G targets in the batch, M matches.
Boxes are ``cxcywh``, relative to the unpadded image, unless the name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor of a nest of the named tuples below; whatever else they hold stays."""
    if isinstance(value, Tensor):
        return function(value)
    if hasattr(value, "_fields"):
        return type(value)(*(map_tensors(part, function) for part in value))
    return value


class Images(NamedTuple):
    """What a detector looks at: images padded with zeros on the right and at the bottom, so that sizes say it all."""

    pixels: Tensor
    """[B, 3, H, W] float32 RGB, normalised."""
    sizes: Tensor
    """[B, 2] int64 (height, width) of each image before padding."""


class UnlabelledParts(NamedTuple):
    """What annotators said nothing about in a batch: it may hold objects, and is not background."""

    classes: Tensor
    """[B, C] bool, True for classes that an image says nothing about (federated annotations)."""
    labels: Tensor
    """[R] int64, the class of each ignored region; -1 for all classes."""
    regions: Tensor
    """[R, 4] float32 cxcywh in [0, 1], such as crowds."""
    counts: tuple[int, ...]
    """Regions per image: B integers that sum to R."""

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """(labels, regions) of each image."""
        return list(zip(self.labels.split(self.counts), self.regions.split(self.counts), strict=True))


class Targets(NamedTuple):
    """Ground truth of a batch, concatenated over its images (empty images simply contribute nothing)."""

    labels: Tensor
    """[G] int64 in 0..C-1."""
    boxes: Tensor
    """[G, 4] float32 cxcywh in [0, 1] of the unpadded image."""
    counts: tuple[int, ...]
    """Targets per image, on the host: B integers that sum to G."""
    seeds: tuple[int, ...] = ()
    """One seed per image, from which the noise of its denoising queries is drawn: a result then depends neither on how
    the batch is split over processes nor on the number of data-loading workers. Empty where nothing is drawn."""
    unlabelled: UnlabelledParts | None = None
    """What is not background though it is no target; None where everything is labelled, or to be treated so."""

    def to(self, device: torch.device | str) -> Targets:
        """These targets on a device."""
        moved: Targets = map_tensors(self, lambda tensor: tensor.to(device))
        return moved

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """(labels, boxes) of each image."""
        return list(zip(self.labels.split(self.counts), self.boxes.split(self.counts), strict=True))


class Batch(NamedTuple):
    """What a data loader gives: images with their targets, and where they come from."""

    images: Images
    """Pixels and sizes: the input of a detector."""
    targets: Targets
    """Ground truth: for training and metrics only."""
    image_ids: Tensor
    """[B] int64, as in the annotation file."""
    original_sizes: Tensor
    """[B, 2] int64 (height, width) of the image file, before any augmentation."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """This batch on a device; ``non_blocking`` as in torch."""
        moved: Batch = map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved


class BatchSize(NamedTuple):
    """Size of the global batch, over all processes and accumulation steps: what losses are averaged over."""

    num_targets: float
    """Targets, at least 1."""
    num_images: int
    """Images, with or without targets."""


class Prediction(NamedTuple):
    """Class logits and boxes of some queries in some layers."""

    logits: Tensor
    """[L, B, Q, C], before sigmoid or softmax."""
    boxes: Tensor
    """[L, B, Q, 4] cxcywh in [0, 1] of the unpadded image."""

    def layer(self, index: int) -> Prediction:
        """Logits [B, Q, C] and boxes [B, Q, 4] of one layer."""
        return Prediction(self.logits[index], self.boxes[index])

    def split(self, at: int) -> tuple[Prediction, Prediction]:
        """The same layers of the first queries, and of those from ``at`` on."""
        sizes = [min(at, self.boxes.shape[2]), max(self.boxes.shape[2] - at, 0)]
        (logits, more_logits), (boxes, more_boxes) = self.logits.split(sizes, 2), self.boxes.split(sizes, 2)
        return Prediction(logits, boxes), Prediction(more_logits, more_boxes)


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


class QueryGroup(NamedTuple):
    """Predictions that are supervised together: decoder layers, encoder proposals, noised targets, further branches."""

    prediction: Prediction
    """Of L layers; the encoder's proposals are one layer."""
    matches: Matches | None = None
    """Pairs that are known beforehand (denoising), for all L layers; None: the matcher finds them."""
    image_scale: Tensor | None = None
    """[B] float32 factor of the losses of each image; None for 1."""
    valid: Tensor | None = None
    """[B, Q] bool, False for padding, which is not supervised; None where every query counts."""
    class_agnostic: bool = False
    """Whether the one logit says "an object", whatever its class: all labels then count as 0."""


class DetectorOutputs(NamedTuple):
    """Everything a detector predicts for a batch."""

    groups: dict[str, QueryGroup]
    """By name, in the order of supervision; the last layer of "decoder" is the result."""

    @property
    def result(self) -> Prediction:
        """Logits [B, Q, C] and boxes [B, Q, 4] of the last decoder layer."""
        return self.groups["decoder"].prediction.layer(-1)


class Looking(NamedTuple):
    """Where the queries of a batch look in a cross-attention: P places in each of L levels, for each of H heads."""

    locations: Tensor
    """[B, Q, H, L, P, 2] (x, y) relative to the unpadded image; may lie outside of [0, 1]."""
    weights: Tensor
    """[B, Q, H, L, P], summing to 1 over levels and places."""
    reference: Tensor | None
    """[B, Q, 4] cxcywh box or [B, Q, 2] point around which a query looks; None if it has neither."""


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
