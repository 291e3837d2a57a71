"""What misalignment costs: AP if every matched detection were as confident as its box is good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import batched_nms

from analysis.average_precision import average_precision, best_of_each_class, match_dataset
from analysis.matching import Floats, ImageDetections, ImageObjects, Integers, match_image, pairwise_iou

NMS_IOU = 0.7
"""As detectors that need it commonly have it."""


class OracleGap(NamedTuple):
    """AP in percent."""

    as_is: float
    matched_by_score: float
    """With the score replaced by the IoU for those detections that evaluation matches at IoU 0.5; all others keep
    theirs. What rescoring the detections that are already found correct can gain: a better box that comes second
    remains a duplicate."""
    matched_by_iou: float
    """With the score replaced by the IoU for the one-to-one matches that overlap most, whatever their scores; all
    others keep theirs. What perfectly aligned scores can gain: they would also put the better box first."""
    matched_by_iou_others_below: float
    """Moreover with all other detections ranked below: what remains is missing or badly placed boxes."""
    after_nms: float
    """With non-maximum suppression within each class at IoU ``NMS_IOU``: what repeats of an object cost."""


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


def matches_of_evaluation(objects: ImageObjects, detections: ImageDetections) -> tuple[Integers, Floats]:
    """Make the matches by which AP50 is computed, in the order of scores; returns as :func:`best_matches`.

    Args:
        objects: of the image.
        detections: best first.
    """
    matched = match_image(objects, detections, np.array([0.5])).matched[0]
    iou = pairwise_iou(detections.boxes_xyxy, objects.boxes_xyxy)
    rows = np.flatnonzero(matched >= 0)
    overlap = np.zeros(len(matched))
    overlap[rows] = iou[rows, matched[rows]]
    return matched, overlap


def rescored(
    detections: ImageDetections, matched: Integers, overlap: Floats, suppress: bool = False
) -> ImageDetections:
    """With the scores of matched detections replaced by their IoU; if ``suppress``, the others come after them all."""
    others = detections.scores - 2.0 if suppress else detections.scores
    return detections._replace(scores=np.where(matched >= 0, overlap, others))


def suppressed(detections: ImageDetections) -> ImageDetections:
    """Those that non-maximum suppression leaves."""
    boxes, scores, labels = map(torch.from_numpy, (detections.boxes_xyxy, detections.scores, detections.labels))
    kept = batched_nms(boxes, scores, labels, NMS_IOU).numpy()
    return ImageDetections(*(part[kept] for part in detections))


def oracle_gap(objects: Sequence[ImageObjects], detections: Sequence[ImageDetections], num_classes: int) -> OracleGap:
    """AP of the detections of all images with their own scores and with better ones."""
    by_score, by_iou, others_below = [], [], []
    for truth, found in zip(objects, detections, strict=True):
        ordered = best_of_each_class(found)
        by_score.append(rescored(ordered, *matches_of_evaluation(truth, ordered)))
        best = best_matches(truth, found)
        by_iou.append(rescored(found, *best))
        others_below.append(rescored(found, *best, suppress=True))
    versions = (detections, by_score, by_iou, others_below, [suppressed(found) for found in detections])
    return OracleGap(*(100 * average_precision(match_dataset(objects, found, num_classes)) for found in versions))
