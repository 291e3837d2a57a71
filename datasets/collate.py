"""From samples to a padded, normalised batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.coco import LoadedSample, Sample
from structures import Batch, Images, Targets, UnlabelledParts, map_tensors


@dataclass(frozen=True)
class Loaded:
    """What a worker hands to the main process."""

    batches: tuple[Batch, ...]
    """One batch in training; in evaluation one for each image size met; none where images could not be read."""
    skipped: tuple[tuple[int, str], ...]
    """(image id, reason) of each unreadable image."""

    def pin_memory(self) -> Loaded:
        """Called by torch's data loader; its own way through tuples would turn those of ``Batch`` into lists."""
        return Loaded(tuple(map_tensors(batch, Tensor.pin_memory) for batch in self.batches), self.skipped)


def make_batch(
    samples: Sequence[Sample], mean: tuple[float, ...], std: tuple[float, ...], pad_multiple: int = 1
) -> Batch:
    """Normalises images and pads them with zeros on the right and at the bottom.

    Args:
        samples: at least one.
        mean: of each channel, for pixels in [0, 1].
        std: likewise.
        pad_multiple: height and width of the batch are rounded up to a multiple of it.
    """
    sizes = torch.tensor([sample.image.shape[1:] for sample in samples], dtype=torch.int64)
    height, width = (-(-int(side) // pad_multiple) * pad_multiple for side in sizes.amax(dim=0))
    offset = torch.tensor(mean).mul(255.0)[:, None, None]
    scale = torch.tensor(std).mul(255.0).reciprocal()[:, None, None]
    images = torch.zeros(len(samples), 3, height, width)
    for padded, sample in zip(images, samples, strict=True):
        _, own_height, own_width = sample.image.shape
        padded[:, :own_height, :own_width].copy_(sample.image).sub_(offset).mul_(scale)
    return Batch(
        images=Images(images, sizes),
        targets=Targets(
            torch.cat([sample.labels for sample in samples]),
            torch.cat([sample.boxes for sample in samples]),
            tuple(len(sample.labels) for sample in samples),
            tuple(sample.seed for sample in samples),
            _unlabelled(samples),
        ),
        image_ids=torch.tensor([sample.image_id for sample in samples], dtype=torch.int64),
        original_sizes=torch.tensor([sample.original_size for sample in samples], dtype=torch.int64),
    )


def _unlabelled(samples: Sequence[Sample]) -> UnlabelledParts | None:
    regions = [sample.regions for sample in samples if sample.regions is not None]
    silent = [sample.silent for sample in samples if sample.silent is not None]
    if len(regions) < len(samples):
        return None
    boxes, labels = (torch.cat(parts) for parts in zip(*regions, strict=True))
    return UnlabelledParts(torch.stack(silent), labels, boxes, tuple(len(own) for own, _ in regions))


@dataclass(frozen=True)
class Collate:
    """The data loader's ``collate_fn``; a plain value, so that it can be sent to spawned workers."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad_multiple: int
    equal_sizes: bool
    """Whether images of different sizes go into separate batches (evaluation) or are padded (training)."""

    def __call__(self, loaded: list[LoadedSample]) -> Loaded:
        skipped = tuple(entry for item in loaded for entry in item.skipped)
        samples = [item.sample for item in loaded if item.sample is not None]
        if not self.equal_sizes:
            if len(samples) < len(loaded):
                return Loaded((), skipped)
            return Loaded((make_batch(samples, self.mean, self.std, self.pad_multiple),), skipped)
        # The sampler groups images by the sizes that the annotation file states; the files have the last word.
        groups: dict[tuple[int, ...], list[Sample]] = {}
        for sample in samples:
            groups.setdefault(tuple(sample.image.shape), []).append(sample)
        batches = tuple(make_batch(group, self.mean, self.std, self.pad_multiple) for group in groups.values())
        return Loaded(batches, skipped)
