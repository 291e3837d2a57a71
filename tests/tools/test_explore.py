"""The command: a checkpoint and its run give the same page, and what a user can mend is one line."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import Category
from engine.evaluator import Evaluator, evaluate
from tests.tools.conftest import CATEGORIES
from tools import analyze, explore


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, of which one cannot be read, with some objects."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    (root / "images").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in CATEGORIES]}
    for i in range(4):
        pixels = rng.integers(255, size=(90, 130, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        content["images"].append({"id": 7 * i + 3, "file_name": f"{i}.png", "width": 130, "height": 90})
        for k in range(i):
            box = [10.0 + 20 * k, 8.0 * i, 30.0, 40.0]
            row = {"image_id": 7 * i + 3, "category_id": CATEGORIES[k][0], "bbox": box, "area": 1200.0, "iscrowd": 0}
            content["annotations"].append({"id": len(content["annotations"]) + 1, **row})
    (root / "images" / "2.png").write_bytes(b"nothing")
    (root / "val.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def made(data: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Path]:
    """A run directory with the detections of its checkpoint, the overrides that name the data, and the page of both."""
    overrides = [
        f"data.val.images={data / 'images'}",
        f"data.val.annotations={data / 'val.json'}",
        "trainer.device=cpu",
    ]
    overrides.append("data.num_workers=0")
    run = tmp_path_factory.mktemp("runs") / "mine"
    run.mkdir()
    shutil.copyfile(tiny_checkpoint, run / "checkpoint_last.pth")
    subject = analyze.load_subject(tiny_checkpoint, "tiny", overrides)
    evaluator = Evaluator(str(data / "val.json"), [Category(*c) for c in CATEGORIES])
    evaluate(subject.model, subject.cfg.data.build_val_loader(subject.dataset), evaluator, subject.device)
    evaluator.save(run / "detections.npz")
    page = tmp_path_factory.mktemp("page") / "explore"
    paths = [str(run), str(tiny_checkpoint)]
    assert explore.main([*paths, "--labels", "run", "file", "--out", str(page), "--set", *overrides]) == 0
    return run, overrides, page


def received(path: Path):
    """What a data file hands to the page."""
    text = path.read_text()
    start = f'Explorer.receive("{path.stem}", '
    assert text.startswith(start)
    return json.loads(text[len(start) :].removesuffix(");\n"))


def columns(path: Path) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(gzip.decompress(base64.b64decode(text)), kind.removesuffix("Array").lower())
        for name, (kind, text) in received(path).items()
    }


def test_a_run_and_its_checkpoint_give_the_same(made):
    _, _, page = made
    saved, own = columns(page / "data" / "detections0.js"), columns(page / "data" / "detections1.js")
    saved |= columns(page / "data" / "boxes0.js")
    own |= columns(page / "data" / "boxes1.js")
    assert saved["count"].tolist() == own["count"].tolist()
    assert len(own["score"]) > 20
    for name in own:
        # The file of the run holds boxes as corner and extent in fp32.
        np.testing.assert_allclose(saved[name].astype(float), own[name].astype(float), atol=2)
    about = received(page / "data" / "about.js")
    assert [detector["label"] for detector in about["detectors"]] == ["run", "file"]
    assert [detector["best"] for detector in about["detectors"]] == [False, True]
    assert about["detectors"][0]["classes"] == about["detectors"][1]["classes"]
    assert about["classes"] == [name for _, name in CATEGORIES]
    assert not (page / "data" / "best0.js").exists()
    best, objects = columns(page / "data" / "best1.js"), columns(page / "data" / "objects.js")
    assert objects["count"].tolist() == [0, 1, 2, 3]
    assert len(best["score"]) == 6
    assert best["score"][1:3].tolist() == [0, 0]  # the image that cannot be read


def test_pictures_are_small_and_what_cannot_be_read_is_said(made):
    _, _, page = made
    about = received(page / "data" / "about.js")
    assert [image["name"] for image in about["images"]] == ["0.png", "1.png", "2.png", "3.png"]
    assert [image["readable"] for image in about["images"]] == [True, True, False, True]
    assert [image["size"] for image in about["images"]] == [[90, 130]] * 4
    assert sorted(path.name for path in (page / "pictures").iterdir()) == ["000000.jpg", "000001.jpg", "000003.jpg"]


def test_the_page_names_every_script_and_nothing_from_elsewhere(made):
    _, _, page = made
    text = (page / "index.html").read_text()
    assert "http" not in text
    for script in (page / "page").glob("*.js"):
        assert f'<script src="page/{script.name}"></script>' in text
        assert script.read_text().startswith("'use strict';\n")
        assert script.read_text().count("\n") <= 300


def test_mistakes_are_one_line(made, tmp_path, capsys):
    run, overrides, page = made
    (tmp_path / "empty").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    (tmp_path / "damaged").mkdir()
    shutil.copyfile(run / "checkpoint_last.pth", tmp_path / "damaged" / "checkpoint_last.pth")
    (tmp_path / "damaged" / "detections.npz").write_bytes(b"no archive")
    out = str(tmp_path / "out")
    settings = ["--set", *overrides]
    cases = [
        ([str(tmp_path / "empty"), "--out", out], "this directory holds no checkpoint"),
        ([str(tmp_path / "gone"), "--out", out], "there is no such checkpoint"),
        ([str(run), "--out", str(tmp_path / "else"), *settings], "holds something else than such a page"),
        ([str(run), "--out", str(tmp_path / "else" / "notes.txt"), *settings], "is no directory"),
        ([str(run), "--side", "3", "--out", out, *settings], "--side must be at least 64 pixels, got 3"),
        ([str(run), "--labels", "a", "b", "--out", out, *settings], "2 labels for 1 checkpoints"),
        ([str(tmp_path / "damaged"), "--out", out, *settings], "cannot be read as detections"),
        ([str(run), "--out", out], "no annotation file"),
    ]
    for arguments, words in cases:
        assert explore.main(arguments) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
    assert not Path(out).exists()
    assert explore.main([str(run), "--out", str(page), *settings]) == 0  # an earlier page may be written again
