"""Histograms, rank correlation and calibration on numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from analysis.misalignment import BINS, alignment, joint_density, reliability_table, spearman


def test_histogram_of_iou_counts_both_ends():
    found = alignment(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.0, 0.049, 0.05, 1.0]))
    assert found is not None
    assert found.histogram.sum() == found.queries == 4
    assert (found.histogram[0], found.histogram[1], found.histogram[BINS - 1]) == (2, 1, 1)


def test_spearman_is_scipys_with_ties_too():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 6, 40).astype(float), rng.integers(0, 6, 40).astype(float)
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert spearman(np.array([1.0, 2, 3]), np.array([0.1, 0.2, 0.9])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1.0, 2]), np.array([0.5, 0.5])) is None
    assert spearman(np.array([1.0]), np.array([0.5])) is None


def test_calibration_error_is_the_mean_gap_of_the_score_ranges():
    score = np.array([0.11, 0.19, 0.95, 1.0])
    iou = np.array([0.25, 0.35, 0.975, 0.775])
    table = reliability_table(score, iou)
    np.testing.assert_allclose(table[1], [2, 0.15, 0.30])
    np.testing.assert_allclose(table[9], [2, 0.975, 0.875])
    assert np.isnan(table[0, 1])
    assert table[:, 0].sum() == 4
    found = alignment(score, iou)
    assert found is not None
    assert found.calibration_error == pytest.approx((2 * 0.15 + 2 * 0.1) / 4)
    assert (found.mean_score, found.mean_iou) == pytest.approx((0.5625, 0.5875))


def test_scores_equal_to_iou_are_calibrated_and_perfectly_correlated():
    values = np.linspace(0.01, 0.99, 50)
    found = alignment(values, values)
    assert found is not None
    assert found.calibration_error == pytest.approx(0)
    assert found.spearman == pytest.approx(1)


def test_joint_density_puts_score_on_the_first_axis():
    density = joint_density(np.array([0.05, 0.95]), np.array([0.55, 1.0]), bins=10)
    assert density.sum() == pytest.approx(1)
    assert (density[0, 5], density[9, 9]) == (0.5, 0.5)


def test_no_query_has_no_alignment():
    assert alignment(np.empty(0), np.empty(0)) is None
