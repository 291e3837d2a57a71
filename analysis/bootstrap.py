"""How far a difference in AP could be an accident of which images are in the validation set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis.average_precision import MatchedDataset, class_precision, without_tail
from analysis.matching import Floats


class Interval(NamedTuple):
    """A difference and the interval in which it lies with the given confidence."""

    difference: float
    low: float
    high: float


def resamples(num_images: int, samples: int, seed: int = 0) -> Floats:
    """Count how often, [samples, num_images], each image is drawn when ``num_images`` are drawn with replacement."""
    drawn = np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), size=samples)
    return drawn.astype(np.float64)


def resampled_precision(dataset: MatchedDataset, weights: Floats) -> Floats:
    """[S, T] AP in percent at each threshold of IoU on each resample; NaN where a resample has no object.

    Args:
        dataset: matched at T thresholds.
        weights: [S, I] how often each image counts in each resample.
    """
    classes = without_tail(dataset).classes
    result = np.full((len(weights), len(dataset.classes[0].correct)), np.nan)
    for s, weight in enumerate(weights):
        precisions = [p for found in classes if (p := class_precision(found, weight)) is not None]
        if precisions:
            result[s] = 100 * np.mean(precisions, axis=(0, 2))
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
