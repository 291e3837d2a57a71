"""Annotations and detections of a data set as the values the analysis works on, in the same order of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from analysis.matching import Floats, ImageDetections, ImageObjects
from engine.coco_metrics import GroundTruth


class ImageInfo(NamedTuple):
    """An annotated image."""

    image_id: int
    objects: ImageObjects


def annotated_images(truth: GroundTruth, category_ids: Sequence[int]) -> list[ImageInfo]:
    """List the images in the order of their ids, each with its objects.

    Args:
        truth: the annotations as they are evaluated.
        category_ids: of each label; objects of other categories are left out.
    """
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    by_image: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in sorted(truth.image_ids)}
    for row in truth.content["annotations"]:
        if row["category_id"] in label_of:
            by_image[row["image_id"]].append(row)
    result = []
    for image_id, rows in by_image.items():
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        objects = ImageObjects(
            np.array([label_of[row["category_id"]] for row in rows], dtype=np.int64),
            boxes,
            np.array([row["area"] for row in rows], dtype=np.float64),
            np.array([row["iscrowd"] for row in rows], dtype=bool),
        )
        result.append(ImageInfo(image_id, objects))
    return result


def detections_by_image(rows: Floats, image_ids: Sequence[int], category_ids: Sequence[int]) -> list[ImageDetections]:
    """Rows of the evaluator as detections of each image.

    Args:
        rows: [n, 7] image id, x, y, width, height, score, category id.
        image_ids: ascending; images without rows have no detections.
        category_ids: of each label; rows of other categories are left out.
    """
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    labels = np.array([label_of.get(int(c), -1) for c in rows[:, 6]], dtype=np.int64)
    rows, labels = rows[labels >= 0], labels[labels >= 0]
    order = np.argsort(rows[:, 0], kind="stable")
    rows, labels = rows[order], labels[order]
    boxes = np.concatenate([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]], axis=1)
    starts = np.searchsorted(rows[:, 0], image_ids, side="left")
    ends = np.searchsorted(rows[:, 0], image_ids, side="right")
    return [ImageDetections(rows[a:b, 5], labels[a:b], boxes[a:b]) for a, b in zip(starts, ends, strict=True)]


def read_rows(path: Path) -> Floats:
    """Read the detections that a run's last evaluation left behind, as rows [n, 7] of :func:`detections_by_image`.

    Raises:
        ValueError: the file cannot be read as such.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            columns = [content[name] for name in ("image_ids", "boxes_xywh", "scores", "category_ids")]
        return np.column_stack(columns).astype(np.float64)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as detections ({error})") from error
