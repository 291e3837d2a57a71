"""Recall of best-regressed samples on constructed queries whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.best_regressed import best_regressed, join, most_confident, recall
from analysis.matching import ImageObjects


def image(boxes, labels, crowd=None) -> ImageObjects:
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    sizes = boxes[:, 2:] - boxes[:, :2]
    return ImageObjects(
        np.array(labels, dtype=np.int64),
        boxes,
        sizes.prod(axis=1),
        np.array([False] * len(boxes) if crowd is None else crowd, dtype=bool),
    )


@pytest.fixture
def case():
    """Two targets, a small and a large one; six queries in the order of confidence 3, 1, 4, 0, 2, 5."""
    objects = image([[0, 0, 20, 20], [100, 100, 200, 200]], [1, 0])
    boxes = np.array(
        [
            [0, 0, 20, 19],  # 0: IoU 0.95 with the first target
            [0, 0, 20, 10],  # 1: IoU 0.5 with the first
            [100, 100, 200, 150],  # 2: IoU 0.5 with the second
            [100, 100, 200, 190],  # 3: IoU 0.9 with the second
            [300, 300, 310, 310],  # 4: nothing
            [0, 0, 20, 5],  # 5: IoU 0.25 with the first
        ],
        dtype=np.float64,
    )
    scores = np.array([[0.1, 0.5], [0.2, 0.7], [0.4, 0.3], [0.9, 0.0], [0.6, 0.1], [0.0, 0.1]])
    return scores, boxes, objects


def test_the_best_regressed_query_of_each_target(case):
    found = best_regressed(*case)
    assert found.query.tolist() == [0, 3]
    np.testing.assert_allclose(found.iou, [0.95, 0.9])
    assert found.rank.tolist() == [3, 0]
    assert found.num_targets.tolist() == [2, 2]
    np.testing.assert_allclose(found.score, [0.5, 0.9])  # of the target's own class
    assert found.area.tolist() == [400, 10000]


def test_a_nearly_as_good_query_that_is_more_confident_may_count(case):
    scores, boxes, objects = case
    boxes[4] = [0, 0, 20, 18]  # IoU 0.9 with the first target, and more confident than the one of 0.95
    assert best_regressed(scores, boxes, objects, 0.04).query.tolist() == [0, 3]
    near = best_regressed(scores, boxes, objects, 0.06)
    assert near.query.tolist() == [4, 3]
    assert recall(near, 1) == 0.5  # rank 2 is not among the two most confident
    assert best_regressed(scores, boxes, objects, 0.5).query.tolist() == [1, 3], "IoU 0.5, and rank 1"
    assert best_regressed(scores[:0], boxes[:0], image([], []), 0.5).query.tolist() == []


def test_recall_among_the_n_and_the_2n_most_confident(case):
    found = best_regressed(*case)
    assert recall(found, 1) == 0.5  # rank 3 is not among the two most confident
    assert recall(found, 2) == 1.0  # but among the four most confident
    assert recall(found, 1, least_iou=0.92) == 0.0
    assert recall(found, 1, size="small") == 0.0
    assert recall(found, 1, size="large") == 1.0
    assert recall(found, 1, size="medium") is None
    assert recall(found, 1, least_iou=0.96) is None


def test_the_most_confident_queries_and_their_overlap(case):
    found = most_confident(*case)
    assert found.query.tolist() == [3, 1]
    np.testing.assert_allclose(found.score, [0.9, 0.7])
    np.testing.assert_allclose(found.iou, [0.9, 0.5])


def test_of_equal_overlaps_the_more_confident_query_counts():
    objects = image([[0, 0, 10, 10]], [0])
    boxes = np.array([[0, 0, 10, 10.0]] * 3)
    found = best_regressed(np.array([[0.2], [0.7], [0.5]]), boxes, objects)
    assert (found.query.tolist(), found.rank.tolist()) == ([1], [0])


def test_targets_that_no_query_overlaps_are_not_asked_about():
    objects = image([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0])
    found = best_regressed(np.array([[0.9]]), np.array([[0, 0, 10, 10.0]]), objects)
    assert found.found.tolist() == [True, False]
    assert recall(found, 1) == 1.0


def test_crowds_are_neither_targets_nor_counted():
    objects = image([[0, 0, 10, 10], [0, 0, 50, 50]], [0, 0], crowd=[False, True])
    scores, boxes = np.array([[0.9], [0.1]]), np.array([[0, 0, 50, 50.0], [0, 0, 10, 10]])
    found = best_regressed(scores, boxes, objects)
    assert (found.query.tolist(), found.num_targets.tolist()) == ([1], [1])
    assert recall(found, 1) == 0.0
    assert most_confident(scores, boxes, objects).iou.tolist() == [pytest.approx(0.04)]


def test_images_are_joined_each_with_its_own_n(case):
    empty = best_regressed(case[0], case[1], image([], []))
    single = best_regressed(
        np.array([[0.3], [0.9]]), np.array([[0, 0, 9, 10.0], [0, 0, 8, 10]]), image([[0, 0, 10, 10]], [0])
    )
    found = join([best_regressed(*case), empty, single])
    assert found.num_targets.tolist() == [2, 2, 1]
    assert recall(found, 1) == pytest.approx(1 / 3)
    assert recall(found, 2) == 1.0
    assert len(most_confident(case[0], case[1], image([], [])).iou) == 0
