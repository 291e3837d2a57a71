"""Recall of best-regressed samples (Align-DETR, arXiv 2304.07527, figure 1): are the best boxes the confident ones?

The best-regressed query of a target is the one that overlaps it most. Had an image with N targets perfectly aligned
scores, these queries would be among its N most confident ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis.matching import Booleans, Floats, ImageObjects, Integers, pairwise_iou

SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""COCO's ranges of the annotated area, in square pixels."""


class BestRegressed(NamedTuple):
    """The best-regressed query of each of G targets (crowds are none); those of several images may be joined."""

    query: Integers
    """[G] index within the image."""
    iou: Floats
    """[G] with the target; 0 if no query overlaps it."""
    rank: Integers
    """[G] of the query's confidence in its image, 0 for the most confident."""
    num_targets: Integers
    """[G] N, the number of targets of the image."""
    score: Floats
    """[G] the query gives to the target's class."""
    area: Floats
    """[G] of the target, in pixels."""
    boxes_xyxy: Floats
    """[G, 4] of the query, in the unit of the targets."""

    @property
    def found(self) -> Booleans:
        """[G] bool, whether any query overlaps the target at all."""
        result: Booleans = self.iou > 0
        return result


class MostConfident(NamedTuple):
    """The N most confident queries of images with N targets."""

    query: Integers
    """[M] index within the image."""
    score: Floats
    """[M] the highest over classes."""
    iou: Floats
    """[M] with the target it overlaps most, of whatever class."""


def by_confidence(scores: Floats) -> Integers:
    """[Q] queries in the order of their highest score over classes; equals stay in order."""
    result: Integers = np.argsort(-scores.max(axis=1), kind="stable")
    return result


def best_regressed(scores: Floats, boxes_xyxy: Floats, objects: ImageObjects, tolerance: float = 0.0) -> BestRegressed:
    """Find the best-regressed query of each target of an image; of equal overlaps the more confident query.

    Args:
        scores: [Q, C] in [0, 1] of all queries.
        boxes_xyxy: [Q, 4] in the unit of the targets.
        objects: of the image.
        tolerance: overlaps that are lower than the highest by this much at most count as equal to it.
    """
    targets = np.flatnonzero(~objects.crowd)
    order = by_confidence(scores)
    iou = pairwise_iou(boxes_xyxy[order], objects.boxes_xyxy[targets])
    # The first of the true ones is the most confident.
    rank = (iou >= iou.max(axis=0) - tolerance).argmax(axis=0) if len(targets) else np.empty(0, dtype=np.int64)
    query = order[rank]
    return BestRegressed(
        query,
        iou[rank, np.arange(len(targets))],
        rank,
        np.full(len(targets), len(targets)),
        scores[query, objects.labels[targets]],
        objects.areas[targets],
        boxes_xyxy[query],
    )


def most_confident(scores: Floats, boxes_xyxy: Floats, objects: ImageObjects) -> MostConfident:
    """Find the N most confident queries of an image with N targets; arguments as in :func:`best_regressed`."""
    targets = objects.boxes_xyxy[~objects.crowd]
    query = by_confidence(scores)[: len(targets)]
    iou = pairwise_iou(boxes_xyxy[query], targets).max(axis=1, initial=0)
    return MostConfident(query, scores[query].max(axis=1), iou)


def join(parts: Sequence[BestRegressed]) -> BestRegressed:
    """Join the best-regressed queries of several images."""
    return BestRegressed(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def recall(found: BestRegressed, factor: int, least_iou: float = 0.0, size: str = "all") -> float | None:
    """Share of the best-regressed queries that are among the ``factor``·N most confident of their images.

    Args:
        found: of any number of images.
        factor: 1 or 2 in the paper.
        least_iou: only targets whose best query overlaps them by this much, and at all, are asked about.
        size: a key of ``SIZES``; targets of this size only.

    Returns:
        In [0, 1]; None if there is no such target.
    """
    low, high = SIZES[size]
    asked = found.found & (found.iou >= least_iou) & (found.area >= low) & (found.area < high)
    if not asked.any():
        return None
    within = found.rank < factor * found.num_targets
    return float(within[asked].mean())
