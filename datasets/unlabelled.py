"""What a COCO annotation file says nothing about: crowds, and classes that nobody looked for in an image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.annotations import Category, PackedAnnotations
from datasets.box_cleaning import CLIPPED, clean_boxes
from ops.annotation_cache import shared
from ops.coco_columns import ImageEntry, is_integer, whole_number
from ops.coco_file import read_coco_file


class PackedUnlabelled(NamedTuple):
    """What the annotations of N images say nothing about, as flat tensors."""

    regions: PackedAnnotations
    """The same images with crowds in the place of boxes."""
    silent: Tensor
    """[N, C] bool, True for classes that an image says nothing about."""

    def select(self, keep: Tensor) -> PackedUnlabelled:
        """The images with these indices (ascending) only."""
        return PackedUnlabelled(self.regions.select(keep), self.silent[keep])


def read_unlabelled(path: str, packed: PackedAnnotations, categories: tuple[Category, ...]) -> PackedUnlabelled:
    """Reads crowds and silent classes; those of large files are shared by the processes of a machine.

    Federated files (LVIS, arXiv 1908.03195) state in ``neg_category_ids`` of an image which classes were looked for and
    not found, and in ``not_exhaustive_category_ids`` of which only some objects are labelled: what is neither labelled
    nor looked for, or is not labelled exhaustively, is unknown.

    Args:
        path: the annotation file.
        packed: its annotations, of all images.
        categories: of the labels.
    """

    def make() -> dict[str, Tensor]:
        content = read_coco_file(path)
        sizes, ids = packed.sizes.numpy().astype(np.int64), np.array([category.id for category in categories])
        only_crowds = content.annotations._replace(crowd=~content.annotations.crowd)
        boxes, _ = clean_boxes(only_crowds, packed.image_ids.numpy(), sizes, ids, path)
        kept = np.flatnonzero(boxes.findings <= CLIPPED)
        kept = kept[np.argsort(boxes.images[kept], kind="stable")]
        return {
            "ends": torch.from_numpy(np.bincount(boxes.images[kept], minlength=len(sizes)).cumsum().astype(np.int64)),
            "boxes": torch.from_numpy(boxes.boxes_xyxy[kept]),
            "labels": torch.from_numpy(boxes.labels[kept].astype(np.int64)),
            "silent": _silent_classes(content.images, packed, categories),
        }

    made = shared(path, f"unlabelled {categories}", make)
    regions = packed._replace(box_ends=made["ends"], boxes=made["boxes"], labels=made["labels"])
    return PackedUnlabelled(regions, made["silent"])


def _silent_classes(entries: list[ImageEntry], packed: PackedAnnotations, categories: tuple[Category, ...]) -> Tensor:
    label_of = {category.id: label for label, category in enumerate(categories)}
    entry_of = {number: entry for entry in reversed(entries) if is_integer(number := whole_number(entry.id))}
    silent = torch.zeros(len(packed.image_ids), len(categories), dtype=torch.bool)
    for index, image_id in enumerate(packed.image_ids.tolist()):
        looked_for, partly = (
            [label_of[i] for i in map(whole_number, ids) if is_integer(i) and i in label_of]
            if isinstance(ids, list)
            else None
            for ids in (entry_of[image_id].neg_category_ids, entry_of[image_id].not_exhaustive_category_ids)
        )
        if looked_for is not None:
            silent[index] = True
            silent[index, looked_for] = False
            silent[index, packed.targets(index)[1]] = False
        silent[index, partly or []] = True
    return silent
