"""Tiles, mirrored and scaled looks, videos, and the other formats of results."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import box_iou

from structures import Detections
from tools import detection_files, predict, video
from tools.predictor import Predictor
from tools.views import Views, tiles

VIDEO = importlib.util.find_spec("av") is not None


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(16, 300), st.floats(0, 0.85))
def test_tiles_cover_the_image_and_overlap_as_asked(height: int, width: int, tile: int, overlap: float) -> None:
    windows = tiles((height, width), tile, overlap)
    if max(height, width) <= tile:
        assert windows == []
        return
    seen = np.zeros((height, width), dtype=bool)
    for top, left, h, w in windows:
        assert (h, w) == (min(tile, height), min(tile, width))
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        seen[top : top + h, left : left + w] = True
    assert seen.all()
    for starts in ({top for top, *_ in windows}, {left for _, left, *_ in windows}):
        gaps = np.diff(sorted(starts))
        assert (gaps <= tile * (1 - overlap) + 1).all()


class Squares:
    """Finds white squares of 10 pixels, as far as they are to be seen, in whatever it is shown."""

    class config:  # noqa: N801 - stands for a configuration
        class model:  # noqa: N801
            detections_per_image = 100

    def __init__(self) -> None:
        self.shown: list[tuple[tuple[int, ...], float]] = []

    def __call__(self, images: list[torch.Tensor], threshold: float, scale: float = 1.0) -> list[Detections]:
        found = []
        for image in images:
            self.shown.append((tuple(image.shape[1:]), scale))
            boxes = []
            for value in sorted(set(image[0].flatten().tolist()) - {0}):  # each square has a brightness of its own
                rows, columns = (image[0] == value).nonzero(as_tuple=True)
                ends = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                boxes.append([float(end) for end in ends])
            kept = torch.tensor(boxes).reshape(-1, 4)
            sizes = (kept[:, 2:] - kept[:, :2]).prod(dim=1)
            found.append(Detections(sizes / 100.0, torch.zeros(len(kept), dtype=torch.int64), kept))
        return found


def squares(height: int, width: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng, boxes = np.random.default_rng(seed), []
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for number in range(count):
        for _ in range(100):
            top, left = int(rng.integers(0, height - 10)), int(rng.integers(0, width - 10))
            if not image[:, top : top + 10, left : left + 10].any():
                image[:, top : top + 10, left : left + 10] = 100 + number
                boxes.append([left, top, left + 10, top + 10])
                break
    return image, torch.tensor(boxes, dtype=torch.float32)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.sampled_from([None, 40, 64]))
def test_every_object_is_found_once_where_it_is(seed: int, flip: bool, tile: int | None) -> None:
    image, boxes = squares(90, 130, 8, seed)
    views = Views(tile=tile, overlap=0.3, flip=flip, scales=(1.0, 1.5))
    (found,) = views(Squares(), [image], 0.0)
    assert len(found.scores) == len(boxes)
    assert box_iou(found.boxes_xyxy, boxes).amax(dim=0).tolist() == [1.0] * len(boxes)
    assert (found.scores == 1.0).all(), "halves at the border of a tile are left out"


def test_looks_are_those_asked_for_and_one_alone_is_left_as_it_is() -> None:
    image, _ = squares(60, 100, 2, 0)
    detector = Squares()
    Views(tile=60, overlap=0.5, flip=True, scales=(1.0, 2.0))(detector, [image], 0.0)
    windows = [(60, 100), *[(60, 60)] * len(tiles((60, 100), 60, 0.5))]
    assert detector.shown == [(window, scale) for scale in (1.0, 2.0) for _ in range(2) for window in windows]
    double = Detections(torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64), torch.tensor([[0.0, 0, 9, 9]] * 2))
    (found,) = Views()(lambda images, threshold: [double], [image], 0.0)
    assert found is double


@pytest.mark.parametrize(
    "settings_", [{"tile": 8}, {"overlap": 0.95}, {"scales": ()}, {"scales": (1.0, -1.0)}, {"merge_iou": 0.0}]
)
def test_impossible_views_are_refused(settings_: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"tiles need|scales must be"):
        Views(**settings_)  # type: ignore[arg-type]


def test_a_scale_is_a_factor_on_the_size_of_evaluation(tiny_checkpoint: Path) -> None:
    detector = Predictor(tiny_checkpoint, device="cpu")
    seen = []
    detector.model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].pixels.shape[2:])))
    picture = np.zeros((70, 90, 3), dtype=np.uint8)
    for scale in (1.0, 1.5):
        assert float(detector([picture], 0.0, scale)[0].boxes_xyxy.max()) <= 90
    assert seen == [(64, 82), (96, 123)]


def test_csv_and_yolo_say_what_the_json_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name, size in (("a.png", (90, 70)), ("b.jpg", (64, 64))):
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(
            tmp_path / name
        )
    out = tmp_path / "out"
    (out / "labels").mkdir(parents=True)
    (out / "labels/b.txt").write_text("of somebody else")
    arguments = ["--resume", str(tiny_checkpoint), "--out", str(out), "--threshold", "0.2", "--also", "csv", "yolo"]
    assert predict.main([*arguments, "--tile", "48", "--flip", str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]) == 0
    results = json.loads((out / "detections.json").read_text())
    rows = list(csv.DictReader((out / "detections.csv").open()))
    assert len(rows) == len(results) > 0
    names = {1: "ant", 4: "bee", 9: "cat"}
    for row, entry in zip(rows, results, strict=True):
        assert (row["file_name"], row["class"]) == (entry["file_name"], names[entry["category_id"]])
        assert [float(row[key]) for key in ("x", "y", "width", "height")] == entry["bbox"]
    assert (out / "labels/b.txt").read_text() == "of somebody else"
    lines = (out / "labels/a.txt").read_text().splitlines() + (out / "labels/b_2.txt").read_text().splitlines()
    for line, entry in zip(lines, results, strict=True):
        label, *box, score = map(float, line.split())
        width, height = (90, 70) if entry["file_name"] == "a.png" else (64, 64)
        x, y, w, h = entry["bbox"]
        assert [1, 4, 9][int(label)] == entry["category_id"]
        expected = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height, entry["score"]]
        assert [*box, score] == pytest.approx(expected, abs=1e-5)


def write(path: Path, frames: int, size: tuple[int, int] = (64, 80)) -> None:
    with video.write_video(path, 10) as writer:
        for number in range(frames):
            picture = Image.new("RGB", size[::-1], (40 * number, 60, 200))
            writer.add(picture)


@pytest.mark.skipif(not VIDEO, reason="PyAV is not installed")
def test_a_video_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", 5, (65, 81))
    with video.open_video(tmp_path / "a.mp4") as opened:
        frames = list(opened)
        assert (float(opened.rate), opened.length) == (10.0, 5)
    assert [tuple(frame.shape) for frame in frames] == [(3, 64, 80)] * 5
    for number, frame in enumerate(frames):
        mean = frame.float().mean(dim=(1, 2))
        assert mean.tolist() == pytest.approx([40 * number, 60, 200], abs=6)


@pytest.mark.skipif(not VIDEO, reason="PyAV is not installed")
def test_every_frame_of_a_video_is_predicted_and_drawn(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "clip.mp4", 5)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    before = (tmp_path / "clip.mp4").read_bytes()
    out = tmp_path / "out"
    paths = [str(tmp_path / name) for name in ("clip.mp4", "a.png", "broken.mp4")]
    arguments = ["--resume", str(tiny_checkpoint), "--threshold", "0.0", "--batch-size", "2"]
    assert predict.main([*arguments, "--out", str(out), "--also", "yolo", "--", *paths]) == 0
    printed = capsys.readouterr()
    assert "in 6 images, 1 files skipped" in printed.out
    assert "skipped" in printed.err
    assert "broken.mp4: " in printed.err
    assert (tmp_path / "clip.mp4").read_bytes() == before
    results = json.loads((out / "detections.json").read_text())
    frames = [entry for entry in results if entry["file_name"] == "clip.mp4"]
    assert {(entry["image_id"], entry["frame"]) for entry in frames} == {(2 + i, i) for i in range(5)}
    detector = Predictor(tiny_checkpoint, device="cpu")
    with video.open_video(tmp_path / "clip.mp4") as opened:
        third = list(opened)[3]
    expected = detection_files.coco_results(detector([third])[0], 5, "clip.mp4", [1, 4, 9])
    found = [entry for entry in frames if entry["frame"] == 3]
    for key in ("bbox", "score", "category_id"):
        values, others = (np.array([entry[key] for entry in entries]) for entries in (expected, found))
        np.testing.assert_allclose(values, others, atol=0.02)
    with video.open_video(out / "clip.mp4") as opened:
        drawn = list(opened)
    assert len(drawn) == 5
    assert float((drawn[3].float() - third.float()).abs().mean()) > 1.0, "with boxes"
    assert len(list((out / "labels/clip").glob("*.txt"))) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "av", None)
        assert predict.main([*arguments, "--out", str(tmp_path / "other"), str(tmp_path / "clip.mp4")]) == 2
    assert "video files need PyAV: pip install av" in capsys.readouterr().err


@pytest.mark.skipif(not VIDEO, reason="PyAV is not installed")
def test_numbered_pictures_become_a_video_of_each_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In the order of their numbers, whatever their sizes; a file that cannot be read is left out, none is replaced."""
    for name, number in (("f1.png", 1), ("f2.png", 2), ("f10.png", 3), ("f11.png", 4), ("sub/7.png", 5)):
        (tmp_path / "clip" / name).parent.mkdir(exist_ok=True, parents=True)
        size = (40, 40) if name == "f11.png" else (80, 64)
        Image.new("RGB", size, (40 * number, 60, 200)).save(tmp_path / "clip" / name)
    (tmp_path / "clip/f3.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    out.mkdir()
    (out / "clip.mp4").write_bytes(b"of others")
    arguments = [str(tmp_path / "clip"), "--resume", str(tiny_checkpoint), "--out", str(out), "--batch-size", "2"]
    assert predict.main([*arguments, "--threshold", "0.999", "--video", "12.5"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["clip.mp4", "clip_2.mp4", "detections.json", "sub.mp4"]
    assert (out / "clip.mp4").read_bytes() == b"of others"
    for name, numbers in (("clip_2.mp4", [1, 2, 3, 4]), ("sub.mp4", [5])):
        with video.open_video(out / name) as opened:
            assert float(opened.rate) == 12.5
            shades = [float(frame[0, 20:40, 30:50].float().mean()) for frame in opened]
        assert shades == pytest.approx([40 * number for number in numbers], abs=6)
    # What is found in each picture is what is found without a video, in the order in which it is shown.
    assert predict.main([*arguments, "--threshold", "0", "--video", "12.5", "--no-pictures"]) == 0
    results = json.loads((out / "detections.json").read_text())
    order = list(dict.fromkeys(entry["file_name"] for entry in results))
    assert order == ["f1.png", "f2.png", "f10.png", "f11.png", "sub/7.png"]
    found = Predictor(tiny_checkpoint, device="cpu")([tmp_path / "clip/f11.png"])[0]
    scores = [entry["score"] for entry in results if entry["file_name"] == "f11.png"]
    assert scores == pytest.approx(found.scores.tolist(), abs=2e-5)
