import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import CocoConfig
from datasets.shape_drawing import NAMES, draw_image, place_objects
from datasets.shapes import SETTINGS_FILE, ShapesConfig, generate
from tools import make_shapes

SMALL = ShapesConfig(train_images=24, val_images=8, seed=3)


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "small"
    assert generate(out, SMALL, processes=2)
    return out


def test_bytes_do_not_depend_on_the_number_of_processes(shapes, tmp_path):
    assert generate(tmp_path / "again", SMALL, processes=1)
    assert digests(tmp_path / "again") == digests(shapes)


def test_another_seed_and_another_split_give_other_images(shapes, tmp_path):
    generate(tmp_path / "other", ShapesConfig(train_images=1, val_images=1, seed=4), processes=1)
    first = (shapes / "images/train/000000.jpg").read_bytes()
    assert (tmp_path / "other/images/train/000000.jpg").read_bytes() != first
    assert (shapes / "images/val/000000.jpg").read_bytes() != first


def test_ids_have_gaps_and_files_are_there(shapes):
    for split, count in (("train", 24), ("val", 8)):
        content = json.loads((shapes / f"annotations/instances_{split}.json").read_text())
        assert len(content["images"]) == count
        for key in ("images", "annotations", "categories"):
            ids = [entry["id"] for entry in content[key]]
            assert ids == sorted(set(ids))
            assert max(ids) - min(ids) + 1 > len(ids)
        for image in content["images"]:
            with Image.open(shapes / "images" / split / image["file_name"]) as picture:
                assert (picture.width, picture.height, picture.mode) == (image["width"], image["height"], "RGB")


def test_loads_as_a_coco_data_set_without_a_complaint(shapes):
    config = CocoConfig(
        images=str(shapes / "images/train"), annotations=str(shapes / "annotations/instances_train.json")
    )
    dataset = config.build(split="train")
    assert len(dataset) == 24
    assert not dataset.report, dataset.report.lines()
    assert tuple(category.name for category in dataset.categories) == NAMES


@pytest.fixture(scope="module")
def drawn():
    config = ShapesConfig()
    return [draw_image(config.scene, np.random.default_rng([7, index])) for index in range(150)]


def test_objects_are_as_numerous_and_large_as_promised(drawn):
    counts = Counter(len(objects) for _, objects in drawn)
    assert set(counts) == set(range(9))
    assert 1 <= counts[0] <= 15
    assert {item.label for _, objects in drawn for item in objects} == set(range(len(NAMES)))
    longer = [max(item.box_xywh[2:]) for _, objects in drawn for item in objects]
    assert min(longer) >= 12
    assert max(longer) <= 96
    assert min(longer) < 16
    assert max(longer) > 90


def test_boxes_are_inside_the_image_and_some_objects_are_cut_off(drawn):
    boxes = np.array([item.box_xywh for _, objects in drawn for item in objects])
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    assert (low >= 0).all()
    assert (high <= 192).all()
    cut = (low == 0).any(axis=1) | (high == 192).any(axis=1)
    assert 0.05 < cut.mean() < 0.5
    areas = np.array([item.area for _, objects in drawn for item in objects])
    assert (areas <= boxes[:, 2] * boxes[:, 3]).all()
    assert (areas > 0.1 * boxes[:, 2] * boxes[:, 3]).all()


def test_objects_overlap(drawn):
    overlapping = 0
    for _, objects in drawn:
        boxes = np.array([item.box_xywh for item in objects]).reshape(-1, 4)
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], (boxes[:, :2] + boxes[:, 2:])[None])
        shared = (high - low).clip(0).prod(axis=2) * (1 - np.eye(len(boxes)))
        overlapping += int((shared > 0.1 * boxes[:, 2:].prod(axis=1)).any())
    assert overlapping > 0.3 * len(drawn)


def test_boxes_are_tight(drawn):
    scene = ShapesConfig(max_objects=1, empty_share=0.0).scene
    for index in range(12):
        (placed,) = place_objects(scene, np.random.default_rng([11, index]))
        rows, columns = np.nonzero(placed.alpha)
        x, y, width, height = placed.drawn.box_xywh
        assert placed.left + columns.min() == int(np.floor(x))
        assert placed.top + rows.min() == int(np.floor(y))
        assert placed.left + columns.max() + 1 == int(np.ceil(x + width))
        assert placed.top + rows.max() + 1 == int(np.ceil(y + height))


def test_images_vary(drawn):
    means = np.array([pixels.mean(axis=(0, 1)) for pixels, _ in drawn])
    assert (means.std(axis=0) > 20).all()
    assert min(pixels.std() for pixels, _ in drawn) > 8


def test_generating_again_leaves_everything_alone(shapes):
    before = {path: path.stat().st_mtime_ns for path in shapes.rglob("*")}
    assert not generate(shapes, SMALL)
    assert {path: path.stat().st_mtime_ns for path in shapes.rglob("*")} == before


def test_an_interrupted_generation_is_started_over(tmp_path, shapes):
    out = tmp_path / "shapes"
    generate(out, SMALL, processes=1)
    (out / SETTINGS_FILE).rename(out / "shapes.unfinished.json")
    (out / "annotations/instances_val.json").unlink()
    assert generate(out, SMALL, processes=1)
    assert digests(out) == digests(shapes)


def test_other_contents_are_refused(shapes, tmp_path):
    with pytest.raises(ValueError, match="other settings"):
        generate(shapes, ShapesConfig(seed=9))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a shapes data set"):
        generate(tmp_path, SMALL)


@pytest.mark.parametrize(
    "settings",
    [
        {"train_images": 0},
        {"max_object_size": 400},
        {"min_object_size": 50, "max_object_size": 40},
        {"empty_share": 1.0},
        {"seed": -1},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="shapes:"):
        ShapesConfig(**settings)


def test_command(tmp_path, capsys):
    out = tmp_path / "made"
    arguments = ["--out", str(out), "--train-images", "3", "--val-images", "2", "--processes", "1"]
    assert make_shapes.main(arguments) == 0
    assert "wrote 5 images" in capsys.readouterr().out
    assert make_shapes.main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert make_shapes.main([*arguments, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
