"""Paired intervals over images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.average_precision import average_precision, match_dataset
from analysis.bootstrap import paired_interval, resampled_precision, resamples
from analysis.matching import ImageDetections, ImageObjects


def dataset(correct: list[bool]):
    """One object an image, detected exactly or not at all: AP of a resample is the share of images that are right."""
    box = np.array([[0, 0, 10, 10.0]])
    truth = ImageObjects(np.array([0]), box, np.array([100.0]), np.array([False]))
    hit = ImageDetections(np.array([0.9]), np.array([0]), box)
    miss = ImageDetections(np.empty(0), np.empty(0, dtype=np.int64), np.empty((0, 4)))
    return match_dataset([truth] * len(correct), [hit if c else miss for c in correct], 1)


def test_resamples_draw_as_many_images_as_there_are():
    weights = resamples(7, 50, seed=3)
    assert weights.shape == (50, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert (weights == resamples(7, 50, seed=3)).all()


def test_resampled_precision_is_the_share_of_weight_that_is_right():
    right = [True, False, True, True, False]
    weights = resamples(5, 40)
    expected = weights[:, right].sum(axis=1) / 5
    # Precision is read at 101 recalls: 1 up to the share that is found, 0 beyond.
    precision = resampled_precision(dataset(right), weights)
    assert precision.shape == (40, 10)
    np.testing.assert_allclose(precision / 100, expected[:, None].repeat(10, 1), atol=0.011)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_resampled_precision_is_average_precision_with_weights(seed):
    """Of random boxes around random objects, some of them crowds, in images of which some have neither."""
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for _ in range(6):
        corner = rng.uniform(0, 60, (rng.integers(0, 4), 2))
        boxes = np.concatenate([corner, corner + rng.uniform(10, 40, corner.shape)], axis=1)
        labels = rng.integers(0, 2, len(boxes))
        crowd = rng.random(len(boxes)) < 0.3
        objects.append(ImageObjects(labels, boxes, np.full(len(boxes), 100.0), crowd))
        around = np.repeat(boxes, 3, axis=0)
        around = around + rng.normal(0, 4, around.shape)
        scores = rng.choice([0.2, 0.5, 0.8, 0.9], len(around))
        found.append(ImageDetections(scores, np.repeat(labels, 3), around))
    data = match_dataset(objects, found, 3)
    weights = resamples(6, 5, seed=seed % 1000)
    precision = resampled_precision(data, weights)
    expected = [100 * average_precision(data, weight) for weight in weights]
    np.testing.assert_allclose(precision.mean(axis=1), expected, atol=1e-9)
    for t, threshold in ((0, 0.5), (5, 0.75)):
        single = match_dataset(objects, found, 3, np.array([threshold]))
        expected = [100 * average_precision(single, weight) for weight in weights]
        np.testing.assert_allclose(precision[:, t], expected, atol=1e-9)


def test_runs_that_are_the_same_differ_by_nothing():
    data = dataset([True, False] * 10)
    values = resampled_precision(data, resamples(20, 100))[:, 0]
    interval = paired_interval([50.0], [50.0], [values], [values])
    assert interval == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_the_differences_on_the_same_resamples():
    one, other = dataset([True] * 30 + [False] * 10), dataset([True] * 20 + [False] * 20)
    weights = resamples(40, 400)
    first, second = (resampled_precision(data, weights)[:, 0] for data in (one, other))
    observed = 100 * average_precision(one), 100 * average_precision(other)
    interval = paired_interval(observed[:1], observed[1:], [first], [second], confidence=0.9)
    assert interval.difference == pytest.approx(25, abs=1)
    low, high = np.percentile(first - second, [5, 95])
    assert (interval.low, interval.high) == pytest.approx((low, high))
    # The images on which both agree cancel out: unpaired, the interval would be wider.
    unpaired = np.percentile(first - second[::-1], [5, 95])
    assert interval.high - interval.low < unpaired[1] - unpaired[0]


def test_groups_are_compared_by_their_means():
    weights = resamples(20, 50)
    runs = [resampled_precision(dataset([True] * n + [False] * (20 - n)), weights)[:, 5] for n in (10, 14, 6)]
    interval = paired_interval([50.0, 70.0], [30.0], runs[:2], runs[2:])
    assert interval.difference == pytest.approx(30)
    low, _ = np.percentile((runs[0] + runs[1]) / 2 - runs[2], [2.5, 97.5])
    assert interval.low == pytest.approx(low)
