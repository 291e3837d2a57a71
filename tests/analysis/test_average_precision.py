"""AP with image weights: equal to pycocotools, and weights are repetition."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.average_precision import average_precision, class_precision, match_dataset, without_tail
from analysis.detections_file import annotated_images, detections_by_image
from engine.coco_metrics import box_metrics

CATEGORY_IDS = (5, 7, 9)


def matched(truth, rows):
    images = annotated_images(truth, CATEGORY_IDS)
    found = detections_by_image(rows, [image.image_id for image in images], CATEGORY_IDS)
    return images, found, match_dataset([image.objects for image in images], found, len(CATEGORY_IDS))


@pytest.mark.parametrize("seed", range(8))
def test_precision_is_that_of_pycocotools(random_dataset, seed):
    truth, rows = random_dataset(seed)
    _, _, dataset = matched(truth, rows)
    expected = box_metrics(truth, rows, "pycocotools")
    assert average_precision(dataset) == pytest.approx(expected.statistics[0], abs=1e-9)
    for label, found in enumerate(dataset.classes):
        np.testing.assert_allclose(class_precision(found), expected.precision[:, :, label, 0, 2], atol=1e-9)


def test_the_limit_of_detections_is_for_each_class_of_an_image(random_dataset):
    truth, rows = random_dataset(1)
    rng = np.random.default_rng(0)
    image_ids = np.array(sorted(truth.image_ids))
    many = np.column_stack(
        [rng.choice(image_ids, 3000), rng.uniform(0, 60, (3000, 2)), rng.uniform(8, 40, (3000, 2)),
         rng.random(3000), rng.choice([5.0, 7.0], 3000)]
    )  # fmt: skip
    everything = np.concatenate([rows, many])
    _, _, dataset = matched(truth, everything)
    expected = box_metrics(truth, everything, "pycocotools").statistics[0]
    assert average_precision(dataset) == pytest.approx(expected, abs=1e-9)
    assert all(np.bincount(found.image).max() <= 100 for found in dataset.classes)


@pytest.mark.parametrize("seed", range(4))
def test_a_weight_counts_as_repetitions_of_the_image(random_dataset, seed):
    truth, rows = random_dataset(seed)
    rows[:, 5] += np.linspace(0, 1e-3, len(rows))  # without equal scores, whose order would be a matter of taste
    images, found, dataset = matched(truth, rows)
    weights = np.random.default_rng(seed).integers(0, 4, len(images))
    repeated = [i for i, weight in enumerate(weights) for _ in range(weight)]
    expected = match_dataset([images[i].objects for i in repeated], [found[i] for i in repeated], len(CATEGORY_IDS))
    assert average_precision(dataset, weights.astype(float)) == pytest.approx(average_precision(expected), abs=1e-9)
    assert average_precision(without_tail(dataset), weights.astype(float)) == pytest.approx(
        average_precision(dataset, weights.astype(float)), abs=1e-12
    )


def test_nothing_to_find_is_not_a_number(random_dataset):
    truth, rows = random_dataset(0)
    _, _, dataset = matched(truth, rows)
    assert np.isnan(average_precision(dataset, np.zeros(dataset.num_images)))
