"""What the evaluator writes is what the analysis reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.average_precision import average_precision, match_dataset
from analysis.detections_file import annotated_images, detections_by_image, read_rows
from engine.evaluator import Evaluator
from structures import Detections

CATEGORY_IDS = (5, 7, 9)


def test_saved_detections_give_the_evaluators_ap(random_dataset, tmp_path):
    truth, rows = random_dataset(4)
    evaluator = Evaluator(truth.content, [(c, str(c)) for c in CATEGORY_IDS], backend="pycocotools")
    image_ids = sorted(truth.image_ids)
    for image_id, found in zip(image_ids, detections_by_image(rows, image_ids, CATEGORY_IDS), strict=True):
        tensors = (torch.from_numpy(part) for part in found)
        evaluator.update([image_id], [Detections(*tensors)])
    evaluator.save(tmp_path / "detections.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["detections.npz"]

    read = read_rows(tmp_path / "detections.npz")
    assert len(read) == len(rows)
    images = annotated_images(truth, CATEGORY_IDS)
    found = detections_by_image(read, image_ids, CATEGORY_IDS)
    own = average_precision(match_dataset([image.objects for image in images], found, 3))
    assert 100 * own == pytest.approx(evaluator.compute()["AP"], abs=1e-6)


def test_detections_by_image_are_the_rows(random_dataset):
    truth, rows = random_dataset(2)
    image_ids = sorted(truth.image_ids)
    found = detections_by_image(rows, image_ids, CATEGORY_IDS)
    assert sum(len(part.scores) for part in found) == len(rows)
    order = np.argsort(rows[:, 0], kind="stable")
    back = [
        [image_id, x0, y0, x1 - x0, y1 - y0, score, CATEGORY_IDS[label]]
        for image_id, part in zip(image_ids, found, strict=True)
        for score, label, (x0, y0, x1, y1) in zip(*part, strict=True)
    ]
    np.testing.assert_allclose(back, rows[order])


def test_images_without_objects_and_other_categories(random_dataset):
    truth, rows = random_dataset(2)
    images = annotated_images(truth, (7,))
    assert [image.image_id for image in images] == sorted(truth.image_ids)
    assert sum(len(image.objects.labels) for image in images) == sum(
        row["category_id"] == 7 for row in truth.content["annotations"]
    )
    found = detections_by_image(rows, [image.image_id for image in images], (7,))
    assert sum(len(part.scores) for part in found) == int((rows[:, 6] == 7).sum())


def test_other_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.npz").write_text("nothing")
    np.savez(tmp_path / "other.npz", scores=np.zeros(3))
    for name in ("text.npz", "other.npz", "absent.npz"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as detections") as caught:
            read_rows(tmp_path / name)
        assert "\n" not in str(caught.value)
