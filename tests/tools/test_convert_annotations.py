"""VOC and YOLO annotations become COCO files, and the real VOC labels the COCO files beside them."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from datasets import CocoConfig
from tools.convert_annotations import main, to_coco
from tools.label_formats.class_names import read_class_names
from tools.label_formats.yolo import read_yolo

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
        (VOC.replace("{width}", "inf"), (), "give the images' folder with --images"),
        (VOC.replace("{name}", "a.xml"), (), "its <filename> is 'a.xml', which is no picture's"),
        (VOC.replace("<difficult>1", "<difficult>maybe"), (), "<difficult> is 'maybe', neither 0 nor 1"),
        (VOC.replace("<xmax>8", "<xmax>nan"), (), "bndbox/xmax is 'nan', not a number"),
        (
            "<?xml version='1.0' encoding='martian'?>" + VOC,
            (),
            "a.xml: not valid XML in UTF-8 or the encoding that it states (unknown encoding: martian)",
        ),
        (VOC, ("--out", "a.xml"), "--out a.xml: must end in .json"),
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
    assert main(["voc", str(labels), "--out", "c.json", *arguments]) == 2
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


NAMES = "cat\ndog\n"


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """A folder with images, labels and names."""
    (tmp_path / "names.txt").write_text(NAMES)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "images" / "a.png")
    return tmp_path


def yolo_result(root: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    out = root / "out.json"
    options = ["--images", root / "images", "--classes", root / "names.txt", "--out", out, *arguments]
    code = main(["yolo", str(root / "labels"), *map(str, options)])
    return code, json.loads(out.read_text()) if out.exists() else {}


@pytest.mark.parametrize("points", ["", " .45 .45 2 .55 .45 2 .55 .55 1 0 0 0", " .45 .45 .55 .55"])
def test_keypoints_behind_a_box_are_no_polygon(yolo: Path, points: str, capsys: pytest.CaptureFixture[str]) -> None:
    (yolo / "labels" / "a.txt").write_text(f"0 .5 .5 .2 .2{points}\n" * 2)
    code, content = yolo_result(yolo)
    if points:
        assert code == 2
        assert "a.txt, line 1: this line" in (error := capsys.readouterr().err)
        assert "kpt_shape" in error
        assert "--polygons" in error
        shape = [4, 3] if len(points.split()) == 12 else [2, 2]
        (yolo / "names.yaml").write_text(f"kpt_shape: {shape}\nnames: [cat, dog]\n")
        code, content = yolo_result(yolo, "--classes", yolo / "names.yaml")
    assert code == 0
    assert content["annotations"][0]["bbox"] == [40, 32, 20, 16]


def test_polygons_of_one_length_may_be_said_to_be_some(yolo: Path) -> None:
    (yolo / "labels" / "a.txt").write_text("0 .5 .5 .4 .4 .4 .6\n")
    assert yolo_result(yolo)[0] == 2
    assert yolo_result(yolo, "--polygons")[1]["annotations"][0]["bbox"] == [40, 32, 10, 16]
    (yolo / "labels" / "a.txt").write_text("0 .1 .1 .3 .1 .3 .4 .1 .4\n")  # a rectangle is no pose
    assert yolo_result(yolo)[1]["annotations"][0]["bbox"] == [10, 8, 20, 24]


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_of_a_turned_photograph_reach_the_right_pixels(yolo: Path, orientation: int, square: bool) -> None:
    """The truth: a bright rectangle, labelled where Pillow shows it upright."""
    pixels = np.zeros((80, 80 if square else 120, 3), np.uint8)
    pixels[10:30, 16:72] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = yolo / "images" / "a.png"
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as picture:
        upright = np.asarray(ImageOps.exif_transpose(picture))[..., 0] > 0
    (top, *_, bottom), (left, *_, right) = (np.flatnonzero(upright.any(axis=axis)) for axis in (1, 0))
    height, width = upright.shape
    box = (left + right + 1) / 2 / width, (top + bottom + 1) / 2 / height
    (yolo / "labels" / "a.txt").write_text(
        f"0 {box[0]} {box[1]} {(right + 1 - left) / width} {(bottom + 1 - top) / height}\n"
    )
    assert yolo_result(yolo)[0] == 0
    sample = CocoConfig(images=str(yolo / "images"), annotations=str(yolo / "out.json")).build(split="train").load(0)
    x0, y0, x1, y1 = sample[1][0].round().int().tolist()
    assert sample[0][:, y0:y1, x0:x1].min() == 255
    assert int(sample[0].sum()) == 255 * 3 * (x1 - x0) * (y1 - y0)


def test_class_names_are_taken_word_by_word(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    words = ["yes", "no", "on", "off", "007", "1e3", "null", "12:30", "~", "2025-11-25"]
    path.write_text(f"nc: 10\nnames: [{', '.join(words)}]\n")
    assert read_class_names(path).names == words
    path.write_text("names:\n" + "".join(f"  '{index}': {word}\n" for index, word in enumerate(words)))
    assert read_class_names(path).names == words
    text = tmp_path / "classes.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        text.write_text("RBC\nGröße\n\n", encoding=encoding)
        assert read_class_names(text).names == ["RBC", "Größe"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.yaml", b"names: [caf\xe9]", "not text in UTF-8 (byte 0xe9 at place 11); save it as UTF-8"),
        ("a.yaml", b"names: [a, b, a]", "classes 0 and 2 are both named 'a'"),
        ("a.yaml", b"names: {0: a, 0: b}", "has no 'names'"),
        ("a.yaml", b"names: [a, '']", "class 1 has an empty name"),
        ("a.yaml", b"names: [a, [b]]", "has no 'names'"),
        ("a.yaml", b"names: [a]\nkpt_shape: 17", "kpt_shape must be"),
        ("a.txt", b"a\n\nb\n", "class 1 has an empty name"),
        ("a.txt", b"a\na\n", "classes 0 and 1 are both named 'a'"),
        ("a.txt", b"\n", "has no names"),
    ],
)
def test_names_that_cannot_be_used_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_class_names(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


def test_stale_names_in_xml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = write_voc(tmp_path / "xml", name="old.jpg")
    (labels / "b.XML").write_text((labels / "a.xml").read_text())
    (labels / "._a.xml").write_bytes(b"\0of a Macintosh")
    out = tmp_path / "c.json"
    assert main(["voc", str(labels), "--out", str(out)]) == 2
    assert "a.xml and " in (error := capsys.readouterr().err)
    assert "both describe old.jpg" in error
    assert "--images" in error
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg", "old.jpg"):
        Image.new("RGB", (100, 50)).save(images / name)
    content = convert(out, "voc", labels, "--images", images)
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "sub/b.jpg"]
    assert "2 x XML file that names another picture" in capsys.readouterr().out
    Image.new("RGB", (100, 50)).save(images / "b.png")
    assert main(["voc", str(labels), "--images", str(images), "--out", str(out)]) == 2
    assert "could both be its picture" in capsys.readouterr().err


def test_split_lines_of_every_kind(tmp_path: Path) -> None:
    labels = write_voc(tmp_path / "xml")
    text = (labels / "a.xml").read_text()
    for name in ("b", "my photo 1"):
        (labels / f"{name}.xml").write_text(text.replace("a.jpg", f"{name}.jpg"))
    (tmp_path / "split.txt").write_text("JPEGImages/b.jpg\nmy photo 1.jpg\na  -1\n", encoding="utf-8-sig")
    content = convert(tmp_path / "c.json", "voc", labels, "--split", tmp_path / "split.txt")
    assert [image["file_name"] for image in content["images"]] == ["b.jpg", "my photo 1.jpg", "a.jpg"]


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "utf-8", "utf-8-sig", "utf-16", "shift_jis"])
def test_xml_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    name = {"gbk": "红细胞", "shift_jis": "猫"}.get(encoding, "Größe")
    labels = write_voc(tmp_path / "xml")
    text = f"<?xml version='1.0' encoding='{encoding.removesuffix('-sig')}'?>" + VOC.replace("ant", name, 2)
    (labels / "a.xml").write_bytes(
        text.format(name="a.jpg", width="100").replace(f"</{name}", "</ant").encode(encoding)
    )
    content = convert(tmp_path / "c.json", "voc", labels)
    assert name in [category["name"] for category in content["categories"]]


def test_the_size_in_xml_tells_whether_boxes_were_drawn_upright(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 100)).save(images / "a.jpg", exif=exif)
    for width, size, word in (("100", (100, 50), ""), ("60", (50, 100), "another size"), ("0", (50, 100), "EXIF")):
        labels = write_voc(tmp_path / "xml", width=width)
        (image,) = convert(tmp_path / "c.json", "voc", labels, "--images", images)["images"]
        assert (image["width"], image["height"]) == size
        assert word in capsys.readouterr().out


def test_two_pictures_of_one_label_file_are_refused(yolo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (10, 10)).save(yolo / "images" / "a.jpg")
    assert yolo_result(yolo)[0] == 2
    assert "a.jpg beside it would have the same labels" in capsys.readouterr().err


def test_other_texts_beside_the_labels_are_left_out(yolo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (yolo / "labels" / "train.txt").write_text("images/a.png\n")
    (yolo / "labels" / "a.txt").write_text("0 .5 .5 .2 .2\n", encoding="utf-8-sig")
    assert len(yolo_result(yolo)[1]["annotations"]) == 1
    assert "1 x text file that belongs to no image, left out (train.txt)" in capsys.readouterr().out


def test_the_converter_says_what_training_will_say(yolo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (yolo / "labels" / "a.txt").write_text("0 .5 .5 .2 0\n0 .9 .5 .6 .2\n1 .5 .5 .2 .2\n")
    assert yolo_result(yolo)[0] == 0
    printed = capsys.readouterr().out
    lines = (
        CocoConfig(images=str(yolo / "images"), annotations=str(yolo / "out.json")).build(split="train").report.lines()
    )
    assert len(lines) == 2
    assert [line.strip() for line in printed.splitlines()[1:]] == lines
    before = (yolo / "out.json").read_bytes()
    (yolo / "labels" / "a.txt").write_text("0 .005 .005 .005 .005\n")
    assert yolo_result(yolo)[0] == 2
    assert "seem to be fractions" in capsys.readouterr().err
    assert (yolo / "out.json").read_bytes() == before


def test_only_what_the_converter_wrote_is_replaced(yolo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert yolo_result(yolo)[0] == 0
    assert yolo_result(yolo)[0] == 0
    (yolo / "out.json").write_text('{"images": []}')
    assert yolo_result(yolo)[0] == 2
    assert "out.json: is there already; remove it" in capsys.readouterr().err
    assert (yolo / "out.json").read_text() == '{"images": []}'


def test_class_names_reach_a_terminal_that_lacks_their_letters(yolo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (yolo / "names.txt").write_text("Größe\n猫\n")
    monkeypatch.chdir(yolo)
    command = ["yolo", "labels", "--images", "images", "--classes", "names.txt", "--out", "größe.json"]
    for label, code in ((7, 2), (1, 0)):
        (yolo / "labels" / "a.txt").write_text(f"{label} .5 .5 .2 .2\n")
        printed = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
        with contextlib.redirect_stdout(printed[0]), contextlib.redirect_stderr(printed[1]):
            assert main(command) == code
        for stream in printed:
            stream.flush()
        stdout, stderr = (stream.buffer.getvalue().decode("ascii") for stream in printed)
        assert stderr.count("\n") == (code == 2)
        assert ("gr\\xf6\\xdfe.json" in stdout) == (code == 0)
