"""How far a difference in AP could be an accident of which images are in the validation set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis.average_precision import RECALLS, ClassDetections, MatchedDataset, without_tail
from analysis.matching import Floats, Integers


class Interval(NamedTuple):
    """A difference and the interval in which it lies with the given confidence."""

    difference: float
    low: float
    high: float


def resamples(num_images: int, samples: int, seed: int = 0) -> Floats:
    """Count how often, [samples, num_images], each image is drawn when ``num_images`` are drawn with replacement."""
    drawn = np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), size=samples)
    return drawn.astype(np.float64)


class _ClassHits(NamedTuple):
    """A class, reduced to the detections at which recall grows: everywhere else precision can only fall."""

    image: Integers
    """[N] index of the image of each detection, best first."""
    hits: list[Integers]
    """At each threshold [H] the detections that are correct."""
    ignored: list[Integers]
    """At each threshold [J] the detections that are ignored."""
    ignored_before: list[Integers]
    """At each threshold [H] the number of ignored detections up to each hit."""
    objects: Integers
    """[I]."""


def _class_hits(found: ClassDetections) -> _ClassHits:
    hits = [np.flatnonzero(row) for row in found.correct]
    ignored = [np.flatnonzero(~row) for row in found.counted]
    before = [np.searchsorted(j, h, side="right") for j, h in zip(ignored, hits, strict=True)]
    return _ClassHits(found.image, hits, ignored, before, found.objects)


def _precision(found: _ClassHits, weights: Floats) -> Floats | None:
    """[T] mean precision over recalls, with weights [I]; as :func:`average_precision.class_precision` has it."""
    total = found.objects @ weights
    if total <= 0:
        return None
    weight = weights[found.image]
    seen = weight.cumsum()
    result = np.zeros(len(found.hits))
    for t, (hits, ignored, before) in enumerate(zip(found.hits, found.ignored, found.ignored_before, strict=True)):
        if not len(hits):
            continue
        right, counted = weight[hits].cumsum(), seen[hits]
        if len(ignored):
            counted = counted - np.concatenate([[0.0], weight[ignored].cumsum()])[before]
        precision = np.divide(right, counted, out=np.zeros_like(right), where=counted > 0)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(right / total, RECALLS, side="left")
        result[t] = envelope[at[at < len(hits)]].sum() / len(RECALLS)
    return result


def resampled_precision(dataset: MatchedDataset, weights: Floats) -> Floats:
    """[S, T] AP in percent at each threshold of IoU on each resample; NaN where a resample has no object.

    Args:
        dataset: matched at T thresholds.
        weights: [S, I] how often each image counts in each resample.
    """
    classes = [_class_hits(found) for found in without_tail(dataset).classes]
    result = np.full((len(weights), len(dataset.classes[0].correct)), np.nan)
    for s, weight in enumerate(weights):
        precisions = [p for found in classes if (p := _precision(found, weight)) is not None]
        if precisions:
            result[s] = 100 * np.mean(precisions, axis=0)
    return result


def paired_interval(
    observed: Sequence[float],
    baseline_observed: Sequence[float],
    resampled: Sequence[Floats],
    baseline_resampled: Sequence[Floats],
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of the difference between the means of two groups of runs.

    Paired: both groups see the same resamples, so that images which are hard for both cancel out. The interval speaks
    of the images only; the spread over seeds is another matter.

    Args:
        observed: AP of each run on all images.
        baseline_observed: of each run of the baseline.
        resampled: for each run [S] AP on the resamples.
        baseline_resampled: likewise, on the same resamples.
        confidence: share of the resamples between the bounds.
    """
    differences = np.mean(resampled, axis=0) - np.mean(baseline_resampled, axis=0)
    differences = differences[np.isfinite(differences)]
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(differences, [tail, 100 - tail]) if len(differences) else (float("nan"), float("nan"))
    return Interval(float(np.mean(observed) - np.mean(baseline_observed)), float(low), float(high))
