"""Matching of detections with objects by COCO's rules, for one image at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
"""Thresholds of IoU over which COCO's AP is averaged."""
MAX_DETECTIONS = 100
"""Per image, the best; COCO ignores the rest."""


class ImageObjects(NamedTuple):
    """What is annotated in an image; G objects, in pixels of the original image."""

    labels: Integers
    """[G]."""
    boxes_xyxy: Floats
    """[G, 4]."""
    areas: Floats
    """[G] as annotated: that of the segment, where there is one."""
    crowd: Booleans
    """[G] regions of many objects, in which detections are neither right nor wrong."""


class ImageDetections(NamedTuple):
    """What was detected in an image; N detections in any order."""

    scores: Floats
    """[N]."""
    labels: Integers
    """[N]."""
    boxes_xyxy: Floats
    """[N, 4] in pixels of the original image."""

    def best(self, count: int = MAX_DETECTIONS) -> ImageDetections:
        """Select the ``count`` detections with the highest scores, best first; equal scores stay in order."""
        order = np.argsort(-self.scores, kind="stable")[:count]
        return ImageDetections(self.scores[order], self.labels[order], self.boxes_xyxy[order])


class ImageMatch(NamedTuple):
    """Result of the matching at T thresholds."""

    matched: Integers
    """[T, N] index of the object that a detection has found, −1 for none."""
    ignored: Booleans
    """[T, N] detections of crowds, which count neither as right nor as wrong."""


def pairwise_iou(boxes_xyxy: Floats, others_xyxy: Floats) -> Floats:
    """[N, M] intersection over union of every box with every other, 0 where both are empty."""
    intersection = pairwise_intersection(boxes_xyxy, others_xyxy)
    union = box_areas(boxes_xyxy)[:, None] + box_areas(others_xyxy)[None] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def pairwise_intersection(boxes_xyxy: Floats, others_xyxy: Floats) -> Floats:
    """[N, M] areas of the intersections."""
    top_left = np.maximum(boxes_xyxy[:, None, :2], others_xyxy[None, :, :2])
    bottom_right = np.minimum(boxes_xyxy[:, None, 2:], others_xyxy[None, :, 2:])
    result: Floats = (bottom_right - top_left).clip(min=0).prod(axis=-1)
    return result


def box_areas(boxes_xyxy: Floats) -> Floats:
    """[...] areas of boxes [..., 4]."""
    result: Floats = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clip(min=0).prod(axis=-1)
    return result


def match_image(objects: ImageObjects, detections: ImageDetections, thresholds: Floats = IOU_THRESHOLDS) -> ImageMatch:
    """Greedy matching in the order of scores: each detection takes the free object of its class it overlaps most.

    A detection without a free object that lies in a crowd of its class (by the share of its own area) is ignored; a
    crowd takes any number of them.

    Args:
        objects: of the image.
        detections: best first.
        thresholds: [T] least IoU of a match.
    """
    count, rows = len(detections.scores), np.arange(len(thresholds))
    matched = np.full((len(thresholds), count), -1, dtype=np.int64)
    ignored = np.zeros((len(thresholds), count), dtype=bool)
    # As pycocotools: an IoU of 1 must be attainable in spite of rounding.
    least = np.minimum(thresholds, 1 - 1e-10)
    for label in np.unique(objects.labels):
        of_class = np.flatnonzero(objects.labels == label)
        single, crowds = of_class[~objects.crowd[of_class]], of_class[objects.crowd[of_class]]
        candidates = np.flatnonzero(detections.labels == label)
        boxes = detections.boxes_xyxy[candidates]
        iou = pairwise_iou(boxes, objects.boxes_xyxy[single])
        areas = box_areas(boxes)[:, None]
        covered = pairwise_intersection(boxes, objects.boxes_xyxy[crowds])
        share = np.divide(covered, areas, out=np.zeros_like(covered), where=areas > 0).max(axis=1, initial=0)
        free = np.ones((len(thresholds), len(single)), dtype=bool)
        for i, detection in enumerate(candidates):
            taken = np.zeros(len(thresholds), dtype=bool)
            if len(single):
                overlap = np.where(free, iou[i], -1.0)
                # Of equal overlaps the last, as in pycocotools.
                best = len(single) - 1 - overlap[:, ::-1].argmax(axis=1)
                taken = overlap[rows, best] >= least
                matched[taken, detection] = single[best[taken]]
                free[rows[taken], best[taken]] = False
            ignored[:, detection] = ~taken & (share[i] >= least)
    return ImageMatch(matched, ignored)
