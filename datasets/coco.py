"""Detection data sets in COCO layout: a directory of images and one annotation file."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.datasets import CocoDetection, VisionDataset

from datasets.annotations import Category, CleaningReport, PackedAnnotations
from datasets.coco_files import CocoFiles, Split, join
from datasets.images import UnreadableImageError, decode_image, read_header, read_size
from datasets.labelled_image import LabelledImage, relative_boxes
from datasets.transforms import Transform, apply_transforms
from datasets.unlabelled import PackedUnlabelled

MAX_REPLACEMENTS = 16
"""So many images in a row may be unreadable before training stops: then it is the disk, not the image."""


HEADERS_LOOKED_AT = 200
"""So many files are opened before training, to find pictures that are to be turned."""

_logger = logging.getLogger(__name__)


class SampleKey(NamedTuple):
    """What samplers ask a data set for."""

    image_index: int
    """Position in the data set."""
    seed: int
    """Source of everything random about the sample."""
    progress: float = 0.0
    """Share of the training that is over before the sample's step."""


class Sample(NamedTuple):
    """One image as a worker hands it to the collation."""

    image: Tensor
    """[3, H, W] uint8 RGB after augmentation."""
    boxes: Tensor
    """[n, 4] float32 cxcywh in [0, 1] of ``image``."""
    labels: Tensor
    """[n] int64."""
    image_id: int
    """As in the annotation file."""
    original_size: tuple[int, int]
    """(height, width) to which annotated boxes refer."""
    seed: int
    """Of the key it was asked for with."""
    regions: tuple[Tensor, Tensor] | None = None
    """(boxes [r, 4] like ``boxes``, labels [r]) of ignored regions; None where they count as background."""
    silent: Tensor | None = None
    """[C] bool, True for classes that the image says nothing about; None with ``regions``."""


class LoadedSample(NamedTuple):
    """A sample and what was skipped on the way to it."""

    sample: Sample | None
    """None where an evaluation image, or too many training images in a row, cannot be read."""
    skipped: tuple[tuple[int, str], ...]
    """(image id, reason) of each unreadable image."""


class CocoDataset(CocoDetection):
    """torchvision's CocoDetection, with the annotations cleaned and packed instead of held as Python objects.

    ``dataset[SampleKey(index, seed)]`` is a ``LoadedSample``. An unreadable training image is replaced by the next one
    in the file, so that batches keep their size and every split of a batch over processes sees the same replacement. An
    unreadable evaluation image is left out: its objects count as missed.
    """

    # CocoDetection's own constructor would load the annotations as Python objects.
    def __init__(
        self,
        images: Path | str,
        annotations: PackedAnnotations,
        categories: tuple[Category, ...],
        report: CleaningReport,
        transforms: tuple[Transform, ...],
        training: bool,
        strict_images: bool = False,
        unlabelled: PackedUnlabelled | None = None,
    ) -> None:
        VisionDataset.__init__(self, str(images))
        self.annotations = annotations
        self.categories = categories
        """Index = label."""
        self.report = report
        """What was cleaned away."""
        self.augmentation = transforms
        self.training = training
        self.strict_images = strict_images
        self.unlabelled = unlabelled
        """What is no background though it is not labelled; None to treat it as background."""
        self.damaged: dict[int, str] = {}
        """What is missing of pictures whose last bytes are, by index; of those that this process has loaded."""

    @property
    def ids(self) -> list[int]:
        """Image ids in order, as torchvision names them."""
        ids: list[int] = self.annotations.image_ids.tolist()
        return ids

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def image_path(self, index: int) -> Path:
        return Path(self.root) / self.annotations.file_name(index)

    def stated_size(self, index: int) -> tuple[int, int]:
        """(height, width) in the annotation file, read from the image's header where missing; (0, 0) if unreadable."""
        height, width = self.annotations.sizes[index].tolist()
        if (height, width) == (0, 0):
            try:
                return read_size(self.image_path(index))
            except UnreadableImageError:
                pass
        return height, width

    def wider_than_high(self) -> Tensor:
        """[N] bool, of the annotated sizes; images that are square or of unknown size are not."""
        sizes = self.annotations.sizes.clone()
        for index in (sizes == 0).any(dim=1).nonzero()[:, 0].tolist():
            sizes[index] = torch.tensor(self.stated_size(index))
        return sizes[:, 1] > sizes[:, 0]

    def many_sizes(self) -> bool:
        """Whether sixteen samples are of more than five sizes, early or late in the training.

        Blank images go through the transforms, in the sizes that are stated, made smaller than 2,048 pixels.
        """
        transforms = tuple(transform for transform in self.augmentation if not transform.keeps_size)
        for progress in (0.0, 0.999):
            seen: set[tuple[int, int]] = set()
            for seed in range(16):
                drawn = self._blank(random.Random(1000 + seed))
                seen.add(apply_transforms(transforms, *drawn, seed, progress, self._blank).size)
                if len(seen) > 5:
                    return True
        return False

    def _blank(self, source: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        size = self.stated_size(source.randrange(len(self)))
        height, width = (max(round(side * min(1.0, 2048 / max(size))), 1) if max(size) else 1 for side in size)
        box = torch.tensor([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]])
        return torch.zeros(3, height, width, dtype=torch.uint8), box, torch.zeros(1, dtype=torch.int64)

    def load(self, index: int) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Image [3, H, W] uint8, boxes [n, 4] xyxy in its pixels, labels [n], and the annotated (height, width).

        Raises:
            UnreadableImageError: it cannot be read, or its shape contradicts the annotation file.
        """
        path = self.image_path(index)
        height, width = self.annotations.sizes[index].tolist()
        image, damage = decode_image(path, (height, width), self.strict_images)
        if damage and index not in self.damaged:
            self.damaged[index] = damage
            _logger.warning("%s: %s", path, damage)
        boxes, labels = self.annotations.targets(index)
        found_height, found_width = image.shape[1:]
        if (height, width) in ((0, 0), (found_height, found_width)):
            return image, boxes, labels, (found_height, found_width)
        # A resized copy of what was annotated keeps its aspect ratio, up to rounding; anything else is another picture.
        if abs(found_height * width - found_width * height) > max(height, width):
            raise UnreadableImageError(
                f"{path}: it has {found_width} x {found_height} pixels, its annotation says {width} x {height}"
            )
        scale = torch.tensor([found_width / width, found_height / height] * 2)
        return image, boxes * scale, labels, (height, width)

    def __getitem__(self, key: SampleKey) -> LoadedSample:
        skipped: list[tuple[int, str]] = []
        loaded = self._load_from(key.image_index, skipped)
        if loaded is None:
            return LoadedSample(None, tuple(skipped))
        index, image, boxes, labels, original_size = loaded
        used = [index]

        def load_another(source: random.Random) -> tuple[Tensor, Tensor, Tensor]:
            other = self._load_from(source.randrange(len(self)), skipped) or loaded
            used.append(other[0])
            return other[1:4]

        result = apply_transforms(self.augmentation, image, boxes, labels, key.seed, key.progress, load_another)
        sample = self._sample(result, int(self.annotations.image_ids[index]), original_size, key.seed)
        if self.unlabelled is not None:  # of what one of several images says nothing, nothing is known
            sample = sample._replace(silent=self.unlabelled.silent[used].any(dim=0))
        return LoadedSample(sample, tuple(skipped))

    def _load_from(
        self, start: int, skipped: list[tuple[int, str]]
    ) -> tuple[int, Tensor, Tensor, Tensor, tuple[int, int]] | None:
        """The first image from there on that can be read, with its index; None if too many cannot."""
        for attempt in range(min(MAX_REPLACEMENTS, len(self)) if self.training else 1):
            index = (start + attempt) % len(self)
            try:
                image, boxes, labels, original_size = self.load(index)
            except UnreadableImageError as error:
                skipped.append((int(self.annotations.image_ids[index]), str(error)))
                continue
            if self.unlabelled is not None:  # regions go through the transforms as boxes with labels below 0
                regions, of_class = self.unlabelled.regions.targets(index)
                scale = torch.tensor([image.shape[2] / original_size[1], image.shape[1] / original_size[0]] * 2)
                boxes, labels = torch.cat((boxes, regions * scale)), torch.cat((labels, -1 - of_class))
            return index, image, boxes, labels, original_size
        return None

    def _sample(self, result: LabelledImage, image_id: int, original_size: tuple[int, int], seed: int) -> Sample:
        pixels, regions = result.image.as_subclass(Tensor), None
        if self.unlabelled is not None:
            ignored, result = result.keep(result.labels < 0), result.keep(result.labels >= 0)
            regions = relative_boxes(ignored), -1 - ignored.labels
        return Sample(pixels, relative_boxes(result), result.labels, image_id, original_size, seed, regions)


@dataclass(frozen=True, kw_only=True)
class CocoConfig(CocoFiles):
    """One split of a data set in COCO format."""

    name: Literal["coco"] = "coco"
    transforms: tuple[Transform, ...] = ()
    """Augmentation, in order; evaluation allows resizes only."""
    strict_images: bool = False
    """Whether a picture whose last bytes are missing counts as unreadable; else it is decoded as far as it goes."""
    also: tuple[CocoFiles, ...] = ()
    """Further files to train on, with classes merged by name; new classes join at the end."""
    fraction: float = 1.0
    """Share of the images to train on, drawn at random; a larger share holds every smaller one."""
    fraction_seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")

    def build(
        self,
        *,
        split: Split,
        categories: tuple[Category, ...] | None = None,
        unlabelled: bool = False,
        skip_empty: bool = False,
    ) -> CocoDataset:
        """Reads and cleans the annotations.

        Args:
            split: images of "train" that are absent or unreadable are skipped; those of "val" count as missed.
            categories: the classes to map to; None: those of the annotation file.
            unlabelled: whether samples tell crowds, and classes that an image says nothing about, from background.
            skip_empty: whether images without a usable box are left out.

        Raises:
            FileNotFoundError: the annotation file or the image directory does not exist.
            ValueError: the annotations cannot be used, or contradict ``categories``.
        """
        training = split == "train"
        if not training and (self.also or self.fraction < 1.0):
            raise ValueError("data.val: also and fraction are for training, metrics are those of one whole file")
        data = join([files.read(split, categories, unlabelled) for files in (self, *self.also)])
        if self.fraction < 1.0:
            order = torch.randperm(
                len(data.packed.image_ids), generator=torch.Generator().manual_seed(self.fraction_seed)
            )
            data = data.select(order[: math.ceil(self.fraction * len(order))].sort().values)
        if skip_empty:
            empty = data.packed.counts() == 0
            data.report.add_all("image without a box, skipped", empty.nonzero()[:, 0].numpy(), data.packed.file_name)
            data = data.select((~empty).nonzero()[:, 0])
        _doubt_orientations(Path(data.root), data.packed, data.report)
        if training and not len(data.packed.labels):
            raise ValueError(
                f"{self.annotations} has no usable box to train on: "
                f"{'; '.join(data.report.lines()) or 'no annotations'}"
            )
        return CocoDataset(*data[:4], self.transforms, training, self.strict_images, data.unknown)


def _doubt_orientations(root: Path, packed: PackedAnnotations, report: CleaningReport) -> None:
    """Look at the headers of some files from all over a data set: whoever keeps photographs as they were taken, has
    many that are to be turned."""
    count = min(HEADERS_LOOKED_AT, len(packed.image_ids))
    of_many = "" if count == len(packed.image_ids) else f" (of {count} looked at)"
    for index in torch.linspace(0, len(packed.image_ids) - 1, count).round().int().tolist():
        height, width = packed.sizes[index].tolist()
        path = root / packed.file_name(index)
        try:
            doubt = read_header(path).about_orientation((height, width))
        except UnreadableImageError:
            continue
        if doubt:
            report.add(doubt + of_many, packed.file_name(index))
