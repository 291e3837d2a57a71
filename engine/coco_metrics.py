"""COCO's bounding-box metrics over plain arrays, computed by whichever library is at hand.

pycocotools defines the numbers. hotcoco, where it is installed, computes the same ones many times faster; a test holds
its statistics and precision arrays equal to those of pycocotools.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ops.annotation_cache import shared
from ops.coco_columns import NO_BOX, NO_CATEGORY_ID, NO_IMAGE_ID, NO_MAPPING, is_integer, whole_number
from ops.coco_file import CocoFile, from_content, read_coco_file
from ops.errors import describe_error

log = logging.getLogger(__name__)

MetricBackend = Literal["auto", "hotcoco", "pycocotools"]

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""In the order of pycocotools."""

Array = NDArray[np.float64]


class GroundTruth:
    """What detections are compared with, as arrays: only the process that computes metrics makes objects of them."""

    def __init__(self, names: dict[int, str], image_ids: Tensor, columns: dict[str, Tensor], unusable: int) -> None:
        self.names = names
        self.image_ids = frozenset(image_ids.tolist())
        """All images, also those without objects."""
        self.columns = {key: column.numpy() for key, column in columns.items()}
        """Usable annotations, [n] or [n, 4] each: image_id, category_id, bbox, area, iscrowd."""
        self.unusable = unusable
        """Annotations left out because they have no finite box, or belong to no image or category of the file."""

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Ascending; the order of the third axis of ``BoxMetrics.precision``."""
        return tuple(sorted(self.names))

    @cached_property
    def content(self) -> dict[str, Any]:
        """In COCO format: images, annotations and categories."""
        return self._content(self.columns["image_id"], self.columns["category_id"], sorted(self.image_ids), self.names)

    @cached_property
    def numbered(self) -> dict[str, Any]:
        """The same with images and categories numbered from 1 in the order of their ids.

        Not every library takes every id (negative ones, very long ones).
        """
        images = np.searchsorted(np.array(sorted(self.image_ids)), self.columns["image_id"]) + 1
        categories = np.searchsorted(np.array(self.category_ids), self.columns["category_id"]) + 1
        names = {number: self.names[category_id] for number, category_id in enumerate(self.category_ids, 1)}
        return self._content(images, categories, range(1, len(self.image_ids) + 1), names)

    def _content(
        self, images: NDArray[Any], categories: NDArray[Any], image_ids: Iterable[int], names: dict[int, str]
    ) -> dict[str, Any]:
        columns = {**self.columns, "image_id": images, "category_id": categories}
        rows = zip(range(1, len(images) + 1), *(column.tolist() for column in columns.values()), strict=True)
        return {
            "info": {},
            "images": [{"id": image_id} for image_id in image_ids],
            "annotations": [dict(zip(("id", *columns), row, strict=True)) for row in rows],
            "categories": [{"id": category_id, "name": names[category_id]} for category_id in sorted(names)],
        }


class BoxMetrics(NamedTuple):
    """Fractions in [0, 1]; -1 where there is no object to find."""

    statistics: Array
    """[12], named by ``STATISTICS``."""
    precision: Array
    """[10 IoU thresholds, 101 recalls, categories, 4 areas (all, s, m, l), 3 detection limits (1, 10, 100)]."""


def read_ground_truth(annotations: Path | str | dict[str, Any]) -> GroundTruth:
    """Takes the annotations as they are, crowds and zero-area boxes included, as pycocotools does.

    Annotations are numbered anew: pycocotools takes an id of 0 for "not matched", and mixes up equal ids.
    ``iscrowd`` is 0 where it is missing; ``area`` is that of the box where it is missing, or not positive though the
    box has one. Flags and numbers are read as training reads them.

    Args:
        annotations: a COCO file, or its content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a COCO file.
    """
    if isinstance(annotations, dict):
        return GroundTruth(**_ground_truth(from_content(annotations), "annotations"))
    path = annotations
    return GroundTruth(**shared(path, "ground truth", lambda: _ground_truth(read_coco_file(path), path)))


def _ground_truth(file: CocoFile, source: Path | str) -> dict[str, Any]:
    if not file.categories:
        raise ValueError(f"{source}: not a COCO annotation file, which has lists of 'images' and 'categories'")
    image_ids = {number for entry in file.images if is_integer(number := whole_number(entry.id))}
    numbered = [(whole_number(entry.get("id")), entry) for entry in file.categories if isinstance(entry, dict)]
    names = {number: str(entry.get("name", number)) for number, entry in numbered if is_integer(number)}
    columns = file.annotations
    usable = columns.odd & (NO_MAPPING | NO_IMAGE_ID | NO_CATEGORY_ID | NO_BOX) == 0
    usable &= np.isfinite(columns.boxes_xywh).all(axis=1)
    known_images, known_categories = (np.array(sorted(ids), dtype=np.int64) for ids in (image_ids, names))
    usable &= np.isin(columns.image_ids, known_images) & np.isin(columns.category_ids, known_categories)
    boxes, areas = columns.boxes_xywh[usable], columns.areas[usable]
    own_areas = boxes[:, 2] * boxes[:, 3]
    kept = {
        "image_id": columns.image_ids[usable],
        "category_id": columns.category_ids[usable],
        "bbox": boxes,
        "area": np.where(np.isfinite(areas) & ((areas > 0) | (own_areas <= 0)), areas, own_areas),
        "iscrowd": columns.crowd[usable].astype(np.int64),
    }
    return {
        "names": names,
        "image_ids": torch.from_numpy(known_images),
        "columns": {key: torch.from_numpy(column) for key, column in kept.items()},
        "unusable": int((~usable).sum()),
    }


def choose_backend(backend: MetricBackend) -> Literal["hotcoco", "pycocotools"]:
    """The library behind "auto": the fastest one that is installed."""
    if backend == "auto":
        return "hotcoco" if find_spec("hotcoco") else "pycocotools"
    return backend


def box_metrics(ground_truth: GroundTruth, detections: Array, backend: MetricBackend = "auto") -> BoxMetrics:
    """Compares detections with the ground truth by COCO's rules.

    Args:
        ground_truth: of ``read_ground_truth``.
        detections: [n, 7] rows of image id, x, y, width, height, score, category id; images must be known. Detections
            of categories that the ground truth lacks count nowhere, as in pycocotools.
        backend: the library that computes.
    """
    images = np.array(sorted(ground_truth.image_ids), dtype=np.int64)
    categories = np.array(ground_truth.category_ids, dtype=np.int64)
    detections = detections[np.isin(detections[:, 6].astype(np.int64), categories)]
    detections[:, 0] = np.searchsorted(images, detections[:, 0].astype(np.int64)) + 1
    detections[:, 6] = np.searchsorted(categories, detections[:, 6].astype(np.int64)) + 1
    content = ground_truth.numbered
    something_to_compare = len(detections) > 0 and len(content["annotations"]) > 0
    if something_to_compare and choose_backend(backend) == "hotcoco":
        try:
            return _evaluate(_hotcoco, content, detections)
        except Exception as error:
            if backend != "auto":
                raise
            # It saves time, but is young, and no evaluation may depend on it.
            log.warning("hotcoco fails (%s): pycocotools computes the metrics instead", describe_error(error))
    return _evaluate(_pycocotools, content, detections)


def _evaluate(
    prepare: Callable[[dict[str, Any], Array], Any], content: dict[str, Any], detections: Array
) -> BoxMetrics:
    # Both libraries print their progress; what matters is returned.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = prepare(content, detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return BoxMetrics(
        np.asarray(evaluation.stats, dtype=np.float64), np.asarray(evaluation.eval["precision"], dtype=np.float64)
    )


def _hotcoco(content: dict[str, Any], detections: Array) -> Any:
    import hotcoco

    truth = hotcoco.COCO(content)
    return hotcoco.COCOeval(truth, truth.loadRes(detections), "bbox")


def _pycocotools(content: dict[str, Any], detections: Array) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), COCO()
    # A copy of the rows, which pycocotools writes its own entries into.
    truth.dataset = {**content, "annotations": [dict(row) for row in content["annotations"]]}
    truth.createIndex()
    if len(detections):
        found = truth.loadRes(detections)
    else:  # which loadRes cannot take
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
    return COCOeval(truth, found, "bbox")
