import numpy as np
import pytest
from PIL import Image

from analysis import operating_points
from analysis.average_precision import match_dataset
from analysis.detections_file import annotated_images, detections_by_image
from analysis.error_types import above, classify_errors
from analysis.matching import ImageDetections, ImageObjects, match_image


def opened(random_dataset, seed):
    truth, rows = random_dataset(seed)
    images = annotated_images(truth, [5, 7, 9])
    return [image.objects for image in images], detections_by_image(
        rows, [image.image_id for image in images], [5, 7, 9]
    )


@pytest.mark.parametrize("seed", range(4))
def test_precision_and_recall_at_every_threshold_are_those_of_matching_what_is_left(random_dataset, seed):
    objects, detections = opened(random_dataset, seed)
    scores, precision, recall = operating_points.operating_curve(match_dataset(objects, detections, 3))
    assert (np.diff(scores) < 0).all()
    total = sum(int((~truth.crowd).sum()) for truth in objects)
    for threshold, p, r in list(zip(scores, precision, recall, strict=True))[:: max(len(scores) // 6, 1)]:
        right = counted = 0
        for truth, found in zip(objects, detections, strict=True):
            kept = found.scores >= threshold
            match = match_image(truth, ImageDetections(*(part[kept] for part in found)).best(), np.array([0.5]))
            right += int((match.matched[0] >= 0).sum())
            counted += int((~match.ignored[0]).sum())
        assert (p, r) == pytest.approx((right / counted, right / total))


def test_confusion_by_hand():
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], dtype=float)
    objects = ImageObjects(np.array([0, 1, 1]), boxes, np.full(3, 100.0), np.zeros(3, dtype=bool))
    found = ImageDetections(
        np.array([0.9, 0.8, 0.7, 0.6, 0.1]),
        np.array([0, 0, 0, 2, 1]),
        np.concatenate([boxes[[0, 1, 0]], [[70, 0, 80, 10]], boxes[[2]]]).astype(float),
    )
    # Found; taken for class 0; a duplicate; nothing there; the last one is below the threshold.
    expected = np.zeros((4, 4), dtype=int)
    expected[0, 0] = expected[1, 0] = expected[1, 3] = expected[3, 0] = expected[3, 2] = 1
    assert operating_points.confusion([objects], [found], 3, 0.5).tolist() == expected.tolist()
    expected[1, 3], expected[1, 1] = 0, 1
    assert operating_points.confusion([objects], [found], 3, 0.05).tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(2))
def test_every_object_is_in_its_row_once(random_dataset, seed):
    objects, detections = opened(random_dataset, seed)
    counts = operating_points.confusion(objects, detections, 3, 0.4)
    labels = np.concatenate([truth.labels[~truth.crowd] for truth in objects])
    assert counts[:-1].sum(axis=1).tolist() == np.bincount(labels, minlength=3).tolist()
    kept = [above(classify_errors(t, f), 0.4).detections.labels for t, f in zip(objects, detections, strict=True)]
    assert counts[:, :-1].sum(axis=0).tolist() == np.bincount(np.concatenate(kept), minlength=3).tolist()


def test_pictures_of_any_detections(random_dataset, tmp_path):
    objects, detections = opened(random_dataset, 1)
    nothing = [ImageDetections(np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros((0, 4))) for _ in objects]
    for name, found in (("some", detections), ("none", nothing)):
        (tmp_path / name).mkdir()
        paths = operating_points.draw_all(tmp_path / name, objects, found, ["cat", "dog", "$emu_"])
        assert [path.name for path in paths] == ["precision_recall.png", "f1_confidence.png", "confusion.png"]
        sizes = [Image.open(path).size for path in paths]
        assert min(min(size) for size in sizes) > 300
