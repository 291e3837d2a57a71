import json
import os

import numpy as np
import pytest
from PIL import Image

from datasets import CocoConfig
from tools import check_data


@pytest.fixture
def dirty(tmp_path):
    """An image for each finding, and annotations with several faults."""
    rng = np.random.default_rng(0)
    images = tmp_path / "images"
    images.mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]}

    def add(name, picture, size=(40, 60), **options):
        picture.save(images / name, **options)
        image_id = 10 + 2 * len(content["images"])
        content["images"].append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
        return image_id

    def picture(height=40, width=60):
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    upright = Image.Exif()
    upright[0x0112] = 6
    good = add("good.png", picture())
    add("palette.png", picture().convert("P"))
    add("moving.gif", picture(), save_all=True, append_images=[picture()])
    add("turned.png", picture(), size=(60, 40), exif=upright)
    add("half.png", picture(20, 30))
    add("other.png", picture(33, 33))
    add("broken.png", picture())
    (images / "broken.png").write_text("broken")
    add("absent.png", picture())
    (images / "absent.png").unlink()
    for index, (box, fields) in enumerate(
        [
            ([5, 5, 20, 20], {}),
            ([5, 5, 0, 20], {}),
            ([5, 5, float("nan"), 20], {}),
            ([50, 30, 30, 30], {"category_id": 8}),
            ([5, 5, 20, 20], {"iscrowd": 1}),
            ([5, 5, 20, 20], {"category_id": 4}),
            ([5, 5, 20, 20], {"image_id": 99}),
        ]
    ):
        content["annotations"].append({"id": index, "image_id": good, "category_id": 3, "bbox": box, **fields})
    path = tmp_path / "dirty.json"
    path.write_text(json.dumps(content))
    return images, path


@pytest.mark.parametrize("processes", [1, 2])
def test_everything_dirty_is_counted_with_an_example(dirty, tmp_path, capsys, processes):
    images, annotations = dirty
    page = tmp_path / "page.png"
    arguments = ["--images", str(images), "--annotations", str(annotations), "--page", str(page)]
    assert check_data.main([*arguments, "--processes", str(processes)]) == 0
    output = capsys.readouterr().out
    assert "train: 7 images" in output
    assert "2 boxes of 2 classes" in output
    assert "6 images without any" in output
    assert "cat 1, dog 1" in output
    for line in (
        "1 x box of zero or negative size, dropped (annotation 1)",
        "1 x box with NaN or infinity, dropped (annotation 2)",
        "1 x box reaching beyond the image, clipped (annotation 3)",
        "1 x crowd, dropped (annotation 4)",
        "1 x box of an unknown category, dropped (annotation 5)",
        "1 x annotation of an unknown image, dropped (annotation 6)",
        "1 x image listed but absent, skipped (absent.png)",
        "2 x unreadable image, skipped (",
        "broken.png: cannot identify image file",
        "has 33 x 33 pixels, its annotation says 60 x 40",
        "1 x animation, its first frame is used (moving.gif)",
        "2 x image in mode P, converted to RGB (palette.png, moving.gif)",
        "1 x image annotated upright, turned by its EXIF orientation (turned.png)",
        "1 x image of another size than annotated, boxes scaled (half.png)",
    ):
        assert line in output, output
    with Image.open(page) as picture:
        assert picture.width == check_data.COLUMNS * check_data.CELL
        assert len(picture.convert("RGB").getcolors(2**24)) > 1000


def test_annotations_alone(dirty, tmp_path, capsys):
    images, annotations = dirty
    page = tmp_path / "page.png"
    arguments = ["--images", str(images), "--annotations", str(annotations), "--page", str(page), "--no-decode"]
    assert check_data.main(arguments) == 0
    assert "unreadable" not in capsys.readouterr().out
    assert not page.exists()


def test_a_configuration_is_checked_split_by_split(dirty, tmp_path, capsys):
    images, annotations = dirty
    cfg = tmp_path / "run.yaml"
    split = f"{{images: {images}, annotations: {annotations}, transforms: [TRANSFORM]}}"
    cfg.write_text(
        f"data:\n  train: {split.replace('TRANSFORM', '{name: random_flip}')}\n"
        f"  val: {split.replace('TRANSFORM', '{name: resize, short_side: 32}')}\n"
    )
    page = tmp_path / "page.png"
    assert check_data.main(["--cfg", str(cfg), "--page", str(page), "--processes", "1", "data.batch_size=2"]) == 0
    output = capsys.readouterr().out
    assert "train: 7 images" in output
    assert "val: 8 images" in output
    assert "3 x unreadable image, its objects count as missed" in output
    assert page.exists()


def test_refusals_are_one_line(tmp_path, dirty, capsys):
    images, annotations = dirty
    cases = [
        ["--images", str(images), "--annotations", str(tmp_path / "gone.json")],
        ["--images", str(tmp_path), "--annotations", str(annotations)],
        ["--cfg", str(tmp_path / "gone.yaml")],
    ]
    for arguments in cases:
        assert check_data.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_what_a_terminal_does_not_show_is_said(dirty, tmp_path, capsys):
    images, annotations = dirty
    (images / "half.png").unlink()
    os.mkfifo(images / "half.png")
    content = json.loads(annotations.read_text())
    content["categories"][0]["name"], content["categories"][1]["name"] = " cat ", "d\nog"
    content["images"][2]["file_name"] = "moving.gif "
    annotations.write_text(json.dumps(content))
    page = ["--page", str(tmp_path / "page.png"), "--processes", "1"]
    assert check_data.main(["--images", str(images), "--annotations", str(annotations), *page]) == 0
    output = capsys.readouterr().out
    assert "boxes of each class: cat 1, d og 1\n" in output
    assert "2 x category whose name has spaces around it, several in a row or line breaks, kept so" in output
    assert "(' cat ', 'd\\nog')" in output
    assert f"{images}/half.png: a pipe or device, not a file" in output
    assert "which has spaces around it: moving.gif is there" in output
    for entry in content["images"]:
        entry["file_name"] = f"0123cdef-{entry['file_name']}"
    content["images"][0]["file_name"] = "gone.png"
    annotations.write_text(json.dumps(content))
    assert check_data.main(["--images", str(images), "--annotations", str(annotations), *page]) == 2
    error = capsys.readouterr().err
    assert "(such as '0123cdef-palette.png', which has Label Studio's prefix: palette.png is there)" in error


def test_what_training_would_refuse_is_an_error_after_the_report(dirty, tmp_path, capsys):
    images, annotations = dirty
    content = json.loads(annotations.read_text())
    content["annotations"] = []
    (tmp_path / "empty.json").write_text(json.dumps(content))
    content["images"] = [entry for entry in content["images"] if entry["file_name"] in ("broken.png", "absent.png")]
    (tmp_path / "unreadable.json").write_text(json.dumps(content))
    cfg = tmp_path / "run.yaml"
    cfg.write_text(
        f"data:\n  train: {{images: {images}, annotations: {annotations}}}\n"
        f"  val: {{images: {images}, annotations: {annotations}}}\n  batch_size: 2\n"
    )
    arguments = ["--cfg", str(cfg), "--page", str(tmp_path / "page.png"), "--processes", "1"]
    for override, said in (
        ("data.batch_size=8", "data.batch_size=8 is more than the 7 training images"),
        ("trainer.accumulation_steps=3", "must be a multiple of 3"),
        (f"data.val.annotations={tmp_path}/empty.json", "no objects to find"),
        (f"data.val.annotations={tmp_path}/unreadable.json", "val: not one of its images can be read"),
    ):
        assert check_data.main([*arguments, override]) == 2
        found = capsys.readouterr()
        assert said in found.err
        assert all(line.startswith("error: ") for line in found.err.splitlines())
        assert "train: 7 images" in found.out
        assert "samples: " in found.out


def test_damaged_and_turned_pictures_are_named(tmp_path, dirty, capsys):
    images, annotations = dirty
    upright = Image.Exif()
    upright[0x0112] = 3
    Image.new("RGB", (60, 40), "red").save(images / "good.png", exif=upright)
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "palette.png")
    (images / "palette.png").write_bytes((images / "palette.png").read_bytes()[:-1500])
    page = tmp_path / "page.png"
    arguments = ["--images", str(images), "--annotations", str(annotations), "--page", str(page), "--processes", "1"]
    assert check_data.main(arguments) == 0
    output = capsys.readouterr().out
    assert "1 x image with an EXIF orientation, used as stored: look whether its boxes fit (good.png)" in output
    assert "1 x image whose file ends too early, used as far as it goes (palette.png: its last bytes are" in output


@pytest.mark.parametrize("page", ["images/good.png", "page.txt", "page"])
def test_the_page_overwrites_no_picture_of_the_data_set(tmp_path, dirty, capsys, page):
    images, annotations = dirty
    before = (images / "good.png").read_bytes()
    arguments = ["--images", str(images), "--annotations", str(annotations), "--processes", "1"]
    assert check_data.main([*arguments, "--page", str(tmp_path / page)]) == 2
    assert "--page" in capsys.readouterr().err
    assert (images / "good.png").read_bytes() == before


def test_check_converter_and_training_say_the_same(tmp_path, capsys):
    """A file that training would refuse, and one that it reports on."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    boxes = ([0.2, 0.2, 0.3, 0.3], [5, 5, 30, 30])
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": [{"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)],
        "categories": [{"id": 1, "name": None}],
    }
    path = tmp_path / "a.json"
    arguments = ["--images", str(tmp_path), "--annotations", str(path), "--no-decode"]
    path.write_text(json.dumps(content))
    assert check_data.main(arguments) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()[4:]]
    assert lines == CocoConfig(images=str(tmp_path), annotations=str(path)).build(split="train").report.lines()
    assert len(lines) == 2
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    assert check_data.main(arguments) == 2
    with pytest.raises(ValueError, match="fractions") as error:
        CocoConfig(images=str(tmp_path), annotations=str(path)).build(split="train")
    assert capsys.readouterr().err == f"error: {error.value}\n"


def test_one_source_is_needed(capsys):
    for arguments in ([], ["--images", "x"], ["--cfg", "a", "--images", "b", "--annotations", "c"]):
        with pytest.raises(SystemExit) as error:
            check_data.main(arguments)
        assert error.value.code == 2
