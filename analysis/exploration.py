"""Detections as columns of small integers, for a page on which each of millions can be pointed at.

What is wrong with a detection is what ``error_types`` says; its IoU is that with the object it is judged by.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.average_precision import class_precision, match_dataset
from analysis.best_regressed import SIZES, BestRegressed
from analysis.error_types import BOTH, DUPLICATE, classify_errors
from analysis.matching import (
    IOU_THRESHOLDS,
    Floats,
    ImageDetections,
    ImageObjects,
    Integers,
    box_areas,
    pairwise_iou,
)

SCALE = 60_000
"""Scores and IoUs are stored as this many steps, rounded down: multiples of 1/200 lie on a step, so that a stored score
reaches a threshold of the page exactly where the score does."""
EDGE = 65_535
"""Coordinates of boxes are stored as so many steps of the width or height of their image."""

Columns = dict[str, NDArray[Any]]
"""Arrays of equal meaning over a data set, image after image; ``count`` [I] says how many entries each image has."""


class Judged(NamedTuple):
    """The detections of an image with what they are judged by; those of crowds and beyond COCO's limit are absent."""

    detections: ImageDetections
    """N of them, best first."""
    kind: Integers
    """[N] CORRECT … BACKGROUND_ERROR of :mod:`analysis.error_types`."""
    target: Integers
    """[N] index among the objects of the image, −1 for an error of the background."""
    iou: Floats
    """[N] with the target; with the nearest object, where there is none."""


def judge(objects: ImageObjects, detections: ImageDetections) -> Judged:
    """Say of each detection of an image how it is wrong and which object it is compared with.

    A duplicate is compared with the object of its class that it overlaps most, and one of wrong class and place with
    the object that it overlaps most. The detections may be in any order and number.
    """
    errors = classify_errors(objects, detections)
    found, kind = errors.detections, errors.kind
    iou = pairwise_iou(found.boxes_xyxy, objects.boxes_xyxy[errors.object_index])
    if not len(errors.labels):
        return Judged(found, kind, np.full(len(kind), -1), np.zeros(len(kind)))
    own = np.where(found.labels[:, None] == errors.labels[None], iou, -1.0)
    nearest = np.where(kind == DUPLICATE, own.argmax(axis=1), iou.argmax(axis=1))
    judged_by = np.where(errors.target >= 0, errors.target, nearest)
    has_target = (errors.target >= 0) | (kind == DUPLICATE) | (kind == BOTH)
    target = np.where(has_target, errors.object_index[judged_by], -1)
    return Judged(found, kind, target, iou[np.arange(len(kind)), judged_by])


def detection_columns(
    objects: Sequence[ImageObjects], detections: Sequence[ImageDetections], sizes: Sequence[tuple[int, int]]
) -> Columns:
    """All judged detections of a data set, given objects, detections and (height, width) in pixels of each image."""
    judged = [judge(truth, found) for truth, found in zip(objects, detections, strict=True)]
    return {
        "count": np.array([len(image.kind) for image in judged], dtype=np.uint32),
        "score": _steps([image.detections.scores for image in judged]),
        "iou": _steps([image.iou for image in judged]),
        "label": _joined([image.detections.labels for image in judged], np.uint16),
        "kind": _joined([image.kind for image in judged], np.uint8),
        "target": _joined([image.target for image in judged], np.int16),
        "size": _joined([_sizes(box_areas(image.detections.boxes_xyxy)) for image in judged], np.uint8),
        "box": _edges([image.detections.boxes_xyxy for image in judged], sizes),
    }


def object_columns(objects: Sequence[ImageObjects], sizes: Sequence[tuple[int, int]]) -> Columns:
    """All objects of a data set; arguments as in :func:`detection_columns`."""
    return {
        "count": np.array([len(image.labels) for image in objects], dtype=np.uint32),
        "label": _joined([image.labels for image in objects], np.uint16),
        "size": _joined([_sizes(image.areas) for image in objects], np.uint8),
        "crowd": _joined([image.crowd for image in objects], np.uint8),
        "box": _edges([image.boxes_xyxy for image in objects], sizes),
    }


def best_regressed_columns(best: Sequence[BestRegressed], sizes: Sequence[tuple[int, int]]) -> Columns:
    """The best-regressed query of each object that is no crowd, in their order, given those of each image."""
    return {
        "score": _steps([image.score for image in best]),
        "iou": _steps([image.iou for image in best]),
        "confident": _joined([image.rank < image.num_targets for image in best], np.uint8),
        "box": _edges([image.boxes_xyxy for image in best], sizes),
    }


def precision_summary(
    objects: Sequence[ImageObjects], detections: Sequence[ImageDetections], num_classes: int
) -> list[dict[str, Any]]:
    """COCO's AP and precision of each class, ready for JSON, given objects and detections of each image.

    Returns:
        By label ``objects`` (crowds not counted), ``ap``: AP, AP50 and AP75 in percent, and ``precision``: the three
        curves over the 101 recalls; both None for a class without objects.
    """
    summary: list[dict[str, Any]] = []
    at_75 = int(np.searchsorted(IOU_THRESHOLDS, 0.75 - 1e-9))
    for found in match_dataset(objects, detections, num_classes).classes:
        total, precision = int(found.objects.sum()), class_precision(found)
        if precision is None:
            summary.append({"objects": total, "ap": None, "precision": None})
            continue
        curves = np.stack([precision.mean(axis=0), precision[0], precision[at_75]])
        ap = [round(100 * float(value), 4) for value in curves.mean(axis=1)]
        summary.append({"objects": total, "ap": ap, "precision": curves.round(4).tolist()})
    return summary


def encoded(columns: Columns) -> dict[str, list[str]]:
    """Each column as the name of its JavaScript array and its bytes: little-endian, compressed by gzip, in base64."""
    result = {}
    for name, values in columns.items():
        little = values.astype(values.dtype.newbyteorder("<"))
        compressed = gzip.compress(little.tobytes(), compresslevel=6, mtime=0)
        result[name] = [f"{values.dtype.name.capitalize()}Array", base64.b64encode(compressed).decode()]
    return result


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *(part.astype(dtype) for part in parts)])


def _sizes(areas: Floats) -> Integers:
    """0, 1 and 2 for COCO's small, medium and large areas in square pixels."""
    return np.digitize(areas, [SIZES["medium"][0], SIZES["large"][0]])


def _steps(parts: Sequence[Floats]) -> NDArray[Any]:
    """Shares in [0, 1] as steps of ``SCALE``; what rounding errors have put just below a step belongs to it."""
    return _joined([np.floor(part.clip(0, 1) * SCALE + 1e-6) for part in parts], np.uint16)


def _edges(boxes_xyxy: Sequence[Floats], sizes: Sequence[tuple[int, int]]) -> NDArray[Any]:
    """[4 N] corners in steps of ``EDGE`` of the width and height of their image."""
    relative = [
        (boxes / np.maximum([width, height, width, height], 1)).clip(0, 1) * EDGE
        for boxes, (height, width) in zip(boxes_xyxy, sizes, strict=True)
    ]
    return _joined([np.rint(part).reshape(-1) for part in relative], np.uint16)
