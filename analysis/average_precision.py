"""Average precision by COCO's rules from matched images, with a weight for each image.

Matching happens within an image, so a data set in which images appear repeatedly or not at all, as in a bootstrap,
needs no new matching: weights are enough. With equal weights the result is that of pycocotools (area "all").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from analysis.matching import (
    IOU_THRESHOLDS,
    MAX_DETECTIONS,
    Booleans,
    Floats,
    ImageDetections,
    ImageObjects,
    Integers,
    match_image,
)

RECALLS: Floats = np.linspace(0, 1, 101)
"""At which COCO reads the precision."""


@dataclass(frozen=True)
class ClassDetections:
    """All detections of one class, best first, at T thresholds."""

    image: Integers
    """[N] index of the image."""
    scores: Floats
    """[N]."""
    correct: Booleans
    """[T, N]."""
    counted: Booleans
    """[T, N] False for detections that are ignored."""
    objects: Integers
    """[I] objects of this class in each image, crowds not counted."""

    @cached_property
    def growth(self) -> list[tuple[Integers, Integers, Integers]]:
        """At each threshold the [H] correct detections, where alone recall grows, the [J] ignored ones, and [H] how
        many of these come before each of the former."""
        found = [
            (np.flatnonzero(right), np.flatnonzero(~c)) for right, c in zip(self.correct, self.counted, strict=True)
        ]
        return [(hits, ignored, np.searchsorted(ignored, hits, side="right")) for hits, ignored in found]


class MatchedDataset(NamedTuple):
    """Everything AP needs to know of I images."""

    classes: tuple[ClassDetections, ...]
    num_images: int


def match_dataset(
    objects: Sequence[ImageObjects],
    detections: Sequence[ImageDetections],
    num_classes: int,
    thresholds: Floats = IOU_THRESHOLDS,
) -> MatchedDataset:
    """Match every image and sort the result by class and score.

    Args:
        objects: of each image.
        detections: of each image, in any order and number.
        num_classes: labels are below it.
        thresholds: [T] of IoU.
    """
    images, scores, labels, correct, ignored = [], [], [], [], []
    counts = np.zeros((num_classes, len(objects)), dtype=np.int64)
    for i, (truth, found) in enumerate(zip(objects, detections, strict=True)):
        best = best_of_each_class(found)
        match = match_image(truth, best, thresholds)
        images.append(np.full(len(best.scores), i))
        scores.append(best.scores)
        labels.append(best.labels)
        correct.append(match.matched >= 0)
        ignored.append(match.ignored)
        counts[:, i] = np.bincount(truth.labels[~truth.crowd], minlength=num_classes)
    all_scores, all_labels = np.concatenate(scores), np.concatenate(labels)
    all_images, all_correct = np.concatenate(images), np.concatenate(correct, axis=1)
    all_counted = ~np.concatenate(ignored, axis=1)
    order = np.argsort(-all_scores, kind="stable")
    classes = []
    for label in range(num_classes):
        rows = order[all_labels[order] == label]
        classes.append(
            ClassDetections(
                all_images[rows], all_scores[rows], all_correct[:, rows], all_counted[:, rows], counts[label]
            )
        )
    return MatchedDataset(tuple(classes), len(objects))


def best_of_each_class(found: ImageDetections) -> ImageDetections:
    """Best first, and no more than COCO's limit, which is for each class of an image."""
    ordered = found.best(len(found.scores))
    kept = np.zeros(len(ordered.scores), dtype=bool)
    for label in np.unique(ordered.labels):
        kept[np.flatnonzero(ordered.labels == label)[:MAX_DETECTIONS]] = True
    return ImageDetections(ordered.scores[kept], ordered.labels[kept], ordered.boxes_xyxy[kept])


def class_precision(found: ClassDetections, weights: Floats | None = None) -> Floats | None:
    """[T, 101] precision at the recalls of ``RECALLS``; None if there is no object to find.

    Args:
        found: detections of a class.
        weights: [I] how often each image counts; None for once.
    """
    total = found.objects.sum() if weights is None else found.objects @ weights
    if total <= 0:
        return None
    weight = np.ones(len(found.image)) if weights is None else weights[found.image]
    seen = weight.cumsum()
    result = np.zeros((len(found.correct), len(RECALLS)))
    for t, (hits, ignored, ignored_before) in enumerate(found.growth):
        right, all_counted = weight[hits].cumsum(), seen[hits]
        if len(ignored):
            all_counted = all_counted - np.concatenate([[0.0], weight[ignored].cumsum()])[ignored_before]
        precision = np.divide(right, all_counted, out=np.zeros_like(right), where=all_counted > 0)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(right / total, RECALLS, side="left")
        reached = at < len(hits)
        result[t, reached] = envelope[at[reached]]
    return result


def average_precision(dataset: MatchedDataset, weights: Floats | None = None) -> float:
    """AP in [0, 1], the mean over thresholds and those classes that have objects; NaN if none has.

    Args:
        dataset: matched.
        weights: [I] how often each image counts; None for once.
    """
    precisions = [p for found in dataset.classes if (p := class_precision(found, weights)) is not None]
    return float(np.mean([p.mean() for p in precisions])) if precisions else float("nan")


def without_tail(dataset: MatchedDataset) -> MatchedDataset:
    """Without the detections of each class after its last correct one: they do not change AP, whatever the weights."""
    classes = []
    for found in dataset.classes:
        hits = np.flatnonzero(found.correct.any(axis=0))
        end = int(hits[-1]) + 1 if len(hits) else 0
        classes.append(
            ClassDetections(
                found.image[:end], found.scores[:end], found.correct[:, :end], found.counted[:, :end], found.objects
            )
        )
    return MatchedDataset(tuple(classes), dataset.num_images)
