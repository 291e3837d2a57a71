"""Which targets and queries are shown with their sampling points, and how much of the image."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from analysis import style
from analysis.detections_file import ImageInfo
from analysis.looking import (
    ChosenTarget,
    LookingQuery,
    LookingRow,
    _draw_query,
    chosen_targets,
    crop_window,
    draw_sampling,
    looking_query,
)
from analysis.matching import ImageObjects
from analysis.style import Picture
from structures import Looking


def objects(*sides: float, crowd: int | None = None) -> ImageObjects:
    """Squares from one corner, of class 0."""
    boxes = np.array([[10, 10, 10 + side, 10 + side] for side in sides], dtype=np.float64).reshape(-1, 4)
    is_crowd = np.array([i == crowd for i in range(len(sides))], dtype=bool)
    return ImageObjects(np.zeros(len(sides), dtype=np.int64), boxes, np.array(sides) ** 2.0, is_crowd)


IMAGES = [
    ImageInfo(3, objects()),
    ImageInfo(5, objects(20, 30)),
    ImageInfo(8, objects(20, 50, 10, 40, 90, crowd=4)),
    ImageInfo(9, objects(10, 20, 30)),
]


def test_default_is_the_largest_median_and_smallest_of_the_first_image_with_three():
    assert [str(target) for target in chosen_targets(IMAGES, None, None)] == ["8:1", "8:3", "8:2"]
    assert [str(target) for target in chosen_targets(IMAGES[:2], None, None)] == ["5:1", "5:0"]
    assert chosen_targets(IMAGES[:1], None, None) == []


def test_images_or_targets_can_be_given():
    assert [str(target) for target in chosen_targets(IMAGES, [9, 3, 5], None)] == ["9:2", "9:1", "9:0", "5:1", "5:0"]
    assert chosen_targets(IMAGES, None, ["8:2", "5:0"]) == [ChosenTarget(8, 2), ChosenTarget(5, 0)]
    with pytest.raises(ValueError, match="image 4 is not in the validation set"):
        chosen_targets(IMAGES, [4], None)
    for text, message in (
        ("8", "an image id and a number are needed"),
        ("4:0", "image 4 is not in the validation set"),
        ("5:2", "image 5 has 2 annotations"),
        ("5:-1", "image 5 has 2 annotations"),
        ("8:4", "a crowd is no target"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen_targets(IMAGES, None, [text])


def test_query_is_the_best_regressed_one_of_this_target():
    truth = objects(20, 40)
    boxes = np.array([[10, 10, 50, 49], [10, 10, 30, 28], [0, 0, 5, 5.0]])
    scores = np.array([[0.9, 0.1], [0.2, 0.3], [0.1, 0.99]])
    locations = torch.arange(2 * 3, dtype=torch.float32).reshape(2, 3, 1, 1, 1, 1).expand(2, 3, 2, 2, 4, 2) / 10
    weights = torch.full((2, 3, 2, 2, 4), 1 / 8)
    reference = torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(2, 3, 4)
    looking = Looking(locations, weights, reference)
    found = looking_query(0, truth, scores, boxes, looking, 1, (100, 200))
    assert (found.query, found.score) == (1, 0.2)
    assert found.iou == pytest.approx(0.9)
    np.testing.assert_allclose(found.points[0, 0, 0], [0.4 * 200, 0.4 * 100], rtol=1e-6)
    np.testing.assert_allclose(found.reference_xyxy, [80, 30, 120, 70], rtol=1e-6)
    assert looking_query(1, truth, scores, boxes, looking, 1, (100, 200)).query == 0
    point = looking_query(0, truth, scores, boxes, looking._replace(reference=reference[..., :2]), 1, (100, 200))
    np.testing.assert_allclose(point.reference_xyxy, [100, 50, 100, 50], rtol=1e-6)
    nowhere = looking_query(0, truth, scores, boxes, looking._replace(reference=None), 1, (100, 200))
    assert np.isnan(nowhere.reference_xyxy).all()


def query(box: list[float], spread: float) -> LookingQuery:
    """100 points spread evenly around the middle of the box."""
    array = np.array(box, dtype=np.float64)
    centre = (array[:2] + array[2:]) / 2
    points = np.linspace(-spread, spread, 100).reshape(5, 2, 10, 1) + centre
    return LookingQuery(0, 0.5, 0.7, array, array, points, np.full((5, 2, 10), 0.05))


def test_window_is_a_square_around_the_target_moved_into_the_image():
    target = np.array([480, 20, 500, 60.0])
    x0, y0, x1, y1 = crop_window(target, [query([480, 20, 500, 60], 15)], (500, 1000))
    assert x1 - x0 == pytest.approx(y1 - y0) == pytest.approx(2.6 * 40)
    assert (x0 + x1) / 2 == pytest.approx(490)
    assert y0 == pytest.approx(0)
    assert y1 > 60


def test_window_holds_all_boxes_and_most_points():
    target = np.array([100, 100, 120, 120.0])
    far = query([100, 100, 120, 120], 200)
    x0, y0, x1, y1 = crop_window(target, [query([90, 100, 190, 120], 5), far], (500, 500))
    assert x0 < 90
    assert x1 > 190
    points = far.points.reshape(-1, 2)
    inside = ((points > [x0, y0]) & (points < [x1, y1])).all(axis=1)
    assert inside.mean() >= 0.9


def test_window_is_bounded_however_far_points_lie():
    x0, _, x1, _ = crop_window(np.array([0, 0, 10, 10.0]), [query([0, 0, 10, 10], 1e6)], (100, 200))
    assert x1 - x0 <= 2.2 * 200


def test_checkpoints_are_columns_and_targets_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "DPI", 55)
    picture = Picture(np.full((32, 32, 3), 90, dtype=np.uint8), (64, 64))
    target = np.array([10, 10, 40, 40.0])
    rows = [LookingRow(f"disc (1:{i})", picture, target, [query([10, 10, 40, 38], 30), None]) for i in range(2)]
    draw_sampling(tmp_path / "points.png", ["a", "b"], rows)
    with Image.open(tmp_path / "points.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue, right = np.abs(pixels - (0, 0x72, 0xB2)).sum(axis=2) < 90, pixels.shape[1] // 2
    # The second checkpoint could not read the image: points of level 0 are in the left half only, but for the legend.
    plots = blue[: int(0.8 * len(blue))]
    assert plots[:, :right].sum() > 4 * max(1, plots[:, right:].sum())


def test_dense_attention_is_a_map_over_the_image():
    """The mean of the heads, each weight over the pixel of its point; padding beyond the image is out of sight."""
    figure, axis = plt.subplots()
    x, y = np.meshgrid([8.0, 24, 40, 56], [8.0, 24, 40])  # a level of 3 x 4 pixels of an image of 48 x 48
    points = np.broadcast_to(np.stack([x, y], axis=-1).reshape(1, 1, 12, 2), (2, 1, 12, 2))
    weights = np.zeros((2, 1, 12))
    weights[0, 0, 6], weights[1, 0, [6, 1]] = 1, (0.25, 0.75)  # (40, 24) and (24, 8)
    box = np.array([10, 10, 40, 40.0])
    _draw_query(axis, LookingQuery(0, 0.5, 0.7, box, np.full(4, np.nan), points, weights))
    (drawn,) = axis.images
    assert drawn.get_extent() == [0, 64, 48, 0]
    opacity = drawn.get_array()[..., 3]
    assert opacity[1, 2] == opacity.max() > 0.5
    assert opacity[0, 1] == pytest.approx(opacity.max() * 0.375 / 0.625)
    assert np.count_nonzero(opacity) == 2
    assert not axis.collections  # no points
    plt.close(figure)
