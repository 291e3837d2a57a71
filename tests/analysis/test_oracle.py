"""What misalignment costs, on images small enough to compute AP by hand."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.matching import ImageDetections, ImageObjects
from analysis.oracle import best_matches, matches_of_evaluation, oracle_gap

BOX = [0.0, 0.0, 100.0, 100.0]


def objects(*boxes, labels=None) -> ImageObjects:
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    labels = np.array([0] * len(boxes) if labels is None else labels)
    return ImageObjects(labels, array, np.full(len(boxes), 1e4), np.zeros(len(boxes), dtype=bool))


def detections(*rows) -> ImageDetections:
    """(score, label, height): boxes from the top of the object, whose IoU is height / 100."""
    boxes = [[0.0, 0.0, 100.0, height] for _, _, height in rows]
    return ImageDetections(
        np.array([r[0] for r in rows]),
        np.array([r[1] for r in rows], dtype=np.int64),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
    )


def test_a_confident_bad_box_before_a_good_one():
    # As it is: up to IoU 0.60 the first one is right: AP 1. From 0.65 on it is wrong and comes first: AP 1/2.
    found = detections((0.9, 0, 62), (0.5, 0, 100))
    gap = oracle_gap([objects(BOX)], [found], 1)
    assert gap.as_is == pytest.approx(100 * (3 * 1 + 7 * 0.5) / 10)
    # The good one is matched, gets score 1 and comes first.
    assert gap.matched_by_iou == pytest.approx(100)
    assert gap.matched_by_iou_others_below == pytest.approx(100)
    # Evaluation matches the confident one at IoU 0.5: with a score of 0.62 it still comes before the other.
    assert gap.matched_by_score == pytest.approx(gap.as_is)


def test_rescoring_what_evaluation_matches_helps_against_false_ones():
    # The false one has 0.8, the right ones come before it with 0.9 instead of after it with 0.3 and 0.7.
    found = [detections((0.3, 0, 90), (0.2, 0, 40)), detections((0.7, 0, 90), (0.8, 0, 0))]
    gap = oracle_gap([objects(BOX)] * 2, found, 1)
    # Right at 9 thresholds; as it is at precision 1/2 up to recall 1/2, then 2/3, which holds for lower recalls too.
    assert gap.as_is == pytest.approx(100 * 9 * (2 / 3) / 10)
    assert gap.matched_by_score == pytest.approx(100 * 9 / 10)


def test_what_repeats_cost():
    # The repeat comes second of three: precision 1 up to recall 1/2, then 2/3. Right at 9 thresholds.
    found = [detections((0.9, 0, 92), (0.8, 0, 80)), detections((0.5, 0, 92))]
    gap = oracle_gap([objects(BOX)] * 2, found, 1)
    assert gap.as_is == pytest.approx(90 * (51 + 50 * 2 / 3) / 101)
    assert gap.after_nms == pytest.approx(90)
    # One of another class, or that overlaps less, is no repeat.
    found[0] = detections((0.9, 0, 92), (0.8, 1, 80), (0.7, 0, 60))
    classes = objects(BOX, BOX, labels=[0, 1])
    gap = oracle_gap([classes, objects(BOX)], found, 2)
    assert gap.after_nms == pytest.approx(gap.as_is)
    assert oracle_gap([objects(BOX)], [detections()], 1).after_nms == 0


def test_evaluation_takes_the_confident_box_and_the_best_match_the_better_one():
    found = detections((0.9, 0, 62), (0.5, 0, 100), (0.4, 0, 30))
    matched, iou = matches_of_evaluation(objects(BOX), found)
    assert matched.tolist() == [0, -1, -1]
    np.testing.assert_allclose(iou, [0.62, 0, 0])
    matched, iou = best_matches(objects(BOX), found)
    assert matched.tolist() == [-1, 0, -1]
    np.testing.assert_allclose(iou, [0, 1, 0])


def test_a_confident_false_one_remains_unless_it_is_suppressed():
    # IoU 0.7 counts at 5 of 10 thresholds; rescored to 0.7 it comes after the false one with 0.9.
    found = detections((0.95, 0, 70), (0.9, 0, 0))
    gap = oracle_gap([objects(BOX)], [found], 1)
    assert gap == pytest.approx((50, 25, 25, 50, 50))


def test_matches_are_one_to_one_within_a_class():
    found = detections((0.9, 0, 80), (0.8, 0, 90), (0.7, 1, 95), (0.6, 0, 0))
    matched, iou = best_matches(objects(BOX, [0, 0, 100, 70], labels=[0, 0]), found)
    # 0.80 → second (70/80) and 0.90 → first is the largest sum; the other class and the empty box match nothing.
    assert matched.tolist() == [1, 0, -1, -1]
    np.testing.assert_allclose(iou, [70 / 80, 0.9, 0, 0])


def test_perfectly_aligned_scores_leave_no_gap():
    found = [detections((0.8, 0, 80)), detections((0.6, 0, 60)), detections((0.95, 0, 95))]
    gap = oracle_gap([objects(BOX)] * 3, found, 1)
    assert gap.matched_by_iou == pytest.approx(gap.as_is)
    assert gap.matched_by_score == pytest.approx(gap.as_is)
