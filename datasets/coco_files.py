"""Annotation files with their images: read, cleaned, and several of them joined."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.annotations import (
    MAX_EXAMPLES,
    Category,
    CleaningReport,
    PackedAnnotations,
    pack_annotations,
    read_categories,
)
from datasets.image_files import absent_files, explain_absence
from datasets.unlabelled import PackedUnlabelled, read_unlabelled
from ops.annotation_cache import shared
from ops.coco_columns import NO_CATEGORY_ID
from ops.coco_file import CocoFile, read_coco_file

Split = Literal["train", "val"]


class FileContent(NamedTuple):
    """What annotation files say about images that are there."""

    root: str
    """Directory of the images."""
    packed: PackedAnnotations
    """Cleaned."""
    categories: tuple[Category, ...]
    """Index = label."""
    report: CleaningReport
    """What was cleaned away."""
    unknown: PackedUnlabelled | None
    """What is no background though it is not labelled, where it was asked for."""

    def select(self, keep: Tensor) -> FileContent:
        """The images with these indices (ascending) only."""
        unknown = self.unknown and self.unknown.select(keep)
        return self._replace(packed=self.packed.select(keep), unknown=unknown)


@dataclass(frozen=True, kw_only=True)
class CocoFiles:
    """Images and their annotations."""

    images: str
    """Directory of the image files."""
    annotations: str
    """COCO annotation file (JSON)."""

    def read(self, split: Split, categories: tuple[Category, ...] | None, unlabelled: bool) -> FileContent:
        """Annotations of the images that are there; see ``CocoConfig.build``."""
        self._check_paths(split)
        own, packed, report = _read(self.annotations, categories)
        unknown = read_unlabelled(self.annotations, packed, categories or own) if unlabelled else None
        training = split == "train"
        root = Path(self.images)
        absent = absent_files(root, packed.file_names())
        consequence = "skipped" if training else "its objects count as missed"
        report.add_all(
            f"image listed but absent, {consequence}",
            np.array(absent, dtype=np.int64),
            lambda index: packed.file_name(index) + explain_absence(root, packed.file_name(index)),
        )
        if len(absent) == len(packed.image_ids):
            reasons = ((name, explain_absence(root, name)) for name in packed.file_names()[:MAX_EXAMPLES])
            name, why = next((both for both in reasons if both[1]), (packed.file_name(0), ""))
            remedy = "write the names as they are there" if why else f"set data.{split}.images to their directory"
            raise FileNotFoundError(
                f"none of the {len(absent)} images of {self.annotations} is in {self.images} "
                f"(such as {name!r}{why}): {remedy}"
            )
        content = FileContent(self.images, packed, categories or own, report, unknown)
        if not training or not absent:
            return content
        present = torch.ones(len(packed.image_ids), dtype=torch.bool)
        present[torch.tensor(absent)] = False
        return content.select(present.nonzero()[:, 0])

    def _check_paths(self, split: Split) -> None:
        hint = (
            f"data.{split}.annotations must name a COCO-format JSON file and data.{split}.images the directory of its "
            "images; to try without data of your own run `make quickstart`"
        )
        if not Path(self.annotations).is_file():
            raise FileNotFoundError(f"no annotation file {self.annotations}: {hint}")
        if not Path(self.images).is_dir():
            raise FileNotFoundError(f"no image directory {self.images}: {hint}")


def join(parts: Sequence[FileContent]) -> FileContent:
    """One after the other, with classes merged by name, images named by their whole path, and image ids made unique."""
    if len(parts) == 1:
        return parts[0]
    categories, label_of, report = list(parts[0].categories), [], CleaningReport()
    for part in parts:
        for category in part.categories:
            if category.name not in [known.name for known in categories]:
                taken = [known.id for known in categories]
                number = category.id if category.id not in taken else max(taken) + 1
                categories.append(Category(number, category.name))
        names = [known.name for known in categories]
        label_of.append(torch.tensor([names.index(category.name) for category in part.categories]))
        for kind, count in part.report.counts.items():
            report.counts[kind] = report.counts.get(kind, 0) + count
            report.examples.setdefault(kind, []).extend(part.report.examples[kind])
    unknown = None
    if regions := [part.unknown.regions for part in parts if part.unknown is not None]:
        # A file says nothing about classes that it does not have.
        silent = [torch.ones(len(part.packed.image_ids), len(categories), dtype=torch.bool) for part in parts]
        for part, labels, own in zip(parts, label_of, silent, strict=True):
            own[:, labels] = part.unknown.silent if part.unknown is not None else False
        unknown = PackedUnlabelled(_join_packed(parts, regions, label_of), torch.cat(silent))
    packed = _join_packed(parts, [part.packed for part in parts], label_of)
    return FileContent(parts[0].root, packed, tuple(categories), report, unknown)


def _join_packed(
    parts: Sequence[FileContent], packed: Sequence[PackedAnnotations], label_of: Sequence[Tensor]
) -> PackedAnnotations:
    names: list[bytes] = []
    ids: list[Tensor] = []
    ends: list[Tensor] = []
    for part, own in zip(parts, packed, strict=True):
        names += [os.path.join(os.path.abspath(part.root), name).encode() for name in own.file_names()]
        last, first = (int(ids[-1][-1]) if ids else -1), int(own.image_ids[0])
        ids.append(own.image_ids + max(last + 1 - first, 0))
        ends.append(own.box_ends + (int(ends[-1][-1]) if ends else 0))
    return PackedAnnotations(
        torch.cat(ids),
        torch.cat([own.sizes for own in packed]),
        torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
        torch.tensor([len(name) for name in names]).cumsum(0),
        torch.cat(ends),
        torch.cat([own.boxes for own in packed]),
        torch.cat([labels[own.labels] for labels, own in zip(label_of, packed, strict=True)]),
    )


def _read(
    path: str, expected: tuple[Category, ...] | None
) -> tuple[tuple[Category, ...], PackedAnnotations, CleaningReport]:
    """The categories, annotations and findings of a file; large ones are shared by the processes of a machine."""

    def make() -> dict[str, Any]:
        content = read_coco_file(path)
        own = read_categories(content, path)
        if expected is not None:
            _check_categories(own, expected, content, path)
        packed, report = pack_annotations(content, path, expected or own)
        categories = [list(category) for category in own]
        return {"categories": categories, "packed": list(packed), "counts": report.counts, "examples": report.examples}

    made = shared(path, f"packed {expected}", make)
    own = tuple(Category(*category) for category in made["categories"])
    return own, PackedAnnotations(*made["packed"]), CleaningReport(made["counts"], made["examples"])


def _check_categories(own: tuple[Category, ...], expected: tuple[Category, ...], content: CocoFile, path: str) -> None:
    names = dict(expected)
    for category in own:
        if category.id in names and names[category.id] != category.name:
            raise ValueError(
                f"{path}: category {category.id} is {category.name!r}, but {names[category.id]!r} in the training data"
            )
    unknown = {category.id: category.name for category in own if category.id not in names}
    columns = content.annotations
    found = set(np.unique(columns.category_ids[columns.odd & NO_CATEGORY_ID == 0]).tolist()) if unknown else set()
    if contradicting := sorted(unknown.keys() & found):
        shown = ", ".join(f"{category_id} ({unknown[category_id]})" for category_id in contradicting[:5])
        raise ValueError(f"{path}: it has objects of categories that the training data does not know: {shown}")
