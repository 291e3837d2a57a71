"""The whole report, its JSON and its figures, from constructed observations."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from analysis import style
from analysis.figures import draw_all, draw_errors, draw_histograms, draw_joint_density, draw_recall
from analysis.matching import ImageDetections, ImageObjects
from analysis.report import Report, as_json, headline, make_report, observe

NAMES = ("disc", "star")
METRICS = {"AP": 40.0, "AP50": 60.0, "AP75": 42.0, "APs": None, "APm": 30.0, "APl": 55.0}


def observations(aligned: bool):
    """Six images with one object, its query right but unsure and another one wrong but sure; one without objects."""
    box = np.array([[10, 10, 60, 60.0]])
    found = []
    for i in range(6):
        objects = ImageObjects(np.array([i % 2]), box, np.array([2500.0]), np.array([False]))
        boxes = np.array([[10, 10, 60, 55.0], [10, 10, 60, 45.0], [0, 0, 0, 0]])
        scores = np.full((3, 2), 0.01)
        scores[0, i % 2], scores[1, i % 2] = (0.9, 0.7) if aligned else (0.4, 0.8)
        detections = ImageDetections(scores[:2, i % 2], np.full(2, i % 2), boxes[:2])
        found.append(observe(i, objects, detections, scores, boxes))
    nothing = ImageObjects(np.empty(0, dtype=np.int64), np.empty((0, 4)), np.empty(0), np.empty(0, dtype=bool))
    found.append(observe(6, nothing, ImageDetections(np.array([0.6]), np.array([0]), box), scores, boxes))
    return found


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return [make_report(name, observations(name == "aligned"), NAMES, METRICS, 0.3) for name in ("sure", "aligned")]


def test_the_numbers_of_the_report(reports):
    sure, aligned = (as_json(report) for report in reports)
    assert sure["best_regressed"]["recall"]["N"]["IoU>=0"] == 0.0
    assert sure["best_regressed"]["recall"]["2N"]["IoU>=0"] == 1.0
    assert aligned["best_regressed"]["recall"]["N"]["IoU>=0.9"] == 1.0
    assert sure["best_regressed"]["recall_by_size"]["N"] == {"all": 0.0, "small": None, "medium": 0.0, "large": None}
    assert sure["best_regressed"]["targets"] == sure["best_regressed"]["with_overlap"] == 6
    # The best-regressed query has IoU 0.9, the other one 0.7.
    assert sure["misalignment"]["best_regressed"]["mean_iou"] == pytest.approx(0.9)
    assert sure["misalignment"]["most_confident"]["mean_iou"] == pytest.approx(0.7)
    assert sure["misalignment"]["most_confident"]["calibration_error"] == pytest.approx(0.1)
    assert sure["oracle"]["matched_by_iou"] == pytest.approx(aligned["oracle"]["matched_by_iou"])
    # Evaluation matches the sure boxes, which overlap less: with their IoU for a score they stay before the others.
    assert sure["oracle"]["gap_by_score"] == pytest.approx(0, abs=1e-9)
    assert sure["oracle"]["gap_by_iou"] > 10
    assert sure["objects_by_class"] == {"disc": 3, "star": 3}
    # Class 1 (no false detection): sure boxes of IoU 0.7 come first, right at 5 of 10 thresholds; of the others the
    # better boxes are right at 4 more, after as many wrong ones.
    assert np.mean(list(sure["average_precision_by_class"]["star"].values())) == pytest.approx(
        100 * (5 * 1 + 4 * 0.5) / 10
    )
    assert sure["errors"]["counts"]["duplicate"] == 6
    assert sure["errors"]["counts"]["background"] == 1
    assert len(sure["precision_recall"]["0.50"]) == 101
    json.dumps(sure, allow_nan=False)


def test_the_headline_has_what_is_defined(reports):
    values = headline(reports[0])
    assert values["AP with aligned scores"] == pytest.approx(reports[0].oracle.matched_by_iou)
    assert values["AP"] == METRICS["AP"]
    assert np.isfinite(list(values.values())).all()
    nothing = make_report("empty", observations(True)[-1:], NAMES, dict.fromkeys(METRICS), 0.3)
    assert headline(nothing).keys() <= {"AP with aligned scores"}


@pytest.fixture
def coarse(monkeypatch):
    """Figures of a quarter of the resolution: drawing takes most of the time of these tests."""
    monkeypatch.setattr(style, "DPI", 55)


@pytest.mark.usefixtures("coarse")
def test_figures_of_two_reports(reports, tmp_path):
    for path in draw_all(tmp_path, reports):
        with Image.open(path) as image:
            assert min(image.size) > 100
            shades = np.asarray(image.convert("L").resize((40, 40)))
            assert len(np.unique(shades)) > 10, f"{path.name} is empty"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("coarse")
def test_figures_of_one_report_without_anything_found(tmp_path):
    some = observations(True)[-1:]
    report = make_report("empty", some, NAMES, dict.fromkeys(METRICS), 0.3)
    assert (report.errors.counts["background"], report.alignments["best_regressed"]) == (1, None)
    for draw in (draw_recall, draw_histograms, draw_joint_density, draw_errors):
        draw(tmp_path / "figure.png", [report])
    json.dumps(as_json(report), allow_nan=False)


@pytest.mark.usefixtures("coarse")
def test_as_many_reports_as_there_are_colours(reports, tmp_path):
    many = [reports[0]._replace(label=f"a long label {i}") for i in range(len(style.COLOURS))]
    for draw in (draw_recall, draw_histograms, draw_errors):
        draw(tmp_path / "figure.png", many)
        with Image.open(tmp_path / "figure.png") as image:
            pixels = np.asarray(image.convert("L"))
        # Nothing, and least of all the legend, runs into the borders.
        assert min(pixels[:, 0].min(), pixels[:, -1].min(), pixels[0].min(), pixels[-1].min()) > 250
