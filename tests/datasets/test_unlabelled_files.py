"""What annotation files leave unlabelled: crowds and, in federated files, classes nobody looked for."""

import json

import pytest
import torch
from PIL import Image

from datasets import CocoConfig
from datasets.coco import SampleKey
from datasets.collate import make_batch
from datasets.transforms import RandomFlip


@pytest.fixture
def files(tmp_path):
    """Two images of 100 × 50: one with an object and a crowd, one that is federated; classes 3, 5 and 9."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 50)).save(tmp_path / name)
    content = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 100, "height": 50},
            {
                "id": 2,
                "file_name": "b.png",
                "width": 100,
                "height": 50,
                "neg_category_ids": [5],
                "not_exhaustive_category_ids": [],
            },
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20]},
            {"id": 2, "image_id": 1, "category_id": 9, "bbox": [50, 0, 50, 50], "iscrowd": 1},
            {"id": 3, "image_id": 2, "category_id": 3, "bbox": [0, 0, 20, 20]},
        ],
        "categories": [{"id": i, "name": str(i)} for i in (3, 5, 9)],
    }

    def config(**fields):
        content["images"][1] |= fields
        (tmp_path / "annotations.json").write_text(json.dumps(content))
        flip = RandomFlip(probability=1.0)
        return CocoConfig(images=str(tmp_path), annotations=str(tmp_path / "annotations.json"), transforms=(flip,))

    return config


def samples(dataset):
    return [dataset[SampleKey(index, 0)].sample for index in range(2)]


def test_crowds_are_regions_that_transforms_move(files):
    first, second = samples(files().build(split="train", unlabelled=True))
    assert first.labels.tolist() == [0]
    boxes, labels = first.regions
    assert labels.tolist() == [2]
    torch.testing.assert_close(boxes, torch.tensor([[0.25, 0.5, 0.5, 1.0]]))  # the right half, mirrored
    assert not first.silent.any()
    assert second.regions[0].shape == (0, 4)
    batch = make_batch([first, second], (0, 0, 0), (1, 1, 1))
    assert batch.targets.counts == (1, 1)
    assert batch.targets.unlabelled.counts == (1, 0)
    assert torch.equal(batch.targets.unlabelled.regions, boxes)


@pytest.mark.parametrize(
    ("fields", "silent"),
    [
        ({}, [False, False, True]),  # nobody looked for class 9
        ({"neg_category_ids": [5, 9]}, [False, False, False]),
        ({"neg_category_ids": []}, [False, True, True]),
        ({"not_exhaustive_category_ids": [3]}, [True, False, True]),
        ({"neg_category_ids": [5.0, 9, 77, "x", [1]]}, [False, False, False]),  # what is no category is passed over
        ({"neg_category_ids": None, "not_exhaustive_category_ids": [3]}, [True, False, False]),
    ],
)
def test_classes_that_an_image_says_nothing_about(files, fields, silent):
    assert samples(files(**fields).build(split="train", unlabelled=True))[1].silent.tolist() == silent


def test_off_by_default(files):
    first, second = samples(files().build(split="train"))
    assert first.regions is None
    assert make_batch([first, second], (0, 0, 0), (1, 1, 1)).targets.unlabelled is None
