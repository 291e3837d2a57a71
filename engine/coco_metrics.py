"""COCO's bounding-box metrics over plain arrays, computed by whichever library is at hand.

pycocotools defines the numbers. hotcoco, where it is installed, computes the same ones many times faster; a test holds
its statistics and precision arrays equal to those of pycocotools.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

MetricBackend = Literal["auto", "hotcoco", "pycocotools"]

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""In the order of pycocotools."""

Array = NDArray[np.float64]


class GroundTruth(NamedTuple):
    """What detections are compared with."""

    content: dict[str, Any]
    """In COCO format: images, annotations and categories."""
    category_ids: tuple[int, ...]
    """Ascending; the order of the third axis of ``BoxMetrics.precision``."""
    image_ids: frozenset[int]
    """All images, also those without objects."""
    unusable: int
    """Annotations left out because they have no finite box, or belong to no image or category of the file."""


class BoxMetrics(NamedTuple):
    """Fractions in [0, 1]; -1 where there is no object to find."""

    statistics: Array
    """[12], named by ``STATISTICS``."""
    precision: Array
    """[10 IoU thresholds, 101 recalls, categories, 4 areas (all, s, m, l), 3 detection limits (1, 10, 100)]."""


def read_ground_truth(annotations: Path | str | dict[str, Any]) -> GroundTruth:
    """Takes the annotations as they are, crowds and zero-area boxes included, as pycocotools does.

    Annotations are numbered anew: pycocotools takes an id of 0 for "not matched", and mixes up equal ids.
    ``iscrowd`` is 0 and ``area`` is that of the box where they are missing.

    Args:
        annotations: a COCO file, or its content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a COCO file.
    """
    if isinstance(annotations, dict):
        content, source = annotations, "annotations"
    else:
        source = str(annotations)
        try:
            content = json.loads(Path(annotations).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{source} is not a JSON file: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("images", "categories")):
        raise ValueError(f"{source}: not a COCO annotation file, which has lists of 'images' and 'categories'")
    image_ids = {
        entry["id"] for entry in content["images"] if isinstance(entry, dict) and isinstance(entry.get("id"), int)
    }
    categories = [
        entry for entry in content["categories"] if isinstance(entry, dict) and isinstance(entry.get("id"), int)
    ]
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in categories}
    kept: list[dict[str, Any]] = []
    entries = content.get("annotations") or []
    for entry in entries:
        usable = _usable_annotation(entry, len(kept) + 1)
        if usable is not None and usable["image_id"] in image_ids and usable["category_id"] in names:
            kept.append(usable)
    return GroundTruth(
        {
            "info": {},
            "images": [{"id": image_id} for image_id in sorted(image_ids)],
            "annotations": kept,
            "categories": [{"id": category_id, "name": names[category_id]} for category_id in sorted(names)],
        },
        tuple(sorted(names)),
        frozenset(image_ids),
        len(entries) - len(kept),
    )


def _usable_annotation(entry: object, new_id: int) -> dict[str, Any] | None:
    if not isinstance(entry, dict):
        return None
    box, image_id, category_id = entry.get("bbox"), entry.get("image_id"), entry.get("category_id")
    if not isinstance(box, list) or len(box) != 4 or not isinstance(image_id, int) or not isinstance(category_id, int):
        return None
    box = [_finite(value) for value in box]
    if None in box:
        return None
    area = _finite(entry.get("area"))
    return {
        "id": new_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "area": box[2] * box[3] if area is None else area,
        "iscrowd": int(bool(entry.get("iscrowd"))),
    }


def _finite(value: object) -> float | None:
    """The value as a number, or None where it is none."""
    if not isinstance(value, int | float) or abs(value) > sys.float_info.max or value != value:
        return None
    return float(value)


def choose_backend(backend: MetricBackend) -> Literal["hotcoco", "pycocotools"]:
    """The library behind "auto": the fastest one that is installed."""
    if backend == "auto":
        return "hotcoco" if find_spec("hotcoco") else "pycocotools"
    return backend


def box_metrics(ground_truth: GroundTruth, detections: Array, backend: MetricBackend = "auto") -> BoxMetrics:
    """Compares detections with the ground truth by COCO's rules.

    Args:
        ground_truth: of ``read_ground_truth``.
        detections: [n, 7] rows of image id, x, y, width, height, score, category id; images must be known.
        backend: the library that computes.
    """
    something_to_compare = len(detections) > 0 and len(ground_truth.content["annotations"]) > 0
    fast = something_to_compare and choose_backend(backend) == "hotcoco"
    # Both libraries print their progress; what matters is returned.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = (_hotcoco if fast else _pycocotools)(ground_truth, detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return BoxMetrics(
        np.asarray(evaluation.stats, dtype=np.float64), np.asarray(evaluation.eval["precision"], dtype=np.float64)
    )


def _hotcoco(ground_truth: GroundTruth, detections: Array) -> Any:
    import hotcoco

    truth = hotcoco.COCO(ground_truth.content)
    return hotcoco.COCOeval(truth, truth.loadRes(detections), "bbox")


def _pycocotools(ground_truth: GroundTruth, detections: Array) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), COCO()
    # A copy of the rows, which pycocotools writes its own entries into.
    truth.dataset = {**ground_truth.content, "annotations": [dict(row) for row in ground_truth.content["annotations"]]}
    truth.createIndex()
    if len(detections):
        found = truth.loadRes(detections)
    else:  # which loadRes cannot take
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
    return COCOeval(truth, found, "bbox")
