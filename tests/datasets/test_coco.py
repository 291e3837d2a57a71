import json
import logging
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2

from datasets import Category, CocoConfig, DataConfig, coco
from datasets.coco import MAX_REPLACEMENTS, SampleKey
from datasets.images import UnreadableImageError
from datasets.mixing import Mosaic
from datasets.sampling import RepeatFactor
from datasets.sizes import RandomResize, RandomSizeCrop, Resize, ResizeExact
from datasets.transforms import IoUCrop, RandomFlip
from engine.evaluator import Evaluator
from structures import Detections


def build(folder, split="train", **arguments):
    return CocoConfig(**folder.paths(), **arguments).build(split=split)


def get(dataset, index, seed=0):
    loaded = dataset[SampleKey(index, seed)]
    assert loaded.sample is not None
    return loaded.sample


def test_equals_torchvisions_data_set_on_clean_annotations(make_folder):
    folder = make_folder(boxes_per_image=4)
    ours = build(folder)
    theirs = CocoDetection(str(folder.images), str(folder.annotations))
    assert ours.ids == theirs.ids
    wrapped = wrap_dataset_for_transforms_v2(theirs, target_keys=("image_id", "boxes", "labels"))
    for index in range(len(ours)):
        image, boxes, labels, size = ours.load(index)
        picture, target = wrapped[index]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture))
        assert size == (picture.height, picture.width)
        torch.testing.assert_close(boxes, target["boxes"].as_subclass(torch.Tensor), rtol=1e-5, atol=1e-4)
        assert [ours.categories[label].id for label in labels.tolist()] == target["labels"].tolist()
        assert get(ours, index).image_id == target["image_id"]


def test_categories_map_to_labels_and_back(make_folder):
    folder = make_folder(boxes_per_image=0)
    for category_id in (20, 4, 9):
        folder.add(10, [1, 1, 10, 10 + category_id], category_id)
    folder.content["categories"].reverse()
    folder.write()
    dataset = build(folder)
    assert dataset.categories == (Category(4, "cat"), Category(9, "dog"), Category(20, "emu"))
    assert get(dataset, 0).labels.tolist() == [2, 0, 1]


def test_samples_are_relative_to_the_augmented_image(make_folder):
    folder = make_folder(sizes=[(40, 80)], boxes_per_image=0)
    folder.add(10, [20, 10, 40, 20])
    folder.write()
    dataset = build(folder, transforms=(RandomFlip(probability=1.0), Resize(short_side=20, max_long_side=None)))
    sample = get(dataset, 0, seed=99)
    assert sample.image.shape == (3, 20, 40)
    assert sample.boxes.tolist() == [[0.5, 0.5, 0.5, 0.5]]
    assert (sample.original_size, sample.seed) == ((40, 80), 99)
    assert type(sample.image) is torch.Tensor
    assert type(sample.boxes) is torch.Tensor


def test_a_sample_depends_on_its_key_only(make_folder):
    dataset = build(make_folder(), transforms=(RandomFlip(),))
    for key in (SampleKey(1, 5), SampleKey(1, 6), SampleKey(2, 5)):
        first, second = dataset[key].sample, dataset[key].sample
        assert torch.equal(first.image, second.image)
        assert torch.equal(first.boxes, second.boxes)


def test_images_without_a_box_can_be_left_out_of_training(make_folder):
    """Crowds alone are none (detectron2); validation keeps every image."""
    folder = make_folder(sizes=[(40, 80), (80, 40), (50, 50), (30, 60)], boxes_per_image=0)
    folder.add(10, [1, 1, 20, 20])
    folder.add(13, [1, 1, 20, 20], iscrowd=1)
    folder.add(19, [1, 1, 20, 10])
    folder.write()
    for skip, ids in ((False, [10, 13, 16, 19]), (True, [10, 19])):
        split = CocoConfig(**folder.paths())
        data = DataConfig(train=split, val=split, batch_size=2, skip_empty=skip, mean=(0, 0, 0), std=(1, 1, 1))
        train, val = data.build_datasets()
        assert (train.ids, val.ids) == (ids, [10, 13, 16, 19])
        assert [get(train, index).boxes.shape[0] for index in range(len(train))] == [int(i in (10, 19)) for i in ids]
        assert ("2 x image without a box, skipped (001.png, 002.png)" in train.report.lines()) == skip


def test_batches_of_one_orientation_go_by_the_annotated_size(make_folder):
    """Read from the file where it is not stated; square images count as high."""
    folder = make_folder(sizes=[(40, 80), (80, 40), (50, 50), (30, 60), (60, 30), (20, 90), (90, 20)])
    for key in ("width", "height"):
        del folder.content["images"][5][key]
    folder.write()
    split = CocoConfig(**folder.paths())
    data = DataConfig(
        train=split, val=split, batch_size=2, one_orientation=2, num_workers=0, mean=(0,) * 3, std=(1,) * 3
    )
    train, _ = data.build_datasets()
    assert train.wider_than_high().tolist() == [True, False, False, True, False, True, False]
    loader = data.build_train_loader(train, seed=1)
    assert loader.steps_per_epoch == 3
    for epoch in range(4):
        for (batch,) in loader.iterate(epoch):
            assert len({width > height for height, width in batch.original_sizes.tolist()}) == 1
    with pytest.raises(ValueError, match=r"data.one_orientation=3 must divide data.batch_size=4"):
        DataConfig(train=split, val=split, batch_size=4, one_orientation=3)
    with pytest.raises(ValueError, match=r"data.one_orientation=2 needs data.sampling: uniform"):
        DataConfig(train=split, val=split, batch_size=4, one_orientation=2, sampling=RepeatFactor())


def test_whether_samples_are_of_many_sizes(make_folder):
    """By the annotations and the transforms, mixing ones too, at any time of the training."""
    alike, differing = (
        make_folder(sizes=[(40, 60 + step * index) for index in range(40)], boxes_per_image=0) for step in (0, 1)
    )
    differing.content["images"][3]["width"] = 0
    differing.content["images"][4]["width"] = 10**9
    for folder in (alike, differing):
        folder.add(10, [1, 1, 20, 20])
        folder.write()
        for file in folder.images.iterdir():
            file.write_bytes(b"unreadable")
    for transforms, of_alike, of_differing in (
        ((), False, True),
        ((Resize(short_side=30),), False, True),
        ((RandomResize(short_sides=(30, 40, 50)),), False, True),
        ((RandomSizeCrop(min_size=8, max_size=40),), True, True),
        ((RandomSizeCrop(min_size=8, max_size=40), ResizeExact(height=32, width=32)), False, False),
        ((IoUCrop(min_iou=(0.0,)),), True, True),
        ((RandomFlip(), Mosaic(size=64)), False, False),
        ((Mosaic(size=64, until=0.9),), False, True),
    ):
        assert build(alike, transforms=transforms).many_sizes() is of_alike, transforms
        assert build(differing, transforms=transforms).many_sizes() is of_differing, transforms
    for index, image in enumerate(differing.content["images"]):
        image |= {"width": 3000 + 50 * index, "height": 2500}
    differing.write()
    assert build(differing, transforms=(Resize(short_side=30),)).many_sizes()


def test_sizes_that_are_not_stated_are_looked_at(make_folder):
    folder = make_folder(sizes=[(40, 60 + index) for index in range(12)], boxes_per_image=1)
    for image in folder.content["images"]:
        image |= {"width": 0, "height": 0}
    folder.write()
    assert build(folder).many_sizes()


@pytest.mark.parametrize("looked_at", [200, 4])
def test_pictures_that_are_to_be_turned_are_said_before_training(make_folder, monkeypatch, looked_at):
    """Of many files, some are looked at; a pipe among them is not waited for."""
    monkeypatch.setattr(coco, "HEADERS_LOOKED_AT", looked_at)
    folder = make_folder(sizes=[(40, 80)] * 7)
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(0, 7, 2):
        Image.new("RGB", (80, 40)).save(folder.images / f"{index:03d}.png", exif=exif)
    folder.content["images"][2].update(height=80, width=40)
    (folder.images / "005.png").unlink()
    os.mkfifo(folder.images / "005.png")
    folder.write()
    for split in ("train", "val"):
        lines = [line for line in build(folder, split).report.lines() if "EXIF" in line]
        of = "" if looked_at == 200 else " (of 4 looked at)"
        assert lines == [
            f"3 x image with an EXIF orientation, used as stored: look whether its boxes fit{of} "
            "(000.png, 004.png, 006.png)",
            f"1 x image annotated upright, turned by its EXIF orientation{of} (002.png)",
        ]


def test_a_resized_copy_keeps_its_boxes(make_folder):
    folder = make_folder(sizes=[(41, 60)], boxes_per_image=0)
    folder.content["images"][0].update(height=82, width=121)
    folder.add(10, [60.5, 41, 60.5, 41])
    folder.write()
    sample = get(build(folder), 0)
    assert sample.original_size == (82, 121)
    torch.testing.assert_close(sample.boxes, torch.tensor([[0.75, 0.75, 0.5, 0.5]]), rtol=1e-5, atol=1e-5)


def test_another_picture_than_the_annotated_one_is_unreadable(make_folder):
    folder = make_folder()
    folder.content["images"][0].update(height=60, width=40)
    folder.write()
    with pytest.raises(UnreadableImageError, match="has 60 x 40 pixels, its annotation says 40 x 60"):
        build(folder).load(0)


def test_upright_annotations_of_a_turned_picture(make_folder):
    folder = make_folder(sizes=[(40, 60)], boxes_per_image=0)
    path = folder.images / "000.png"
    pixels = np.asarray(Image.open(path))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif)
    folder.content["images"][0].update(height=60, width=40)
    folder.add(10, [0, 0, 20, 30])
    folder.write()
    sample = get(build(folder), 0)
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), np.rot90(pixels, -1))
    assert sample.original_size == (60, 40)


def test_missing_sizes_come_from_the_file(make_folder):
    folder = make_folder(sizes=[(40, 60)], boxes_per_image=0)
    del folder.content["images"][0]["width"]
    folder.add(10, [50, 30, 100, 100])
    folder.write()
    dataset = build(folder)
    assert dataset.stated_size(0) == (40, 60)
    sample = get(dataset, 0)
    assert sample.original_size == (40, 60)
    torch.testing.assert_close(sample.boxes, torch.tensor([[55 / 60, 35 / 40, 10 / 60, 10 / 40]]))
    (folder.images / "000.png").write_text("broken")
    assert dataset.stated_size(0) == (0, 0)


def test_unreadable_training_images_are_replaced_by_the_next(make_folder):
    folder = make_folder(sizes=[(30, 30)] * 5)
    dataset = build(folder)
    for name in ("001.png", "002.png"):
        (folder.images / name).write_text("broken")
    loaded = dataset[SampleKey(1, 7)]
    assert loaded.sample.image_id == 19
    assert [image_id for image_id, _ in loaded.skipped] == [13, 16]
    assert all(name in reason for name, (_, reason) in zip(("001", "002"), loaded.skipped, strict=True))
    (folder.images / "004.png").unlink()
    assert dataset[SampleKey(4, 7)].sample.image_id == 10, "after the last image comes the first"


def test_replacing_ends(make_folder):
    folder = make_folder(sizes=[(20, 20)] * (MAX_REPLACEMENTS + 4), boxes_per_image=1)
    dataset = build(folder)
    for path in folder.images.iterdir():
        path.write_text("broken")
    loaded = dataset[SampleKey(0, 0)]
    assert loaded.sample is None
    assert len(loaded.skipped) == MAX_REPLACEMENTS


def test_unreadable_evaluation_images_are_left_out(make_folder):
    folder = make_folder()
    dataset = build(folder, split="val")
    (folder.images / "001.png").write_text("broken")
    loaded = dataset[SampleKey(1, 0)]
    assert loaded.sample is None
    assert len(loaded.skipped) == 1


def test_absent_images(make_folder):
    folder = make_folder()
    (folder.images / "001.png").unlink()
    train, val = build(folder), build(folder, split="val")
    assert train.ids == [10, 16]
    assert [get(train, index).image_id for index in range(2)] == [10, 16]
    assert len(val) == 3
    assert "1 x image listed but absent, skipped (001.png)" in train.report.lines()
    assert "1 x image listed but absent, its objects count as missed (001.png)" in val.report.lines()


def test_absent_images_are_told_by_their_reason(make_folder):
    folder = make_folder()
    for entry in folder.content["images"]:
        entry["file_name"] = "elsewhere\\" + entry["file_name"]
    folder.write()
    with pytest.raises(FileNotFoundError, match=r"folders too many: 000\.png is there\): write the names as"):
        build(folder)
    folder.content["images"][0]["file_name"] = "000.png"
    folder.write()
    (line,) = build(folder).report.lines()
    assert line.startswith("2 x image listed but absent, skipped (elsewhere\\001.png, which has folders too many: 001")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_without_its_last_bytes_is_used_unless_strict(make_folder, split, caplog):
    folder = make_folder()
    path = folder.images / "001.png"
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 5])
    dataset = build(folder, split)
    assert get(dataset, 1).image_id == get(dataset, 1).image_id == 13
    assert len(caplog.records) == 1, "said once"
    assert "001.png: its last bytes are missing" in caplog.text
    loaded = build(folder, split, strict_images=True)[SampleKey(1, 0)]
    assert [image_id for image_id, _ in loaded.skipped] == [13]


def test_a_class_that_validation_lacks_is_told_once(make_folder, caplog):
    train, val = make_folder(), make_folder(seed=1)
    val.content["categories"].pop()
    val.content["annotations"] = [a for a in val.content["annotations"] if a["category_id"] != 20]
    val.write()
    train_set, val_set = DataConfig(train=CocoConfig(**train.paths()), val=CocoConfig(**val.paths())).build_datasets()
    assert not val_set.report.lines()  # the evaluator tells of it
    evaluator = Evaluator(str(val.annotations), train_set.categories)
    found = Detections(torch.ones(3), torch.arange(3), torch.tensor([[1.0, 1, 9, 9]]).repeat(3, 1))
    evaluator.update(val_set.ids, [found] * 3)
    with warnings.catch_warnings(record=True) as caught:
        assert evaluator.compute()["per_class"]["emu"] is None
    assert not caught


def test_files_in_subdirectories_are_found(make_folder):
    folder = make_folder()
    (folder.images / "sub").mkdir()
    (folder.images / "001.png").rename(folder.images / "sub" / "001.png")
    folder.content["images"][1]["file_name"] = "sub/001.png"
    folder.content["images"][2]["file_name"] = "gone/002.png"
    folder.write()
    dataset = build(folder)
    assert dataset.ids == [10, 13]
    get(dataset, 1)


def test_a_thousand_boxes(make_folder):
    folder = make_folder(sizes=[(30, 30)], boxes_per_image=1000)
    sample = get(build(folder), 0)
    assert sample.boxes.shape == (1000, 4)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_data_set_says_what_is_expected_where(tmp_path, make_folder, split):
    folder = make_folder()
    cases = [
        {"images": str(folder.images), "annotations": str(tmp_path / "gone.json")},
        {"images": str(tmp_path / "gone"), "annotations": str(folder.annotations)},
    ]
    for paths in cases:
        with pytest.raises(FileNotFoundError) as error:
            CocoConfig(**paths).build(split=split)
        message = str(error.value)
        assert "gone" in message
        assert f"data.{split}.annotations must name" in message
        assert f"data.{split}.images" in message
        assert "make quickstart" in message
        assert "\n" not in message


def test_the_wrong_image_directory_is_refused(make_folder, tmp_path):
    folder = make_folder()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none of the 3 images .* set data.train.images"):
        CocoConfig(images=str(tmp_path / "empty"), annotations=str(folder.annotations)).build(split="train")


@pytest.mark.parametrize("annotations", [None, [], "crowds only"])
def test_training_without_any_box_is_refused(make_folder, annotations):
    folder = make_folder(boxes_per_image=0)
    if annotations is None:
        del folder.content["annotations"]
    elif annotations:
        folder.add(10, [1, 1, 5, 5], iscrowd=1)
    folder.write()
    with pytest.raises(ValueError, match="no usable box to train on") as error:
        build(folder)
    assert "\n" not in str(error.value)
    assert len(build(folder, split="val")) == 3


def test_validation_is_mapped_to_the_classes_of_training(make_folder):
    train, val = make_folder(), make_folder(seed=1)
    val.content["categories"] = val.content["categories"][1:][::-1]
    val.content["annotations"] = [a for a in val.content["annotations"] if a["category_id"] != 4]
    val.write()
    config = DataConfig(train=CocoConfig(**train.paths()), val=CocoConfig(**val.paths()), batch_size=2)
    train_set, val_set = config.build_datasets()
    assert val_set.categories == train_set.categories
    assert val_set.annotations.labels.min() >= 1


def test_splits_that_contradict_each_other_are_refused(make_folder):
    train, val = make_folder(), make_folder(seed=1)
    config = DataConfig(train=CocoConfig(**train.paths()), val=CocoConfig(**val.paths()), batch_size=2)
    val.content["categories"][1]["name"] = "wolf"
    val.write()
    with pytest.raises(ValueError, match="category 9 is 'wolf', but 'dog' in the training data"):
        config.build_datasets()
    val.content["categories"][1] = {"id": 9, "name": "dog"}
    val.content["categories"].append({"id": 30, "name": "fox"})
    val.content["annotations"].append({"category_id": [30]})
    val.write()
    config.build_datasets()  # a class without objects does no harm
    val.add(10, [1, 1, 5, 5], 30)
    val.write()
    with pytest.raises(ValueError, match=r"does not know: 30 \(fox\)"):
        config.build_datasets()


def test_a_dirty_file_is_cleaned_and_reported(make_folder, caplog):
    folder = make_folder()
    folder.add(10, [5, 5, 0, 10])
    folder.add(10, [5, 5, float("nan"), 10])
    folder.add(10, [500, 5, 10, 10])
    folder.add(10, [-20, -20, 30, 30])
    folder.add(10, [5, 5, 10, 10], iscrowd=1)
    folder.add(10, [5, 5, 10, 10], category_id=77)
    folder.write()
    with caplog.at_level(logging.WARNING):
        dataset = build(folder)
    assert len(get(dataset, 0).boxes) == 3
    assert len(dataset.report.lines()) == 6
    assert json.loads(folder.annotations.read_text())["annotations"], "the file itself is left alone"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"num_workers": -1}, "num_workers must not be negative"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"val": CocoConfig(images="", annotations="", transforms=(RandomFlip(),))}, "random_flip cannot be used"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    paths = {"images": "images", "annotations": "annotations"}
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"train": CocoConfig(**paths), "val": CocoConfig(**paths), **settings})
