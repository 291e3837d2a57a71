"""What misalignment costs: AP if every matched detection were as confident as its box is good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from analysis.average_precision import average_precision, match_dataset
from analysis.matching import Floats, ImageDetections, ImageObjects, Integers, pairwise_iou


class OracleGap(NamedTuple):
    """AP in percent."""

    as_is: float
    aligned: float
    """With the score of each matched detection replaced by its IoU; all others keep theirs."""
    suppressed: float
    """Moreover with all other detections ranked below: what remains is missing or badly placed boxes."""


def best_matches(objects: ImageObjects, detections: ImageDetections) -> tuple[Integers, Floats]:
    """One-to-one matches within each class of an image with the largest sum of IoUs.

    Returns:
        [N] index of each detection's object, −1 for none (an IoU of 0 is no match), and [N] its IoU, 0 for none.
    """
    matched = np.full(len(detections.scores), -1, dtype=np.int64)
    overlap = np.zeros(len(detections.scores))
    for label in np.unique(objects.labels):
        targets = np.flatnonzero((objects.labels == label) & ~objects.crowd)
        candidates = np.flatnonzero(detections.labels == label)
        iou = pairwise_iou(detections.boxes_xyxy[candidates], objects.boxes_xyxy[targets])
        rows, columns = linear_sum_assignment(iou, maximize=True)
        kept = iou[rows, columns] > 0
        matched[candidates[rows[kept]]] = targets[columns[kept]]
        overlap[candidates[rows[kept]]] = iou[rows[kept], columns[kept]]
    return matched, overlap


def rescored(objects: ImageObjects, detections: ImageDetections, suppress: bool) -> ImageDetections:
    """With the scores of matched detections replaced by their IoU; if ``suppress``, the others come after them all."""
    matched, overlap = best_matches(objects, detections)
    others = detections.scores - 2.0 if suppress else detections.scores
    return detections._replace(scores=np.where(matched >= 0, overlap, others))


def oracle_gap(objects: Sequence[ImageObjects], detections: Sequence[ImageDetections], num_classes: int) -> OracleGap:
    """AP of the detections of all images with their own scores and with better ones."""
    versions = [
        detections,
        [rescored(o, d, suppress=False) for o, d in zip(objects, detections, strict=True)],
        [rescored(o, d, suppress=True) for o, d in zip(objects, detections, strict=True)],
    ]
    return OracleGap(*(100 * average_precision(match_dataset(objects, found, num_classes)) for found in versions))
