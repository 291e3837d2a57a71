"""Reading COCO annotation files: cleaned for training, and packed so that worker processes share them.

Python objects cannot be shared between processes: reading them touches their reference counts, so that every worker
of a data loader ends up with its own copy of a hundred thousand dictionaries. Here everything lives in a few flat
tensors. They are never written after construction: forked workers share their pages, and torch's pickling hands them to
spawned workers through shared memory.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

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
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(shown := self.examples.setdefault(kind, [])) < MAX_EXAMPLES:
            shown.append(where)

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

    def targets(self, index: int) -> tuple[Tensor, Tensor]:
        """(boxes [n, 4] xyxy in pixels, labels [n]) of one image, as copies."""
        start, end = int(self.box_ends[index - 1]) if index else 0, int(self.box_ends[index])
        return self.boxes[start:end].clone(), self.labels[start:end].clone()

    def select(self, keep: Tensor) -> PackedAnnotations:
        """The images with these indices (ascending) only."""
        counts = torch.diff(self.box_ends, prepend=torch.zeros(1, dtype=torch.int64))
        kept = torch.zeros(len(self.image_ids), dtype=torch.bool)
        kept[keep] = True
        names = "".join(self.file_name(int(i)) for i in keep).encode()
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


def read_annotation_file(path: Path | str) -> dict[str, Any]:
    """Loads a COCO annotation file without its segmentations, which detection has no use for and which are most of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not COCO JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file {path}")
    try:
        with path.open(encoding="utf-8") as stream:
            content = json.load(stream, object_hook=_without_segmentation)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{path} is not a COCO annotation file: it has no list of 'images'")
    for key in ("annotations", "categories"):
        if not isinstance(content.setdefault(key, []), list):
            raise ValueError(f"{path} is not a COCO annotation file: '{key}' is not a list")
    return content


def _without_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_categories(content: dict[str, Any], path: Path | str) -> tuple[Category, ...]:
    """The categories in the order of their ids, so that labels do not depend on the order in the file.

    Raises:
        ValueError: there are none, an id is missing or is given twice.
    """
    names: dict[int, str] = {}
    for entry in content["categories"]:
        if not isinstance(entry, dict) or not _is_integer(entry.get("id")):
            raise ValueError(f"{path}: a category has no integer 'id': {entry!r:.80}")
        if entry["id"] in names:
            raise ValueError(f"{path}: category id {entry['id']} is given twice")
        names[entry["id"]] = str(entry.get("name", entry["id"]))
    if not names:
        raise ValueError(f"{path} has no 'categories'")
    return tuple(Category(category_id, names[category_id]) for category_id in sorted(names))


def _read_images(content: dict[str, Any], path: Path | str, report: CleaningReport) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for entry in content["images"]:
        if not isinstance(entry, dict) or "id" not in entry:
            report.add("image without an id, dropped", f"{entry!r:.60}")
            continue
        image_id, name = entry["id"], entry.get("file_name")
        if not _is_integer(image_id) or abs(image_id) >= 2**53:  # beyond, a double no longer tells them apart
            raise ValueError(f"{path}: image ids must be integers of less than 53 bits, got {image_id!r:.60}")
        if not isinstance(name, str) or not name:
            report.add("image without a file name, dropped", f"image {image_id}")
            continue
        if image_id in images:
            if images[image_id]["file_name"] != name:
                raise ValueError(
                    f"{path}: image id {image_id} is given to both {images[image_id]['file_name']!r} and {name!r}"
                )
            report.add("image listed twice, kept once", f"image {image_id}")
            continue
        images[image_id] = entry
    if not images:
        raise ValueError(f"{path} lists no usable image")
    return dict(sorted(images.items()))


def _stated_size(entry: dict[str, Any]) -> tuple[int, int]:
    """(height, width) as stated, or (0, 0)."""
    sides = entry.get("height"), entry.get("width")
    height, width = (side if _is_integer(side) else 0 for side in sides)
    return (height, width) if 0 < height < 2**31 and 0 < width < 2**31 else (0, 0)


def _clean_box(annotation: dict[str, Any], size: tuple[int, int]) -> tuple[list[float] | None, str]:
    """(box xyxy inside the image or None, what is wrong with it or nothing)."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or [value for value in box if not _is_number(value)] or len(box) != 4:
        return None, "box missing or not four numbers, dropped"
    try:
        x, y, width, height = map(float, box)
    except OverflowError:  # an integer of hundreds of digits
        x = y = width = height = math.inf
    if not math.isfinite(x + y + width + height):
        return None, "box with NaN or infinity, dropped"
    if width <= 0 or height <= 0:
        return None, "box of zero or negative size, dropped"
    x1, y1 = x + width, y + height
    limit_y, limit_x = size if size != (0, 0) else (math.inf, math.inf)
    clipped = [max(x, 0.0), max(y, 0.0), min(x1, limit_x), min(y1, limit_y)]
    # In float32, as it will be stored: a sliver may have no width there.
    low_x, low_y, high_x, high_y = np.asarray(clipped, dtype=np.float32)
    if not (low_x < high_x and low_y < high_y):
        return None, "box outside the image, dropped"
    # Annotation tools round: only what is off by more than a pixel is worth a word.
    overhang = max(-x, -y, x1 - limit_x, y1 - limit_y)
    return clipped, "box reaching beyond the image, clipped" if overhang > 1.0 else ""


def pack_annotations(
    content: dict[str, Any], path: Path | str, categories: tuple[Category, ...]
) -> tuple[PackedAnnotations, CleaningReport]:
    """Cleans what ``read_annotation_file`` returned and packs it.

    Dropped: boxes that are missing, not finite, of zero area or outside the image, crowds, boxes of unknown categories
    or images, and exact repetitions. Boxes that reach beyond the image are clipped. Images without boxes are kept.

    Raises:
        ValueError: image ids are not integers or name two files, or no image is usable.
    """
    report = CleaningReport()
    images = _read_images(content, path, report)
    label_of = {category.id: label for label, category in enumerate(categories)}
    sizes = {image_id: _stated_size(entry) for image_id, entry in images.items()}
    for unsized in (image_id for image_id, size in sizes.items() if size == (0, 0)):
        report.add("image without a usable width and height, taken from its file", f"image {unsized}")

    found: dict[int, list[tuple[list[float], int]]] = defaultdict(list)
    annotation_ids: set[object] = set()
    repeated: dict[int, set[tuple[float, ...]]] = defaultdict(set)
    for annotation in content["annotations"]:
        if not isinstance(annotation, dict):
            report.add("annotation that is not a mapping, dropped", f"{annotation!r:.40}")
            continue
        annotation_id, image_id = annotation.get("id"), annotation.get("image_id")
        where = f"annotation {annotation_id}"
        if not _is_integer(annotation_id):
            report.add("annotation without an integer id, kept", f"image {image_id}")
        elif annotation_id in annotation_ids:
            report.add("annotation id given twice, kept", where)
        else:
            annotation_ids.add(annotation_id)
        if not _is_integer(image_id) or image_id not in images:
            report.add("annotation of an unknown image, dropped", where)
        elif not _is_integer(annotation.get("category_id")) or annotation["category_id"] not in label_of:
            report.add("box of an unknown category, dropped", where)
        elif annotation.get("iscrowd"):
            report.add("crowd, dropped", where)
        else:
            box, finding = _clean_box(annotation, sizes[image_id])
            label = label_of[annotation["category_id"]]
            if box is not None and (key := (*box, label)) in repeated[image_id]:
                box, finding = None, "box given twice, kept once"
            elif box is not None:
                repeated[image_id].add(key)
                found[image_id].append((box, label))
            if finding:
                report.add(finding, where)
    return _pack(images, sizes, found), report


def _pack(
    images: dict[int, dict[str, Any]],
    sizes: dict[int, tuple[int, int]],
    found: dict[int, list[tuple[list[float], int]]],
) -> PackedAnnotations:
    names = [entry["file_name"].encode() for entry in images.values()]
    boxes = [box for image_id in images for box, _ in found.get(image_id, ())]
    labels = [label for image_id in images for _, label in found.get(image_id, ())]
    return PackedAnnotations(
        torch.tensor(list(images), dtype=torch.int64),
        torch.tensor([sizes[image_id] for image_id in images], dtype=torch.int32).reshape(-1, 2),
        torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
        torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0),
        torch.tensor([len(found.get(image_id, ())) for image_id in images], dtype=torch.int64).cumsum(0),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
    )
