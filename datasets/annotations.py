"""Reading COCO annotation files: cleaned for training, and packed so that worker processes share them.

Python objects cannot be shared between processes: reading them touches their reference counts, so that every worker
of a data loader ends up with its own copy of a hundred thousand dictionaries. Here everything lives in a few flat
tensors. They are never written after construction: forked workers share their pages, and torch's pickling hands them to
spawned workers through shared memory.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.box_cleaning import CLIPPED, FINDINGS, clean_boxes
from ops.coco_columns import (
    CROWD_AS_TEXT,
    CROWD_UNCLEAR,
    NO_ID,
    NO_MAPPING,
    AnnotationColumns,
    ImageEntry,
    whole_number,
)
from ops.coco_file import CocoFile

MAX_EXAMPLES = 5


class Category(NamedTuple):
    """One class; its index in ``categories`` is the label."""

    id: int
    """As in the annotation file; ids may have gaps."""
    name: str


@dataclass
class CleaningReport:
    """What was wrong with an annotation file, what was done about it, and where."""

    counts: dict[str, int] = field(default_factory=dict)
    """How often, by kind of finding."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few places of each kind."""

    def add(self, kind: str, where: str) -> None:
        """Count one place."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(shown := self.examples.setdefault(kind, [])) < MAX_EXAMPLES:
            shown.append(where)

    def add_all(self, kind: str, places: NDArray[Any], describe: Callable[[int], str]) -> None:
        """Count all places, of which the first few are described."""
        for place in places[:MAX_EXAMPLES].tolist():
            self.add(kind, describe(place))
        self.counts[kind] = self.counts.get(kind, 0) + max(len(places) - MAX_EXAMPLES, 0)
        if not self.counts[kind]:
            del self.counts[kind]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self) -> list[str]:
        """One line for each kind of finding, the most frequent first."""
        ordered = sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))
        return [f"{self.counts[kind]} x {kind} ({', '.join(self.examples[kind])})" for kind in ordered]


class PackedAnnotations(NamedTuple):
    """Cleaned annotations of N images with G boxes altogether, as flat tensors."""

    image_ids: Tensor
    """[N] int64, ascending."""
    sizes: Tensor
    """[N, 2] int32 (height, width) as the file states them; 0 where it does not."""
    name_bytes: Tensor
    """All file names in UTF-8, one after the other."""
    name_ends: Tensor
    """[N] int64 end of each name in ``name_bytes``."""
    box_ends: Tensor
    """[N] int64 end of each image's boxes in ``boxes``."""
    boxes: Tensor
    """[G, 4] float32 xyxy in pixels, inside the image, of positive area."""
    labels: Tensor
    """[G] int64 in 0..C-1."""

    def file_name(self, index: int) -> str:
        start = int(self.name_ends[index - 1]) if index else 0
        return bytes(self.name_bytes[start : int(self.name_ends[index])].numpy()).decode()

    def file_names(self) -> list[str]:
        """All of them, much faster than one by one."""
        names, ends = self.name_bytes.numpy().tobytes(), [0, *self.name_ends.tolist()]
        return [names[start:end].decode() for start, end in itertools.pairwise(ends)]

    def counts(self) -> Tensor:
        """[N] int64 number of boxes of each image."""
        return torch.diff(self.box_ends, prepend=torch.zeros(1, dtype=torch.int64))

    def targets(self, index: int) -> tuple[Tensor, Tensor]:
        """(boxes [n, 4] xyxy in pixels, labels [n]) of one image, as copies."""
        start, end = int(self.box_ends[index - 1]) if index else 0, int(self.box_ends[index])
        return self.boxes[start:end].clone(), self.labels[start:end].clone()

    def select(self, keep: Tensor) -> PackedAnnotations:
        """The images with these indices (ascending) only."""
        counts = self.counts()
        kept = torch.zeros(len(self.image_ids), dtype=torch.bool)
        kept[keep] = True
        own_names = self.file_names()
        names = "".join(own_names[i] for i in keep.tolist()).encode()
        lengths = torch.diff(self.name_ends, prepend=torch.zeros(1, dtype=torch.int64))
        of_kept = kept.repeat_interleave(counts)
        return PackedAnnotations(
            self.image_ids[keep],
            self.sizes[keep],
            torch.frombuffer(bytearray(names), dtype=torch.uint8) if names else torch.empty(0, dtype=torch.uint8),
            lengths[keep].cumsum(0),
            counts[keep].cumsum(0),
            self.boxes[of_kept],
            self.labels[of_kept],
        )


def read_categories(content: CocoFile, path: Path | str) -> tuple[Category, ...]:
    """The categories in the order of their ids, so that labels do not depend on the order in the file.

    A category without a name is named by its id.

    Raises:
        ValueError: there are none, an id is missing or is given twice.
    """
    names: dict[int, str] = {}
    for entry in content.categories:
        category_id = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        if not _is_id(category_id):
            raise ValueError(f"{path}: a category has no integer 'id' of less than 53 bits: {entry!r:.80}")
        if category_id in names:
            raise ValueError(f"{path}: category id {category_id} is given twice")
        names[category_id] = _name(entry) or str(category_id)
    if not names:
        raise ValueError(f"{path} has no 'categories'")
    return tuple(Category(category_id, names[category_id]) for category_id in sorted(names))


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and abs(value) < 2**53  # beyond, a double no longer tells them apart


def _name(category: dict[str, Any]) -> str:
    name = category.get("name")
    return name.removeprefix("\ufeff") if isinstance(name, str) and name.strip("\ufeff \t\r\n") else ""


def _doubt_categories(content: CocoFile, report: CleaningReport) -> None:
    entries = [entry for entry in content.categories if isinstance(entry, dict)]
    times = Counter(_name(entry) for entry in entries)
    for entry in entries:
        name, where = _name(entry), f"category {entry.get('id')}"
        if not name:
            report.add("category whose name is empty or no text, named by its id", where)
        elif times[name] > 1:
            report.add("category that shares its name with another, kept apart by its id", f"{where}: {name}")
        if name != " ".join(name.split()):
            report.add("category whose name has spaces around it, several in a row or line breaks, kept so", repr(name))


class _Images(NamedTuple):
    """The usable images of a file, by id."""

    ids: NDArray[np.int64]
    """[N] ascending."""
    sizes: NDArray[np.int64]
    """[N, 2] (height, width); 0 where the file does not state it."""
    names: list[str]


def _plain_images(entries: Sequence[ImageEntry]) -> _Images | None:
    """All of them, column by column, or None where one of them is odd: of millions, a few seconds sooner."""
    ids, names = [entry.id for entry in entries], [entry.file_name for entry in entries]
    sides = [entry.height for entry in entries], [entry.width for entry in entries]
    if {*map(type, ids), *map(type, sides[0]), *map(type, sides[1])} != {int} or {*map(type, names)} != {str}:
        return None
    if len(set(ids)) < len(ids) or len(set(names)) < len(names) or not all(names) or not "".join(names).isascii():
        return None
    if min(ids) <= -(2**53) or max(ids) >= 2**53 or min(map(min, sides)) <= 0 or max(map(max, sides)) >= 2**31:
        return None
    sorted_ids, order = np.unique(np.array(ids, dtype=np.int64), return_index=True)
    return _Images(sorted_ids, np.array(sides, dtype=np.int64).T[order], [names[place] for place in order])


def _read_images(entries: Sequence[ImageEntry], path: Path | str, report: CleaningReport) -> _Images:
    if (plain := _plain_images(entries)) is not None:
        return plain
    names: dict[int, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    ids_of: dict[str, int] = {}
    for place, entry in enumerate(entries):
        image_id, name = whole_number(entry.id), entry.file_name
        if image_id is None:
            report.add("image without an id, dropped", f"entry {place + 1} of 'images'")
            continue
        if not _is_id(image_id):
            raise ValueError(f"{path}: image ids must be integers of less than 53 bits, got {image_id!r:.60}")
        if not isinstance(name, str) or not name or not (name.isascii() or _can_be_written(name)):
            report.add("image without a file name, dropped", f"image {image_id}")
            continue
        if image_id in names:
            if names[image_id] != name:
                raise ValueError(f"{path}: image id {image_id} is given to both {names[image_id]!r} and {name!r}")
            report.add("image listed twice, kept once", f"image {image_id}")
            continue
        if (first := ids_of.setdefault(name, image_id)) != image_id:
            report.add("file listed as two images, each with its own boxes", f"{name}: images {first} and {image_id}")
        height, width = whole_number(entry.height), whole_number(entry.width)
        if type(height) is not int or type(width) is not int or not (0 < height < 2**31 and 0 < width < 2**31):
            report.add("image without a usable width and height, taken from its file", f"image {image_id}")
            height = width = 0
        names[image_id], sizes[image_id] = name, (height, width)
    if not names:
        raise ValueError(f"{path} lists no usable image")
    order = sorted(names)
    return _Images(
        np.array(order, dtype=np.int64),
        np.array([sizes[image_id] for image_id in order], dtype=np.int64),
        [names[image_id] for image_id in order],
    )


def _can_be_written(name: str) -> bool:
    """Whether it is not half a letter, which JSON can escape."""
    return name.encode(errors="ignore").decode() == name


def pack_annotations(
    content: CocoFile, path: Path | str, categories: tuple[Category, ...]
) -> tuple[PackedAnnotations, CleaningReport]:
    """Cleans what ``ops.coco_file.read_coco_file`` returned and packs it.

    Dropped: boxes that are missing, not finite, of zero area or outside the image, crowds, boxes of unknown categories
    or images, and exact repetitions. Boxes that reach beyond the image are clipped. Images without boxes are kept.
    What can be read but is not as COCO has it is reported.

    Raises:
        ValueError: image ids are not integers or name two files, no image is usable, or boxes are no pixels.
    """
    report = CleaningReport()
    _doubt_categories(content, report)
    images = _read_images(content.images, path, report)
    columns = content.annotations
    boxes, doubts = clean_boxes(
        columns, images.ids, images.sizes, np.array([category.id for category in categories]), path
    )
    _report_annotations(columns, report)
    for code, kind in FINDINGS.items():
        report.add_all(kind, np.flatnonzero(boxes.findings == code), lambda place: _where(columns, place))
    for kind, mask in doubts.items():
        report.add_all(kind, np.flatnonzero(mask), lambda place: _where(columns, place))
    names = [name.encode() for name in images.names]
    kept = np.flatnonzero(boxes.findings <= CLIPPED)
    kept = kept[np.argsort(boxes.images[kept], kind="stable")]
    counts = np.bincount(boxes.images[kept], minlength=len(names))
    packed = PackedAnnotations(
        torch.from_numpy(images.ids),
        torch.from_numpy(images.sizes.astype(np.int32)),
        torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
        torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0),
        torch.from_numpy(counts.cumsum().astype(np.int64)),
        torch.from_numpy(boxes.boxes_xyxy[kept]),
        torch.from_numpy(boxes.labels[kept].astype(np.int64)),
    )
    return packed, report


def _report_annotations(columns: AnnotationColumns, report: CleaningReport) -> None:
    """What is odd about entries whatever their box is."""
    no_id, mapping = columns.odd & NO_ID > 0, columns.odd & NO_MAPPING == 0
    report.add_all(
        "annotation without an integer id, kept",
        np.flatnonzero(no_id),
        lambda place: f"image {columns.image_ids[place]}",
    )
    numbered = np.flatnonzero(~no_id & mapping)
    ids = columns.ids[numbered]
    if (ids[1:] <= ids[:-1]).any():
        order = np.argsort(ids, kind="stable")
        again = np.sort(numbered[order[1:][ids[order[1:]] == ids[order[:-1]]]])
        report.add_all("annotation id given twice, kept", again, lambda place: _where(columns, place))
    for bit, kind in (
        (CROWD_AS_TEXT, "iscrowd written as text, read as it says"),
        (CROWD_UNCLEAR, "iscrowd that is neither 0 nor 1, taken for a crowd"),
    ):
        report.add_all(kind, np.flatnonzero(columns.odd & bit), lambda place: _where(columns, place))


def _where(columns: AnnotationColumns, place: int) -> str:
    return columns.shown.get(place) or f"annotation {columns.ids[place]}"
