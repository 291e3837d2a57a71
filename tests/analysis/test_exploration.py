"""The columns of an explorer's page against loops, and their way through the file."""

from __future__ import annotations

import base64
import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.average_precision import average_precision, match_dataset
from analysis.error_types import (
    BACKGROUND_ERROR,
    BOTH,
    CLASSIFICATION,
    CORRECT,
    DUPLICATE,
    LOCALISATION,
    classify_errors,
)
from analysis.exploration import SCALE, _steps, detection_columns, encoded, judge, object_columns, precision_summary
from analysis.matching import ImageDetections, ImageObjects


def overlap(a, b) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0


@st.composite
def images(draw):
    """Boxes on a coarse grid, so that they often overlap; some objects are crowds."""

    def boxes(count):
        corner = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 5), st.integers(1, 5))
        made = [draw(corner) for _ in range(count)]
        return np.array([(x, y, x + w, y + h) for x, y, w, h in made], dtype=np.float64).reshape(-1, 4)

    def labels(count):
        return np.array([draw(st.integers(0, 2)) for _ in range(count)], dtype=np.int64)

    g, n = draw(st.integers(0, 4)), draw(st.integers(0, 8))
    crowd = np.array([draw(st.integers(0, 4)) == 0 for _ in range(g)], dtype=bool)
    truth = boxes(g)
    objects = ImageObjects(labels(g), truth, (truth[:, 2:] - truth[:, :2]).prod(axis=1), crowd)
    scores = np.array([draw(st.integers(0, 1000)) / 1000 for _ in range(n)])
    return objects, ImageDetections(scores, labels(n), boxes(n))


@settings(max_examples=150, deadline=None)
@given(images())
def test_each_detection_is_judged_by_the_object_that_its_kind_says(image):
    objects, detections = image
    judged = judge(objects, detections)
    assert judged.kind.tolist() == classify_errors(objects, detections).kind.tolist()
    single = [g for g in range(len(objects.labels)) if not objects.crowd[g]]
    for i, kind in enumerate(judged.kind):
        box, label, target = judged.detections.boxes_xyxy[i], judged.detections.labels[i], judged.target[i]
        overlaps = {g: overlap(box, objects.boxes_xyxy[g]) for g in single}
        if kind == BACKGROUND_ERROR:
            assert target == -1
            assert judged.iou[i] == pytest.approx(max(overlaps.values(), default=0))
            continue
        assert target in single
        assert judged.iou[i] == pytest.approx(overlaps[target])
        of_class = [overlaps[g] for g in single if objects.labels[g] == label]
        if kind in (LOCALISATION, DUPLICATE):
            assert overlaps[target] == pytest.approx(max(of_class))
        if kind in (CORRECT, LOCALISATION, DUPLICATE):
            assert objects.labels[target] == label
        if kind == CLASSIFICATION:
            assert objects.labels[target] != label
        if kind == BOTH:
            assert overlaps[target] == pytest.approx(max(overlaps.values()))


@settings(max_examples=300)
@given(st.floats(0, 1, width=32), st.integers(0, 200))
def test_a_stored_score_reaches_a_threshold_exactly_where_the_score_does(score, step):
    stored = int(_steps([np.array([score], dtype=np.float64)])[0])
    assert (stored * 200 >= step * SCALE) == (score >= step / 200)


def test_scores_on_a_threshold_reach_it():
    stored = _steps([np.array([step / 200 for step in range(201)])])
    assert stored.tolist() == [step * SCALE // 200 for step in range(201)]


@settings(max_examples=30, deadline=None)
@given(st.lists(images(), min_size=1, max_size=4))
def test_columns_hold_the_images_one_after_the_other(made):
    objects, detections = [image[0] for image in made], [image[1] for image in made]
    sizes = [(11, 13)] * len(made)
    columns = detection_columns(objects, detections, sizes)
    start = 0
    for image, truth, found in zip(range(len(made)), objects, detections, strict=True):
        judged = judge(truth, found)
        rows = slice(start, start + int(columns["count"][image]))
        assert columns["label"][rows].tolist() == judged.detections.labels.tolist()
        assert columns["target"][rows].tolist() == judged.target.tolist()
        corners = columns["box"].reshape(-1, 4)[rows] / 65535 * [13, 11, 13, 11]
        np.testing.assert_allclose(corners, judged.detections.boxes_xyxy.clip(0, [13, 11, 13, 11]), atol=2e-4)
        start = rows.stop
    assert start == len(columns["score"])
    truth_columns = object_columns(objects, sizes)
    assert truth_columns["crowd"].tolist() == [int(c) for truth in objects for c in truth.crowd]


def test_columns_survive_the_file():
    columns = {"count": np.array([3, 0, 2], dtype=np.uint32), "target": np.array([-1, 300], dtype=np.int16)}
    written = encoded(columns)
    assert {name: kind for name, (kind, _) in written.items()} == {"count": "Uint32Array", "target": "Int16Array"}
    for name, (_, text) in written.items():
        read = np.frombuffer(gzip.decompress(base64.b64decode(text)), dtype=columns[name].dtype.newbyteorder("<"))
        assert read.tolist() == columns[name].tolist()


@settings(max_examples=20, deadline=None)
@given(st.lists(images(), min_size=1, max_size=4))
def test_mean_over_classes_is_average_precision(made):
    objects, detections = [image[0] for image in made], [image[1] for image in made]
    summary = precision_summary(objects, detections, 3)
    means = [row["ap"][0] for row in summary if row["ap"] is not None]
    expected = average_precision(match_dataset(objects, detections, 3))
    if means:
        assert np.mean(means) == pytest.approx(100 * expected, abs=1e-3)
    else:
        assert np.isnan(expected)
    assert [row["objects"] for row in summary] == [
        sum(int(((truth.labels == label) & ~truth.crowd).sum()) for truth in objects) for label in range(3)
    ]


def test_sizes_are_those_of_coco():
    sides = np.array([0.0, 31.9, 32.0, 95.9, 96.0, 500.0])
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    none = np.zeros(6, dtype=bool)
    objects = [ImageObjects(np.zeros(6, dtype=np.int64), boxes, sides**2, none)]
    found = [ImageDetections(np.linspace(0.9, 0.1, 6), np.zeros(6, dtype=np.int64), boxes)]
    for columns in (object_columns(objects, [(500, 500)]), detection_columns(objects, found, [(500, 500)])):
        assert columns["size"].tolist() == [0, 0, 1, 1, 2, 2]
