"""VOC and YOLO annotations become COCO files, and the real VOC labels the COCO files beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datasets import CocoConfig
from tools.convert_annotations import main, read_class_names, read_yolo, to_coco

BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd"


def convert(out: Path, *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--out", str(out)]) == 0
    content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return content


@pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD data set is not here")
@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("look_up", [False, True])
def test_bccd_voc_gives_the_coco_files_beside_it(split: str, look_up: bool, tmp_path: Path) -> None:
    expected = json.loads((BCCD / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
    images = ["--images", BCCD / "images"] if look_up else []
    names = BCCD / "voc_splits" / f"{split}.txt"
    found = convert(tmp_path / "c.json", "voc", BCCD / "voc_annotations", "--split", names, *images)
    assert found["images"] == expected["images"]
    assert found["annotations"] == expected["annotations"]
    assert [(c["id"], c["name"]) for c in found["categories"]] == [(c["id"], c["name"]) for c in expected["categories"]]


VOC = """<annotation><filename>{name}</filename><size><width>{width}</width><height>50</height></size>
<object><name>cat</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>100</xmax><ymax>20</ymax></bndbox></object>
<object><name>ant</name><bndbox><xmin>5.5</xmin><ymin>6</ymin><xmax>8</xmax><ymax>9</ymax></bndbox></object></annotation>"""


def write_voc(directory: Path, text: str = VOC, name: str = "a.jpg", width: str = "100") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "a.xml").write_text(text.format(name=name, width=width), encoding="utf-8")
    return directory


def test_voc_pixel_numbers_and_difficult_objects(tmp_path: Path) -> None:
    labels = write_voc(tmp_path / "xml")
    content = convert(tmp_path / "c.json", "voc", labels, "--first-pixel", 1)
    assert [c["name"] for c in content["categories"]] == ["ant", "cat"]
    cat, ant = content["annotations"]
    # Pixels 1 to 100 and 11 to 20 of VOC are the whole width and ten rows.
    assert (cat["bbox"], cat["area"], cat["iscrowd"], cat["category_id"]) == ([0, 10, 100, 10], 1000, 1, 2)
    assert (ant["bbox"], ant["iscrowd"]) == ([4.5, 5, 3.5, 4], 0)
    content = convert(tmp_path / "c.json", "voc", labels, "--difficult", "drop")
    assert [a["bbox"] for a in content["annotations"]] == [[5.5, 6, 2.5, 3]]
    content = convert(tmp_path / "c.json", "voc", labels, "--difficult", "keep")
    assert [a["iscrowd"] for a in content["annotations"]] == [0, 0]


def test_voc_looks_up_images_of_stale_names(tmp_path: Path) -> None:
    labels = write_voc(tmp_path / "xml", name="C:/elsewhere/IMG_7.jpg", width="0")
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (120, 60)).save(images / "a.png")
    content = convert(tmp_path / "c.json", "voc", labels, "--images", images)
    assert content["images"] == [{"id": 1, "file_name": "a.png", "width": 120, "height": 60}]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("<annotation>", (), "a.xml: not valid XML"),
        (VOC.replace("<xmax>8", "<xmax>eight"), (), "a.xml: bndbox/xmax is 'eight', not a number"),
        (VOC.replace("<bndbox><xmin>5.5</xmin>", "<bndbox>"), (), "a.xml: bndbox/xmin is missing"),
        (VOC.replace("<name>ant</name>", ""), (), "a.xml: an object has no name"),
        (VOC.replace("{width}", "0"), (), "give the images' folder with --images"),
        (VOC, ("--split", "split.txt"), "b.xml: no such file, though"),
        (VOC, ("--classes", "names.txt"), "objects of class 'ant', but the classes are cat"),
        (VOC, ("--images", "."), "neither a.jpg nor another image named a is in"),
    ],
)
def test_voc_errors_are_one_line_that_names_the_file(
    text: str,
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("split.txt").write_text("a  1\nb -1\n")
    Path("names.txt").write_text("cat\n")
    labels = write_voc(tmp_path / "xml", text)
    assert main(["voc", str(labels), *arguments, "--out", "c.json"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("c.json").exists()


def yolo_folders(root: Path, lines: str) -> tuple[Path, Path]:
    labels, images = root / "labels", root / "images"
    (labels / "day").mkdir(parents=True)
    (images / "day").mkdir(parents=True)
    Image.new("RGB", (200, 100)).save(images / "day" / "a.jpg")
    Image.new("RGB", (40, 30)).save(images / "empty.png")
    (labels / "day" / "a.txt").write_text(lines)
    return labels, images


def test_yolo_boxes_and_polygons(tmp_path: Path) -> None:
    labels, images = yolo_folders(tmp_path, "1 0.5 0.5 0.5 0.2\n\n0 0.1 0.1 0.3 0.1 0.2 0.4\n")
    (labels / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "data.yaml").write_text("names: {0: cat, 1: dog, 2: eel}\n")
    classes = tmp_path / "data.yaml"
    content = convert(tmp_path / "c.json", "yolo", labels, "--images", images, "--classes", classes)
    assert [i["file_name"] for i in content["images"]] == ["day/a.jpg", "empty.png"]
    assert [c["name"] for c in content["categories"]] == ["cat", "dog", "eel"]
    dog, cat = content["annotations"]
    assert (dog["category_id"], dog["bbox"]) == (2, [50, 40, 100, 20])
    assert (cat["category_id"], cat["bbox"]) == (1, [20, 10, 40, 30])
    # The result is what our own data sets read.
    dataset = CocoConfig(images=str(images), annotations=str(tmp_path / "c.json")).build(split="train")
    assert len(dataset) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("3 0.5 0.5 0.1 0.1", "a.txt, line 1: class 3, but there are 2 names"),
        ("0 0.5 0.5 0.1", "expected a class and 4 numbers or a polygon, found 3 numbers"),
        ("0 100 50 20 10", "must be relative to the image's size, found 100"),
        ("cat 0.5 0.5 0.1 0.1", "expected a class and numbers"),
    ],
)
def test_yolo_errors(lines: str, message: str, tmp_path: Path) -> None:
    labels, images = yolo_folders(tmp_path, lines)
    with pytest.raises(ValueError, match=message):
        list(read_yolo(labels, images, ["cat", "dog"]))


def test_yolo_labels_without_an_image_are_an_error(tmp_path: Path) -> None:
    labels, images = yolo_folders(tmp_path, "")
    (labels / "stray.txt").write_text("")
    with pytest.raises(ValueError, match=r"stray\.txt: there is no image"):
        list(read_yolo(labels, images, ["cat"]))


@pytest.mark.parametrize("text", ["names: []", "nc: 3", "names: {1: a, 2: b}", "[a"])
def test_class_files_without_names(text: str, tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"data\.yaml"):
        read_class_names(path)


def test_round_trip_of_no_objects() -> None:
    assert to_coco([], ["a"])["categories"] == [{"id": 1, "name": "a"}]
