"""Whatever label files hold: one line or success, and no input is changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzzing, mutated
from PIL import Image

from tools.convert_annotations import main

XML = """<?xml version="1.0" encoding="{}"?>
<annotation><filename>a.png</filename><size><width>64</width><height>48</height><depth>3</depth></size>
<object><name>cät</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20.5</ymax></bndbox></object>
<object><name>dog</name><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>60</xmax><ymax>40</ymax></bndbox></object></annotation>"""
VOC = tuple(XML.format(encoding).encode(encoding) for encoding in ("utf-8", "latin-1", "utf-16"))
YOLO = (
    b"0 .5 .5 .2 .2\n1 .25 .5 .1 .9\n",
    b"0 .1 .1 .3 .1 .3 .4 .1 .4\n1 .5 .5 .6 .6 .7 .5\n",
    b"0 .5 .5 .2 .2 .45 .45 2 .55 .45 1\n",
    b"",
)
NAMES = (
    b"names: [cat, dog]\n",
    b"path: ../x\nnames:\n  0: cat\n  1: yes\nkpt_shape: [2, 3]\n",
    b"base: &x {a: 1}\nnames: ['0', &y 007]\nnc: 2\n<<: *x\n",
)
LISTS = (b"a\n", b"a.png\na\n", b"images/a.jpg -1\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    Image.new("RGB", (64, 48)).save(root / "images" / "a.png")
    return root


def inputs(root: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name != "out.json":
            yield path, path.read_bytes()


def check(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    out = root / "out.json"
    out.unlink(missing_ok=True)
    before = dict(inputs(root))
    code = main([*arguments, "--out", str(out)])
    printed = capsys.readouterr()
    assert dict(inputs(root)) == before
    assert (code, printed.err.count("\n"), out.exists()) in ((0, 0, True), (2, 1, False)), printed.err
    if code:
        assert str(root) in printed.err, "the file is named"
    else:
        json.loads(out.read_text(encoding="utf-8"), parse_constant=pytest.fail)


@fuzzing(200)
@given(mutated(VOC), st.none() | mutated(LISTS), st.booleans(), st.sampled_from(("keep", "crowd", "drop")))
def test_voc(
    root: Path, capsys: pytest.CaptureFixture[str], data: bytes, split: bytes | None, look_up: bool, difficult: str
) -> None:
    (root / "labels" / "a.txt").unlink(missing_ok=True)
    (root / "labels" / "a.xml").write_bytes(data)
    (root / "split.txt").write_bytes(split or b"")
    arguments = ["voc", str(root / "labels"), "--difficult", difficult]
    arguments += ["--split", str(root / "split.txt")] if split is not None else []
    check(root, capsys, *arguments, *(["--images", str(root / "images")] if look_up else []))


@fuzzing(200)
@given(mutated(YOLO), mutated(NAMES), st.booleans(), st.booleans())
def test_yolo(
    root: Path, capsys: pytest.CaptureFixture[str], data: bytes, names: bytes, is_yaml: bool, polygons: bool
) -> None:
    (root / "labels" / "a.xml").unlink(missing_ok=True)
    (root / "labels" / "a.txt").write_bytes(data)
    classes = root / ("data.yaml" if is_yaml else "classes.txt")
    classes.write_bytes(names)
    arguments = ["yolo", str(root / "labels"), "--images", str(root / "images"), "--classes", str(classes)]
    check(root, capsys, *arguments, *(["--polygons"] if polygons else []))
