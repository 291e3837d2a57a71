"""The loading and evaluation of real photographs, where the data set is at hand."""

from pathlib import Path

import pytest
import torch

from datasets import CocoConfig, DataConfig
from datasets.transforms import DETRMultiScale, RandomFlip, Resize
from engine.evaluator import Evaluator
from ops.boxes import cxcywh_to_xyxy
from structures import Detections

ROOT = Path(__file__).parents[3] / "shared" / "data" / "bccd"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason="the BCCD data set is not here")


@pytest.fixture(scope="module")
def config():
    def split(name, *transforms):
        return CocoConfig(
            images=str(ROOT / "images"),
            annotations=str(ROOT / f"annotations/instances_{name}.json"),
            transforms=transforms,
        )

    return DataConfig(
        train=split("train", RandomFlip(), DETRMultiScale(short_sides=(160,), crop_short_sides=(400,))),
        val=split("val", Resize(short_side=120)),
        batch_size=8,
        num_workers=0,
        eval_batch_size=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def test_cleaning_finds_the_two_boxes_without_area(config):
    train, val = config.build_datasets()
    assert (len(train), len(val), len(train.categories)) == (205, 87, 3)
    for dataset in (train, val):
        (line,) = dataset.report.lines()
        assert line.startswith("1 x box of zero or negative size")


def test_targets_fed_back_as_detections_are_all_found_but_the_one_without_area(config):
    _, val = config.build_datasets()
    evaluator = Evaluator(config.val.annotations, val.categories)
    for batch in config.build_val_loader(val):
        scales = batch.original_sizes.flip(1).repeat(1, 2)
        found = [
            Detections(torch.ones(len(labels)), labels, cxcywh_to_xyxy(boxes) * scale)
            for (labels, boxes), scale in zip(batch.targets.split(), scales, strict=True)
        ]
        evaluator.update(batch.image_ids, found)
    metrics = evaluator.compute()
    assert metrics["images"] == 87
    assert metrics["per_class"]["WBC"] == pytest.approx(100.0)
    assert metrics["per_class"]["Platelets"] == pytest.approx(100.0)
    assert metrics["per_class"]["RBC"] == pytest.approx(100 * 100 / 101)  # the last of 101 recalls is out of reach


def test_training_batches(config):
    train, _ = config.build_datasets()
    (batch,) = next(config.build_train_loader(train, seed=0).iterate(0))
    assert batch.images.pixels.shape[0] == 8
    assert min(batch.targets.counts) > 0
    assert (batch.images.sizes.amin(dim=1) == 160).all()
    assert batch.images.pixels.abs().max() < 3
