"""Everything that is measured about one detector on one data set, gathered image by image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.average_precision import RECALLS, MatchedDataset, class_precision, match_dataset
from analysis.best_regressed import (
    SIZES,
    BestRegressed,
    MostConfident,
    best_regressed,
    join,
    most_confident,
    recall,
)
from analysis.error_types import ErrorReport, classify_errors, error_report
from analysis.matching import IOU_THRESHOLDS, Floats, ImageDetections, ImageObjects
from analysis.misalignment import Alignment, alignment
from analysis.oracle import OracleGap, oracle_gap

LEAST_IOUS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
"""For the recall of best-regressed samples; 0 asks for any overlap."""
FACTORS = (1, 2)
NEARLY = 0.02
"""Of IoU: with so little less, a query is as well placed as the best one."""


class Observation(NamedTuple):
    """What is kept of one image: its queries are reduced at once, as there may be a thousand of them."""

    image_id: int
    objects: ImageObjects
    detections: ImageDetections
    best: BestRegressed
    nearly_best: BestRegressed
    """The most confident of those that are within ``NEARLY`` of the best."""
    confident: MostConfident


def observe(
    image_id: int, objects: ImageObjects, detections: ImageDetections, scores: Floats, boxes_xyxy: Floats
) -> Observation:
    """Measure an image.

    Args:
        image_id: as in the annotations.
        objects: of the image.
        detections: after post-processing.
        scores: [Q, C] in [0, 1] of all queries.
        boxes_xyxy: [Q, 4] of all queries, in pixels of the original image.
    """
    best = best_regressed(scores, boxes_xyxy, objects)
    nearly = best_regressed(scores, boxes_xyxy, objects, NEARLY)
    return Observation(image_id, objects, detections, best, nearly, most_confident(scores, boxes_xyxy, objects))


class Report(NamedTuple):
    """The result for one checkpoint."""

    label: str
    categories: tuple[str, ...]
    metrics: dict[str, Any]
    """Metrics of the evaluator."""
    best: BestRegressed
    """Best-regressed queries of all images."""
    nearly_best: BestRegressed
    """The same of queries that are within ``NEARLY`` of the best."""
    populations: dict[str, tuple[Floats, Floats]]
    """(score, IoU) of two populations of queries: best_regressed, most_confident."""
    alignments: dict[str, Alignment | None]
    """What scores tell of IoUs in each population."""
    oracle: OracleGap
    errors: ErrorReport
    precision: Floats
    """[T, 101] precision over recall, mean over classes with objects."""
    per_class: dict[str, list[float | None]]
    """AP of each class in percent at each threshold of ``IOU_THRESHOLDS``; None without objects."""
    objects_per_class: dict[str, int]
    """Number of objects of each class, crowds not counted."""


def make_report(
    label: str,
    observations: Sequence[Observation],
    categories: Sequence[str],
    metrics: dict[str, Any],
    threshold: float,
) -> Report:
    """Measure everything.

    Args:
        label: of the checkpoint, for people.
        observations: of all images; at least one.
        categories: names by label.
        metrics: of the evaluator for the same detections.
        threshold: score of detections that count as confident.
    """
    objects = [observation.objects for observation in observations]
    detections = [observation.detections for observation in observations]
    num_classes = len(categories)
    best = join([observation.best for observation in observations])
    score = np.concatenate([o.confident.score for o in observations])
    iou = np.concatenate([o.confident.iou for o in observations])
    populations = {"best_regressed": (best.score[best.found], best.iou[best.found]), "most_confident": (score, iou)}
    matched = match_dataset(objects, detections, num_classes)
    precision, per_class = _precision(matched, categories)
    return Report(
        label=label,
        categories=tuple(categories),
        metrics=metrics,
        best=best,
        nearly_best=join([observation.nearly_best for observation in observations]),
        populations=populations,
        alignments={name: alignment(*population) for name, population in populations.items()},
        oracle=oracle_gap(objects, detections, num_classes),
        errors=error_report([*map(classify_errors, objects, detections)], num_classes, threshold),
        precision=precision,
        per_class=per_class,
        objects_per_class={n: int(found.objects.sum()) for n, found in zip(categories, matched.classes, strict=True)},
    )


def _precision(matched: MatchedDataset, categories: Sequence[str]) -> tuple[Floats, dict[str, list[float | None]]]:
    curves: list[Floats] = []
    per_class: dict[str, list[float | None]] = {}
    for name, found in zip(categories, matched.classes, strict=True):
        precision = class_precision(found)
        if precision is None:
            per_class[name] = [None] * len(IOU_THRESHOLDS)
        else:
            curves.append(precision)
            per_class[name] = [100 * float(value) for value in precision.mean(axis=1)]
    mean: Floats = np.mean(curves, axis=0) if curves else np.zeros((len(IOU_THRESHOLDS), len(RECALLS)))
    return mean, per_class


def as_json(report: Report) -> Any:
    """Plain numbers: shares in [0, 1], AP in percent, None for what is not defined."""
    best = report.best
    return _plain(
        {
            "label": report.label,
            "metrics": report.metrics,
            "best_regressed": {
                "targets": len(best.iou),
                "with_overlap": int(best.found.sum()),
                "recall": {
                    _factor(factor): {f"IoU>={least:g}": recall(best, factor, least) for least in LEAST_IOUS}
                    for factor in FACTORS
                },
                f"recall_within_{NEARLY:g}": {
                    _factor(factor): recall(report.nearly_best, factor) for factor in FACTORS
                },
                "recall_by_size": {
                    _factor(factor): {size: recall(best, factor, size=size) for size in SIZES} for factor in FACTORS
                },
            },
            "misalignment": {
                name: None if found is None else found._asdict() for name, found in report.alignments.items()
            },
            "oracle": {
                **report.oracle._asdict(),
                "gap_by_score": report.oracle.matched_by_score - report.oracle.as_is,
                "gap_by_iou": report.oracle.matched_by_iou - report.oracle.as_is,
            },
            "errors": report.errors._asdict(),
            "objects_by_class": report.objects_per_class,
            "average_precision_by_class": {
                name: dict(zip((f"{t:.2f}" for t in IOU_THRESHOLDS), values, strict=True))
                for name, values in report.per_class.items()
            },
            "precision_recall": {
                f"{t:.2f}": [round(float(p), 4) for p in row]
                for t, row in zip(IOU_THRESHOLDS, report.precision, strict=True)
            },
        }
    )


def _factor(factor: int) -> str:
    return "N" if factor == 1 else f"{factor}N"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def headline(report: Report) -> dict[str, float]:
    """Select the few numbers to print, by name; those that are not defined are left out."""
    confident = report.alignments["most_confident"]
    values: dict[str, float | None] = {
        "AP": report.metrics.get("AP"),
        "AP with aligned scores": report.oracle.matched_by_iou,
        "best-regressed recall in top N": recall(report.best, 1),
        "Spearman": None if confident is None else confident.spearman,
    }
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
