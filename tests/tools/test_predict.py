"""Prediction on files and from Python finds what evaluation finds, whatever kind and batch the images come in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import CocoConfig
from datasets.coco import SampleKey
from datasets.collate import make_batch
from engine.pictures import COLOURS
from structures import Detections
from tools import detection_files, predict
from tools.predictor import Predictor, to_pixels


@pytest.fixture(scope="module")
def detector(tiny_checkpoint: Path) -> Predictor:
    return Predictor(tiny_checkpoint, device="cpu", batch_size=2)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """[height, width, 3] uint8 of coarse blotches."""
    blotches = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blotches).resize((width, height), Image.Resampling.NEAREST))


def assert_same(left: Detections, right: Detections) -> None:
    assert left.labels.tolist() == right.labels.tolist()
    torch.testing.assert_close(left.scores, right.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(left.boxes_xyxy, right.boxes_xyxy, atol=1e-2, rtol=0)


def test_every_kind_of_image_gives_the_same(detector: Predictor, tmp_path: Path) -> None:
    array = pixels(70, 90)
    file = tmp_path / "a.png"
    Image.fromarray(array).save(file)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [array, file, str(file), Image.fromarray(array), tensor, tensor.float() / 255, tensor.double() / 255]
    first, *others = detector(kinds)
    assert len(first.scores) == 30
    assert bool((first.scores.diff() <= 0).all())
    assert float(first.boxes_xyxy[:, 2].max()) <= 90
    for other in others:
        assert_same(first, other)


def test_batches_and_order_change_nothing(detector: Predictor) -> None:
    images = [pixels(70, 90, 1), pixels(90, 70, 2), pixels(70, 90, 3), pixels(35, 45, 4), pixels(70, 90, 5)]
    together = detector(images)
    for image, found in zip(images, together, strict=True):
        assert_same(found, detector([image])[0])
    assert detector([]) == []


def test_threshold_cuts_the_end(detector: Predictor) -> None:
    image = pixels(70, 90)
    everything = detector([image])[0]
    threshold = float(everything.scores[4])
    cut = detector([image], threshold)[0]
    assert len(cut.scores) == 5
    assert_same(cut, Detections(*(part[:5] for part in everything)))


def test_the_same_as_in_evaluation(detector: Predictor, tmp_path: Path) -> None:
    Image.fromarray(pixels(70, 90)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 90, "height": 70}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}],
        "categories": [{"id": category.id, "name": category.name} for category in detector.categories],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    data = detector.config.data
    split = CocoConfig(
        images=str(tmp_path), annotations=str(tmp_path / "val.json"), transforms=data.val.transforms
    ).build(split="val", categories=detector.categories)
    sample = split[SampleKey(0, 0)].sample
    assert sample is not None
    batch = make_batch([sample], *data.pixel_statistics)
    with torch.inference_mode():
        expected = detector.model.postprocess(detector.model(batch.images), batch.original_sizes)[0]
    assert_same(detector([tmp_path / "a.png"])[0], expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 4), np.uint8), "an array must be"),
        (np.zeros((4, 5, 3), np.float32), r"an array must be .* got \[4, 5, 3\] float32"),
        (torch.zeros(4, 5, 3), r"a tensor must be \[3, H, W\], got \[4, 5, 3\]"),
        (torch.full((3, 4, 4), 255.0), "values in .0, 1., not normalised; got 255 to 255"),
        (torch.full((3, 4, 4), float("nan")), "not normalised"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "uint8 or floating-point"),
        (torch.zeros(3, 0, 4), "no pixels"),
    ],
)
def test_wrong_images_are_refused(image: np.ndarray | torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_pixels(image)


def test_grey_arrays_become_colour() -> None:
    assert to_pixels(np.full((2, 3), 7, np.uint8)).shape == (3, 2, 3)


def test_boxes_are_drawn_where_they_are() -> None:
    found = Detections(
        torch.tensor([0.9, 0.5]), torch.tensor([1, 0]), torch.tensor([[20.0, 40, 80, 90], [0, 0, 99, 30]])
    )
    picture = detection_files.draw(torch.zeros(3, 100, 120, dtype=torch.uint8), found, ["ant", "bee"])
    assert picture.size == (120, 100)
    drawn = np.asarray(picture)
    colours = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in COLOURS[:2]]
    assert tuple(drawn[90, 50]) == colours[1]
    assert tuple(drawn[70, 20]) == colours[1]
    assert tuple(drawn[0, 110 - 15]) == colours[0]
    assert tuple(drawn[70, 50]) == (0, 0, 0)


def folder(root: Path) -> Path:
    """Three readable images, one of them below, and two files that are none."""
    (root / "sub").mkdir(parents=True)
    Image.fromarray(pixels(70, 90, 1)).save(root / "a.png")
    Image.fromarray(pixels(70, 90, 2)).save(root / "b.jpg")
    Image.fromarray(pixels(50, 60, 3)).save(root / "sub" / "a.png")
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:60])
    (root / "text.jpg").write_text("not an image")
    (root / "notes.txt").write_text("no image by its name")
    return root


def test_the_command(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.inference.computes_bf16", lambda: False)  # of which it would speak
    images, out = folder(tmp_path / "images"), tmp_path / "out"
    extra = tmp_path / "a.png"
    Image.fromarray(pixels(40, 40, 4)).save(extra)
    arguments = [str(images), str(extra), "--resume", str(tiny_checkpoint), "--out", str(out), "--threshold", "0.05"]
    assert predict.main([*arguments, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "a.png",
        "a_2.png",
        "b.jpg",
        "detections.json",
        "sub/a.png",
    ]
    others, *skipped = captured.err.splitlines()
    assert others == f"{images}: 1 files left out that are no pictures by their endings"
    assert [line.split(":")[0] for line in skipped] == [
        f"skipped {images / 'broken.png'}",
        f"skipped {images / 'text.jpg'}",
    ]
    results = json.loads((out / "detections.json").read_text())
    assert {entry["file_name"] for entry in results} == {"a.png", "b.jpg", "sub/a.png"}
    assert {entry["image_id"] for entry in results} == {1, 2, 4, 6}
    assert {entry["category_id"] for entry in results} <= {1, 4, 9}
    assert min(entry["score"] for entry in results) >= 0.05
    expected = Predictor(tiny_checkpoint, device="cpu")([images / "b.jpg"], 0.05)[0]
    own = [entry for entry in results if entry["image_id"] == 2]
    assert [entry["score"] for entry in own] == pytest.approx(expected.scores.tolist(), abs=2e-5)
    x0, y0, x1, y1 = expected.boxes_xyxy[0].tolist()
    assert own[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.02)
    assert f"{len(results)} detections of score 0.05 or more in 4 images, 2 files skipped" in captured.out


def test_photographs_are_never_overwritten(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photographs = {}
    for name in ("y.jpg", "images/y.jpg", "other/y.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(40, 40, len(name))).save(name)
        photographs[name] = Path(name).read_bytes()
    Path("linked").mkdir()
    Path("linked/y.jpg").symlink_to(tmp_path / "other" / "y.jpg")

    def call(*arguments: str) -> int:
        code = predict.main([*arguments, "--resume", str(tiny_checkpoint), "--device", "cpu", "--threshold", "0"])
        assert {name: Path(name).read_bytes() for name in photographs} == photographs
        return code

    for images, out in (("y.jpg", "."), ("images", "images"), ("images/y.jpg", "images"), ("linked/y.jpg", "other")):
        assert call(images, "--out", out) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert "choose another one with --out" in error
    # A picture that stands in the folder without a word of an earlier call keeps its name, a link its end.
    assert call("images", "--out", "other") == 0
    assert Path("other/y_2.jpg").exists()
    Path("linked/detections.json").touch()
    assert call("y.jpg", "--out", "linked") == 0
    assert not Path("linked/y.jpg").is_symlink()


def test_a_second_call_does_not_look_at_what_the_first_one_wrote(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder(tmp_path / "images"))
    for path in Path().rglob("*.txt"):
        path.unlink()
    found = []
    for _ in range(2):
        assert predict.main([".", "--resume", str(tiny_checkpoint), "--device", "cpu", "--threshold", "0"]) == 0
        found.append({entry["file_name"] for entry in json.loads(Path("predictions/detections.json").read_text())})
        written = {str(path) for path in Path("predictions").rglob("*.*")}
    assert "left out" not in capsys.readouterr().err
    assert found[0] == found[1] == {"a.png", "b.jpg", "sub/a.png"}
    assert written == {f"predictions/{name}" for name in ("a.png", "b.jpg", "sub/a.png", "detections.json")}


def test_image_ids_of_an_annotation_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    Image.fromarray(pixels(40, 40)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 77, "file_name": "a.png"}],
        "annotations": [],
        "categories": [{"id": 1, "name": "ant"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    arguments = [str(tmp_path / "a.png"), "--resume", str(tiny_checkpoint), "--annotations", str(tmp_path / "c.json")]
    out = tmp_path / "out"
    assert predict.main([*arguments, "--threshold", "0", "--no-pictures", "--out", str(out)]) == 0
    results = json.loads((out / "detections.json").read_text())
    assert {entry["image_id"] for entry in results} == {77}
    assert len(results) == 30
    assert [path.name for path in out.iterdir()] == ["detections.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg"], "missing.jpg: no such file or folder"),
        (["empty"], "no image in empty"),
        (["text.jpg"], "none of the 1 files can be read as an image"),
        (["text.jpg", "--threshold", "2"], "--threshold must lie in [0, 1]"),
        (["text.jpg", "--video", "0"], "--video must lie in (0, 1000] frames a second, got 0.0"),
        (["text.jpg", "--resume", "text.jpg"], "text.jpg: cannot be read as a checkpoint"),
        (["text.jpg", "--set", "model.num_querys=3"], "unknown key 'num_querys', did you mean 'num_queries'?"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.jpg").write_text("not an image")
    assert predict.main(["--resume", str(tiny_checkpoint), *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
