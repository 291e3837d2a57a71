"""How far scores tell the quality of boxes: histograms, rank correlation, calibration.

The histograms are those of the misalignment figures in Align-DETR (arXiv 2304.07527).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from analysis.matching import Floats, Integers

BINS = 20
"""Of the histograms, over [0, 1]."""
CALIBRATION_BINS = 10


class Alignment(NamedTuple):
    """How scores and IoUs of some queries go together."""

    queries: int
    mean_score: float
    mean_iou: float
    histogram: Integers
    """[BINS] number of queries by IoU; bin i covers [i, i + 1) / BINS, the last one includes 1."""
    spearman: float | None
    """Rank correlation of score and IoU; None where one of them is constant."""
    calibration_error: float
    """Mean over queries of |mean score − mean IoU| of the query's score bin."""
    reliability: Floats
    """[CALIBRATION_BINS, 3] count, mean score and mean IoU by score; NaN for empty bins."""


def alignment(score: Floats, iou: Floats) -> Alignment | None:
    """Describe M queries by their score [M] and IoU [M], both in [0, 1]; None for no query."""
    if not len(score):
        return None
    histogram, _ = np.histogram(iou, bins=BINS, range=(0, 1))
    reliability = reliability_table(score, iou)
    full = reliability[reliability[:, 0] > 0]
    gap = np.abs(full[:, 1] - full[:, 2])
    return Alignment(
        len(score),
        float(score.mean()),
        float(iou.mean()),
        histogram.astype(np.int64),
        spearman(score, iou),
        float((full[:, 0] * gap).sum() / len(score)),
        reliability,
    )


def spearman(first: Floats, second: Floats) -> float | None:
    """Rank correlation of two vectors, equal values sharing their mean rank; None where one of them is constant."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def reliability_table(score: Floats, iou: Floats) -> Floats:
    """[CALIBRATION_BINS, 3] count, mean score and mean IoU of queries in equal ranges of the score; NaN if empty."""
    place = np.minimum((score * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    count = np.bincount(place, minlength=CALIBRATION_BINS).astype(np.float64)
    empty = np.full(CALIBRATION_BINS, np.nan)
    means = [
        np.divide(
            np.bincount(place, weights=value, minlength=CALIBRATION_BINS), count, out=empty.copy(), where=count > 0
        )
        for value in (score, iou)
    ]
    return np.stack([count, *means], axis=1)


def joint_density(score: Floats, iou: Floats, bins: int = BINS) -> Floats:
    """[bins of score, bins of IoU] share of the queries in each cell, from 0 to 1 on both axes."""
    counts, _, _ = np.histogram2d(score, iou, bins=bins, range=((0, 1), (0, 1)))
    result: Floats = counts / max(len(score), 1)
    return result
