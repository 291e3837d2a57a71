"""Kinds of errors and their cost on constructed detections whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.detections_file import annotated_images, detections_by_image
from analysis.error_types import (
    BACKGROUND_ERROR,
    BOTH,
    CLASSIFICATION,
    CORRECT,
    DUPLICATE,
    ERRORS,
    LOCALISATION,
    above,
    classify_errors,
    error_report,
)
from analysis.matching import ImageDetections, ImageObjects
from engine.coco_metrics import box_metrics


def objects(*rows) -> ImageObjects:
    """(label, x0, y0, x1, y1)."""
    array = np.array(rows, dtype=np.float64).reshape(-1, 5)
    crowd = np.zeros(len(rows), dtype=bool)
    return ImageObjects(array[:, 0].astype(np.int64), array[:, 1:], np.full(len(rows), 100.0), crowd)


def detections(*rows) -> ImageDetections:
    """(score, label, x0, y0, x1, y1)."""
    array = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return ImageDetections(array[:, 0], array[:, 1].astype(np.int64), array[:, 2:])


TRUTH = objects((0, 0, 0, 10, 10), (1, 20, 20, 30, 30), (0, 40, 40, 50, 50), (1, 60, 60, 70, 70))
FOUND = detections(
    (0.90, 0, 0, 0, 10, 10),  # right
    (0.80, 0, 0, 0, 10, 9),  # the same object again
    (0.70, 0, 20, 20, 30, 29),  # an object of class 1
    (0.60, 0, 40, 40, 50, 43),  # IoU 0.3 with an object of its class
    (0.50, 0, 60, 60, 70, 63),  # IoU 0.3 with an object of class 1
    (0.40, 0, 80, 80, 90, 90),  # nothing
)


def test_every_kind_of_error_is_told():
    found = classify_errors(TRUTH, FOUND)
    assert found.kind.tolist() == [CORRECT, DUPLICATE, CLASSIFICATION, LOCALISATION, BOTH, BACKGROUND_ERROR]
    assert found.target.tolist() == [0, -1, 1, 2, -1, -1]
    # The last object is found by nothing but a detection of wrong class and place.
    assert found.missed.tolist() == [False, False, False, True]


def test_counts_and_costs():
    report = error_report([classify_errors(TRUTH, FOUND)], 2, threshold=0.55)
    assert report.counts == dict(zip(ERRORS, (1, 1, 1, 1, 1, 1), strict=True))
    assert report.confident_counts == dict(zip(ERRORS, (1, 1, 0, 1, 0, 1), strict=True))
    # Class 0 has 2 objects, of which the best detection finds one: precision 1 up to recall 0.5, at 51 of 101 points.
    # Class 1 has 2 objects and no detection.
    half = 51 / 101
    assert report.ap50 == pytest.approx(100 * half / 2)
    # Class put right: class 1 has one detection, which is right: another 51 points there.
    assert report.cost["classification"] == pytest.approx(100 * half / 2)
    # Place put right: the second object of class 0 is found at rank 4, with a precision of 2/4 beyond recall 0.5.
    assert report.cost["localisation"] == pytest.approx(100 * (50 / 101) * 0.5 / 2)
    # Removing what comes after the last correct detection of a class changes nothing.
    assert report.cost["both"] == report.cost["background"] == report.cost["duplicate"] == 0
    # Without the missed object, class 1 still has an object that is not found.
    assert report.cost["missed"] == 0
    assert report.false_positives == 0
    # Asking only for what is found: class 0 is perfect, class 1 is not asked about.
    assert report.false_negatives == pytest.approx(100 - report.ap50)


def test_wrong_detections_before_the_right_one_cost():
    truth = objects((0, 0, 0, 10, 10))
    right = (0.5, 0, 0, 0, 10, 10)
    for error, kind in (((0.9, 0, 50, 50, 60, 60), "background"), ((0.9, 0, 0, 0, 10, 4), "localisation")):
        report = error_report([classify_errors(truth, detections(right, error))], 1)
        assert report.ap50 == pytest.approx(50)  # precision 1/2 everywhere
        assert report.cost[kind] == pytest.approx(50)
        assert sum(report.counts.values()) == 1


def test_of_corrections_that_share_an_object_only_the_best_stays():
    truth = objects((0, 0, 0, 10, 10), (0, 50, 50, 60, 60))
    found = detections((0.9, 0, 0, 0, 10, 4), (0.8, 0, 0, 0, 10, 3), (0.7, 0, 50, 50, 60, 60))
    image = classify_errors(truth, found)
    assert image.kind.tolist() == [LOCALISATION, LOCALISATION, CORRECT]
    report = error_report([image], 1)
    # Both objects found by two detections, the second wrong one removed: AP50 is perfect.
    assert report.ap50 + report.cost["localisation"] == pytest.approx(100)


def test_an_error_on_an_object_that_is_found_is_removed_whatever_its_score():
    truth = objects((0, 0, 0, 10, 10), (0, 50, 50, 60, 60))
    found = detections((0.9, 0, 0, 0, 10, 4), (0.8, 0, 80, 80, 90, 90), (0.5, 0, 0, 0, 10, 10))
    image = classify_errors(truth, found)
    assert image.kind.tolist() == [LOCALISATION, BACKGROUND_ERROR, CORRECT]
    report = error_report([image], 1)
    # The right detection is the second one then, not the first.
    assert report.ap50 + report.cost["localisation"] == pytest.approx(100 * (51 / 101) / 2)


def test_candidates_of_both_kinds_compete_for_an_object():
    truth = objects((1, 0, 0, 10, 10))
    image = classify_errors(truth, detections((0.9, 0, 0, 0, 10, 10), (0.8, 1, 0, 0, 10, 4)))
    assert image.kind.tolist() == [CLASSIFICATION, LOCALISATION]
    report = error_report([image], 2)
    assert report.cost["classification"] == pytest.approx(100)
    assert report.cost["localisation"] == 0


def test_costs_are_those_of_the_published_code():
    images = [
        classify_errors(
            objects((0, 0, 0, 10, 10), (1, 20, 20, 30, 30)),
            detections(
                (0.95, 0, 0, 0, 10, 4), (0.9, 0, 0, 0, 10, 10), (0.85, 0, 20, 20, 30, 30), (0.8, 1, 20, 20, 30, 24),
                (0.3, 0, 70, 70, 80, 80),
            ),
        ),
        classify_errors(
            objects((0, 0, 0, 10, 10), (2, 40, 40, 50, 50)),
            detections(
                (0.75, 2, 40, 40, 50, 43), (0.7, 1, 40, 40, 50, 50), (0.65, 0, 0, 0, 10, 9), (0.6, 0, 0, 0, 10, 8),
                (0.55, 1, 0, 0, 10, 10),
            ),
        ),
        classify_errors(
            objects((1, 0, 0, 10, 10), (2, 20, 20, 30, 30), (0, 60, 60, 70, 70)),
            detections(
                (0.5, 2, 0, 0, 10, 9), (0.45, 1, 0, 0, 10, 10), (0.4, 2, 20, 20, 30, 29), (0.35, 0, 80, 80, 90, 90),
                (0.25, 2, 60, 60, 70, 63),
            ),
        ),
    ]  # fmt: skip
    report = error_report(images, 3)
    # What tidecv 1.0.1 gives for these boxes.
    assert report.ap50 == pytest.approx(20.874587, abs=1e-6)
    costs = (30.115512, 31.050605, 0.0, 0.0, 0.0, 5.610561)
    assert report.cost == pytest.approx(dict(zip(ERRORS, costs, strict=True)), abs=1e-6)
    assert report.counts == dict(zip(ERRORS, (4, 3, 1, 1, 2, 1), strict=True))
    assert (report.false_positives, report.false_negatives) == pytest.approx((34.900990, 15.236524), abs=1e-6)


def test_objects_that_only_unsure_detections_find_are_missed_above_the_threshold():
    image = classify_errors(TRUTH, FOUND)
    sure = above(image, 0.65)
    assert sure.kind.tolist() == [CORRECT, DUPLICATE, CLASSIFICATION]
    assert sure.missed.tolist() == [False, False, True, True]
    report = error_report([image], 2, threshold=0.65)
    assert (report.counts["missed"], report.confident_counts["missed"]) == (1, 2)
    # The cost is that of the objects missed by all detections.
    assert report.cost == error_report([image], 2, threshold=0.0).cost


def test_detections_of_crowds_are_no_errors():
    truth = objects((0, 0, 0, 10, 10), (0, 20, 20, 60, 60))._replace(crowd=np.array([False, True]))
    image = classify_errors(truth, detections((0.9, 0, 25, 25, 35, 35), (0.8, 0, 0, 0, 10, 10)))
    assert image.kind.tolist() == [CORRECT]
    assert image.object_index.tolist() == [0]


def test_images_without_objects_or_detections():
    empty = classify_errors(objects(), detections((0.9, 0, 0, 0, 1, 1)))
    assert empty.kind.tolist() == [BACKGROUND_ERROR]
    nothing = classify_errors(objects((0, 0, 0, 10, 10)), detections())
    assert nothing.missed.tolist() == [True]
    report = error_report([empty, nothing], 1)
    assert (report.ap50, report.counts["background"], report.counts["missed"]) == (0, 1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_ap50_is_that_of_pycocotools(random_dataset, seed):
    truth, rows = random_dataset(seed)
    images = annotated_images(truth, (5, 7, 9))
    found = detections_by_image(rows, [image.image_id for image in images], (5, 7, 9))
    errors = [classify_errors(image.objects, d) for image, d in zip(images, found, strict=True)]
    report = error_report(errors, 3)
    assert report.ap50 == pytest.approx(100 * box_metrics(truth, rows, "pycocotools").statistics[1], abs=1e-6)
    assert min(report.cost.values()) >= -1e-9
