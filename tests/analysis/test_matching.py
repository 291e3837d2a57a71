"""Matching with objects by COCO's rules, on cases worked out by hand."""

from __future__ import annotations

import numpy as np

from analysis.matching import ImageDetections, ImageObjects, match_image, pairwise_iou


def objects(boxes, labels=None, crowd=None) -> ImageObjects:
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return ImageObjects(
        np.array(labels if labels is not None else [0] * len(boxes), dtype=np.int64),
        boxes,
        np.full(len(boxes), 100.0),
        np.array(crowd if crowd is not None else [False] * len(boxes), dtype=bool),
    )


def detections(boxes, scores, labels=None) -> ImageDetections:
    labels = [0] * len(boxes) if labels is None else labels
    return ImageDetections(np.array(scores, float), np.array(labels), np.array(boxes, float).reshape(-1, 4))


def test_iou_of_every_pair():
    iou = pairwise_iou(np.array([[0, 0, 10, 10.0], [5, 5, 5, 5]]), np.array([[0, 0, 10, 5.0], [20, 20, 30, 30]]))
    np.testing.assert_allclose(iou, [[0.5, 0], [0, 0]])


def test_the_better_score_takes_the_object_and_the_other_is_left_over():
    truth = objects([[0, 0, 10, 10]])
    found = detections([[0, 0, 10, 6], [0, 0, 10, 10]], [0.9, 0.8])
    match = match_image(truth, found, np.array([0.5, 0.7]))
    # At 0.7 the first one (IoU 0.6) is no match, so that the object is free for the second.
    assert match.matched.tolist() == [[0, -1], [-1, 0]]
    assert not match.ignored.any()


def test_each_detection_takes_the_free_object_it_overlaps_most():
    truth = objects([[0, 0, 10, 10], [0, 0, 10, 8]])
    found = detections([[0, 0, 10, 9], [0, 0, 10, 10]], [0.9, 0.8])
    assert match_image(truth, found, np.array([0.5])).matched.tolist() == [[0, 1]]


def test_other_classes_do_not_match():
    truth = objects([[0, 0, 10, 10]], labels=[1])
    assert match_image(truth, detections([[0, 0, 10, 10]], [0.9]), np.array([0.5])).matched.tolist() == [[-1]]


def test_a_crowd_takes_any_number_of_detections_that_lie_in_it():
    truth = objects([[0, 0, 40, 40], [0, 0, 10, 10]], crowd=[True, False])
    found = detections([[0, 0, 10, 10], [20, 20, 30, 30], [5, 5, 9, 9], [35, 35, 50, 50]], [0.9, 0.8, 0.7, 0.6])
    match = match_image(truth, found, np.array([0.5]))
    # The object itself comes first; the last detection lies in the crowd with a ninth of its area.
    assert match.matched.tolist() == [[1, -1, -1, -1]]
    assert match.ignored.tolist() == [[False, True, True, False]]


def test_an_image_without_objects_or_detections():
    nothing = detections(np.empty((0, 4)), [])
    assert match_image(objects([]), detections([[0, 0, 1, 1]], [0.5])).matched.tolist() == [[-1]] * 10
    assert match_image(objects([[0, 0, 1, 1]]), nothing).matched.shape == (10, 0)
