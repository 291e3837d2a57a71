"""Kinds of errors and what each costs, in the manner of TIDE (Bolya et al., arXiv 2008.08115, section 2).

hotcoco has `COCOeval.tide_errors`, whose counts and costs agree with these where there are neither ties nor crowds.
This file stands beside it for three reasons: it says of each detection and object what is wrong, where hotcoco gives
sums; a test holds it to tidecv, the published code, whose order of tests it follows; and it matches as everything else
here does, by `analysis/matching.py`, so that its AP50 is that of the evaluation with ties and crowds too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from analysis.average_precision import ClassDetections, MatchedDataset, average_precision, best_of_each_class
from analysis.matching import Booleans, Floats, ImageDetections, ImageObjects, Integers, match_image, pairwise_iou

FOREGROUND = 0.5
"""Least IoU of a correct detection."""
BACKGROUND = 0.1
"""IoU up to which a detection has nothing to do with an object."""

CORRECT, CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND_ERROR = range(6)
ERRORS = ("classification", "localisation", "both", "duplicate", "background", "missed")
"""Names of the errors; all but the last are of detections, numbered from 1, the last is of objects."""


class ImageErrors(NamedTuple):
    """The detections and objects of an image with what is wrong about them. Detections of crowds are left out."""

    detections: ImageDetections
    """N of them, best first."""
    kind: Integers
    """[N] CORRECT … BACKGROUND_ERROR."""
    target: Integers
    """[N] object that a detection has found, or would have found but for its class or place; −1 for none."""
    labels: Integers
    """[G] of the objects, crowds left out."""
    missed: Booleans
    """[G] found by no detection, and not by one of wrong class or place either."""
    object_index: Integers
    """[G] index of each object among those of the image."""


def classify_errors(objects: ImageObjects, detections: ImageDetections) -> ImageErrors:
    """Say of each detection whether it is correct, and if not, why.

    Detections are matched as for AP50. The tests of one that is not correct, in the order of the published code: place
    (an object of its class overlaps by 0.1 to 0.5), class (one of another class overlaps by 0.5 or more), duplicate
    (one of its class overlaps by 0.5 or more, but is taken), background (none overlaps by more than 0.1), else both
    class and place.

    Args:
        objects: of the image.
        detections: in any order and number; COCO's limit applies.
    """
    best = best_of_each_class(detections)
    match = match_image(objects, best, np.array([FOREGROUND]))
    counted = ~match.ignored[0]
    found = ImageDetections(best.scores[counted], best.labels[counted], best.boxes_xyxy[counted])
    index = np.flatnonzero(~objects.crowd)
    place_of = np.full(len(objects.labels) + 1, -1)  # the last entry stands for "no object"
    place_of[index] = np.arange(len(index))
    labels = objects.labels[index]
    target = place_of[match.matched[0][counted]]
    kind = np.full(len(found.scores), BOTH)

    iou = pairwise_iou(found.boxes_xyxy, objects.boxes_xyxy[index])
    same = found.labels[:, None] == labels[None]
    own, other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    most_own, most_other = own.max(axis=1, initial=0), other.max(axis=1, initial=0)
    wrong = target < 0
    # The last assignment that applies decides: the tests in reverse order.
    kind[wrong & (iou.max(axis=1, initial=0) <= BACKGROUND)] = BACKGROUND_ERROR
    kind[wrong & (most_own >= FOREGROUND)] = DUPLICATE
    kind[wrong & (most_other >= FOREGROUND)] = CLASSIFICATION
    kind[wrong & (most_own >= BACKGROUND) & (most_own < FOREGROUND)] = LOCALISATION
    kind[~wrong] = CORRECT
    if len(index):
        target = np.where(kind == LOCALISATION, own.argmax(axis=1), target)
        target = np.where(kind == CLASSIFICATION, other.argmax(axis=1), target)
    missed = np.ones(len(index), dtype=bool)
    missed[target[target >= 0]] = False
    return ImageErrors(found, kind, target, labels, missed, index)


def above(image: ImageErrors, threshold: float) -> ImageErrors:
    """As if detections with a score below the threshold had not been made.

    Matching goes from the best detection down, so those that stay are right or wrong as before; but objects that only
    the others had found, or nearly found, are missed.
    """
    left = _select(image, image.detections.scores >= threshold)
    missed = np.ones(len(left.labels), dtype=bool)
    missed[left.target[left.target >= 0]] = False
    return left._replace(missed=missed)


class ErrorReport(NamedTuple):
    """Number and cost of each kind of error, by name."""

    ap50: float
    """In percent, without any correction."""
    counts: dict[str, int]
    """Errors of all detections."""
    threshold: float
    confident_counts: dict[str, int]
    """If there were no detections with a score below the threshold: fewer errors, but more missed objects."""
    cost: dict[str, float]
    """Percent of AP50 to be gained by correcting this kind alone, in all detections."""
    false_positives: float
    """Percent of AP50 to be gained without any wrong detection."""
    false_negatives: float
    """Percent of AP50 to be gained if only objects that are found were asked for."""


def error_report(images: Sequence[ImageErrors], num_classes: int, threshold: float = 0.3) -> ErrorReport:
    """Count the errors and correct one kind at a time.

    Corrections (section 2.2, in detail as in the published code): of all detections of wrong class or place that would
    have found an object, the best one is put right, unless the object is found already; the others and all other wrong
    detections are removed; missed objects are no longer asked for.

    Args:
        images: of :func:`classify_errors`.
        num_classes: labels are below it.
        threshold: score of detections that count as confident.
    """
    base = _ap50(images, num_classes, lambda image: image)
    cost = {
        name: _ap50(images, num_classes, partial(_corrected, kind=kind)) - base
        for kind, name in enumerate(ERRORS[:-1], start=1)
    }
    cost["missed"] = _ap50(images, num_classes, lambda image: _without_objects(image, image.missed)) - base
    only_correct = _ap50(images, num_classes, lambda image: _select(image, image.kind == CORRECT)) - base
    only_found = _ap50(images, num_classes, lambda image: _without_objects(image, _not_found(image))) - base
    confident = _counts([above(image, threshold) for image in images])
    return ErrorReport(base, _counts(images), threshold, confident, cost, only_correct, only_found)


def _counts(images: Sequence[ImageErrors]) -> dict[str, int]:
    found = np.bincount(np.concatenate([image.kind for image in images]), minlength=len(ERRORS))
    counts = {name: int(found[kind]) for kind, name in enumerate(ERRORS[:-1], start=1)}
    return {**counts, "missed": int(sum(image.missed.sum() for image in images))}


def _corrected(image: ImageErrors, kind: int) -> ImageErrors:
    """With one kind of error of detections put right."""
    changed = image.kind == kind
    if kind not in (CLASSIFICATION, LOCALISATION):
        return _select(image, ~changed)
    keep = np.ones(len(image.kind), dtype=bool)
    taken = set(image.target[image.kind == CORRECT].tolist())
    # Best first. Candidates of the other kind compete as well, though they stay as wrong as they are.
    for i in np.flatnonzero((image.kind == CLASSIFICATION) | (image.kind == LOCALISATION)):
        target = int(image.target[i])
        keep[i] = not changed[i] or target not in taken
        taken.add(target)
    labels = image.detections.labels.copy()
    labels[changed] = image.labels[image.target[changed]]
    fixed = image._replace(
        detections=image.detections._replace(labels=labels), kind=np.where(changed, CORRECT, image.kind)
    )
    return _select(fixed, keep)


def _select(image: ImageErrors, keep: Booleans) -> ImageErrors:
    scores, labels, boxes = image.detections
    found = ImageDetections(scores[keep], labels[keep], boxes[keep])
    return image._replace(detections=found, kind=image.kind[keep], target=image.target[keep])


def _not_found(image: ImageErrors) -> Booleans:
    result = np.ones(len(image.labels), dtype=bool)
    result[image.target[image.kind == CORRECT]] = False
    return result


def _without_objects(image: ImageErrors, remove: Booleans) -> ImageErrors:
    """Asks for fewer objects; those removed must not be the targets of correct detections."""
    return image._replace(labels=image.labels[~remove])


def _ap50(images: Sequence[ImageErrors], num_classes: int, change: Callable[[ImageErrors], ImageErrors]) -> float:
    changed = [change(image) for image in images]
    place = np.concatenate([np.full(len(image.kind), i) for i, image in enumerate(changed)])
    scores: Floats = np.concatenate([image.detections.scores for image in changed])
    labels = np.concatenate([image.detections.labels for image in changed])
    correct = np.concatenate([image.kind == CORRECT for image in changed])
    objects = np.stack([np.bincount(image.labels, minlength=num_classes) for image in changed], axis=1)
    order = np.argsort(-scores, kind="stable")
    classes = []
    for label in range(num_classes):
        rows = order[labels[order] == label]
        counted = np.ones((1, len(rows)), dtype=bool)
        classes.append(ClassDetections(place[rows], scores[rows], correct[rows][None], counted, objects[label]))
    return 100 * average_precision(MatchedDataset(tuple(classes), len(changed)))
