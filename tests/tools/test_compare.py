"""The compare command on runs whose detections, and so whose differences, are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from analysis import style
from engine.evaluator import Evaluator
from structures import Detections
from tools import compare

IMAGES = 40


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Detectors that find the only object of the first n images: n = 10 and 14 for k=1, 22 and 26 for k=2."""
    monkeypatch.setattr(style, "DPI", 55)
    content = {
        "images": [{"id": i, "width": 50, "height": 50, "file_name": f"{i}.jpg"} for i in range(IMAGES)],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 3, "bbox": [5, 5, 30, 30], "area": 900, "iscrowd": 0}
            for i in range(IMAGES)
        ],
        "categories": [{"id": 3, "name": "disc"}],
    }
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(content))
    for k, seed, found in ((1, 0, 10), (1, 1, 14), (2, 0, 22), (2, 1, 26)):
        directory = tmp_path / "runs" / f"k{k}s{seed}"
        directory.mkdir(parents=True)
        evaluator = Evaluator(annotations, [(3, "disc")], backend="pycocotools")
        for i in range(found):
            box = torch.tensor([[5.0, 5, 35, 35]])
            evaluator.update([i], [Detections(torch.tensor([0.9]), torch.tensor([0]), box)])
        metrics = evaluator.compute()
        evaluator.save(directory / "detections.npz")
        config = {"k": k, "seed": seed, "data": {"val": {"annotations": str(annotations)}}, "schedule": {"steps": 5}}
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [
            {"kind": "train", "step": 5, "epoch": 1},
            {"kind": "eval", "step": 5, "epoch": 1, "seconds": 1.0, **metrics},
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "runs"


def test_differences_come_with_paired_intervals(runs, capsys):
    assert compare.main([str(runs), "--baseline", "k=1", "--samples", "300", "--metrics", "AP,AP50"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.replace("|", " ").replace("**", "").splitlines()
    assert captured.err.count("resampling") == 4
    assert lines[0].split() == ["k", "runs", "AP", "ΔAP", "AP50", "ΔAP50"]
    first, second = lines[2].split(), lines[3].split()
    # 12 and 24 of 40 images: 30 and 60 percent, up to the 101 recalls at which precision is read.
    assert float(first[2]) == pytest.approx(30, abs=1)
    assert first[5] == "baseline"
    assert float(second[2]) == pytest.approx(60, abs=1)
    low, high = float(second[6].strip("[,")), float(second[7].strip("]"))
    # The difference is the share of 12 of 40 images in a resample: 30 ± 2 · 100 · sqrt(0.3 · 0.7 / 40) = 30 ± 14.
    assert float(second[5]) == pytest.approx(30, abs=1)
    assert low == pytest.approx(16, abs=3)
    assert high == pytest.approx(44, abs=3)
    # What is right is so at all thresholds.
    assert lines[3].split("[")[1].split("]")[0] == lines[3].split("[")[2].split("]")[0]
    for name in ("comparison.md", "comparison.csv", "comparison.tex", "learning_curves.png"):
        assert (runs / name).stat().st_size > 100
    assert "paired bootstrap" in (runs / "comparison.md").read_text()


def test_resampled_precision_is_kept_for_these_detections_and_this_number(runs, capsys):
    def resampled(*arguments: str) -> tuple[str, list[str]]:
        assert compare.main([str(runs), "--baseline", "k=1", *arguments]) == 0
        captured = capsys.readouterr()
        return captured.out, [line.split()[1] for line in captured.err.splitlines()]

    first, made = resampled("--samples", "50")
    assert made == ["k2s0", "k2s1", "k1s0", "k1s1"]
    assert resampled("--samples", "50") == (first, [])
    other, made = resampled("--samples", "60")
    assert len(made) == 4
    assert other != first
    (runs / "k2s0" / "detections_resampled.npz").write_bytes(b"PK damaged")
    evaluator = Evaluator(runs.parent / "annotations.json", [(3, "disc")], backend="pycocotools")
    for i in range(10):
        evaluator.update([i], [Detections(torch.tensor([0.8]), torch.tensor([0]), torch.tensor([[5.0, 5, 35, 35]]))])
    evaluator.compute()
    evaluator.save(runs / "k1s0" / "detections.npz")
    assert resampled("--samples", "60") == (other, ["k2s0", "k1s0"])


def test_a_reader_learns_why_there_is_no_interval(runs, capsys):
    arguments = [str(runs), "--baseline", "k=1", "--samples", "20"]
    assert compare.main([*arguments, "--at", "best"]) == 0
    out = capsys.readouterr().out
    assert "no intervals: the detections that runs keep are those of their last evaluation" in out
    assert "[" not in out.splitlines()[3]
    assert compare.main([*arguments, "--metrics", "APl,AP75"]) == 0
    out = capsys.readouterr().out
    assert "no interval for APl: there is one for AP, AP50, AP75 only" in out
    assert out.replace("|", " ").splitlines()[0].split() == ["k", "runs", "APl", "ΔAPl", "AP75", "ΔAP75"]
    assert out.splitlines()[3].count("[") == 1


def test_runs_that_name_no_validation_set_have_no_intervals(runs, capsys):
    (runs / "k2s0" / "config.yaml").write_text("k: 2\nseed: 0\nschedule: {steps: 5}\n")
    assert compare.main([str(runs), "--baseline", "k=1", "--samples", "20"]) == 0
    assert f"the configuration of {runs / 'k2s0'} names no data.val.annotations" in capsys.readouterr().out


def test_without_detections_there_are_differences_but_no_intervals(runs, capsys, tmp_path):
    (runs / "k2s0" / "detections.npz").unlink()
    assert compare.main([str(runs), "--baseline", "k=1", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "no interval: " in out
    assert "k2s0/detections.npz" in out
    row = out.replace("|", " ").splitlines()[3]
    assert float(row.split()[5]) == pytest.approx(30, abs=1)
    assert "[" not in row
    assert not (runs / "comparison.md").exists()
    assert (tmp_path / "out" / "comparison.md").exists()


def test_detections_of_another_evaluation_are_not_used(runs, capsys):
    (runs / "k2s0" / "detections.npz").write_bytes((runs / "k1s0" / "detections.npz").read_bytes())
    assert compare.main([str(runs), "--baseline", "k=1"]) == 0
    assert "not that of the last evaluation" in capsys.readouterr().out


def test_without_a_baseline_there_is_no_difference(runs, capsys):
    assert compare.main([str(runs / "k1s0"), str(runs / "k2s1"), "--metrics", "AP"]) == 0
    lines = capsys.readouterr().out.replace("|", " ").splitlines()
    assert lines[0].split() == ["k", "runs", "AP"]
    assert len(lines[2].split()) == 3  # a single run has no standard deviation


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: there is no such directory"),
        (["runs", "--baseline", "k=3"], "baseline 'k=3': nothing fits"),
        (["runs", "--metrics", "AP,mAP"], "there is no metric 'mAP'"),
        (["runs", "--samples", "-1"], "--samples must not be negative"),
        (["."], "holds neither a sweep nor a run"),
    ],
)
def test_mistakes_are_one_line(runs, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(runs.parent)
    assert compare.main(arguments) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
