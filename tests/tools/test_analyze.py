"""The real tools one after the other on tiny trainings: sweep, compare, analyze."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from analysis import style
from analysis.detections_file import read_rows
from datasets.shapes import ShapesConfig, generate
from engine import checkpoint, trainer, validation
from experiments.runs import read_run
from tools import analyze, compare, sweep

RUN = """
model:
  backbone: {model: resnet10t, pretrained: false, norm: batch, frozen_stages: 0}
  num_levels: 3
  embed_dim: 32
  num_heads: 4
  encoder_layers: 1
  decoder_layers: 2
  ffn_dim: 32
  num_queries: 12
  denoising: {queries: 4}
  detections_per_image: 20
criterion: {classification: {name: ia_bce}}
data:
  train: {images: shapes/images/train, annotations: shapes/annotations/instances_train.json}
  val: {images: shapes/images/val, annotations: shapes/annotations/instances_val.json}
  batch_size: 4
  eval_batch_size: 4
  num_workers: 0
optimizer: {lr: 1e-3, lr_scales: {}}
schedule: {name: cosine, steps: 2, warmup_steps: 0}
trainer: {eval_every_steps: 2, log_every: 1, device: cpu}
"""
FIGURES = (
    "best_regressed_recall", "iou_histograms", "score_iou", "error_types", "sampling_points",
)  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """A sweep over two losses, of which it finds the first one done: by the command that it lists, in this process."""
    directory = tmp_path_factory.mktemp("ablation")
    settings = ShapesConfig(train_images=8, val_images=6, image_size=64, max_object_size=40, max_objects=3)
    generate(directory / "shapes", settings, processes=1)
    (directory / "run.yaml").write_text(RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        # Pictures take most of the time of such a run; the second one, a process of its own, draws them.
        patch.setattr(trainer, "draw_curves", lambda *_: None)
        patch.setattr(validation, "draw_predictions", lambda *_: None)
        grid = ["--cfg", "run.yaml", "criterion.classification=focal,ia_bce", "--out", "runs/loss"]
        with contextlib.redirect_stdout(io.StringIO()) as listed:
            assert sweep.main([*grid, "--list"]) == 0
        first, second = (shlex.split(line) for line in listed.getvalue().splitlines())
        assert "criterion.classification=ia_bce" in second
        main.run(first[2:])
        finished = Path("runs/loss/classification-focal/metrics.jsonl")
        modified = finished.stat().st_mtime_ns
        assert sweep.main(grid) == 0
        assert finished.stat().st_mtime_ns == modified
    return directory


@pytest.mark.slow
def test_sweep_compare_and_analyze(swept, monkeypatch, capsys):
    monkeypatch.chdir(swept)
    monkeypatch.setattr(style, "DPI", 55)
    runs = [read_run(swept / "runs" / "loss" / f"classification-{name}") for name in ("focal", "ia_bce")]
    assert [run.state for run in runs] == ["done", "done"]
    assert [record["step"] for record in runs[0].evals] == [2]
    assert read_rows(runs[0].directory / "detections.npz").shape[1] == 7

    # Again: nothing is left to do.
    modified = (runs[0].directory / "metrics.jsonl").stat().st_mtime_ns
    assert sweep.main(["--out", "runs/loss"]) == 0
    assert (runs[0].directory / "metrics.jsonl").stat().st_mtime_ns == modified

    capsys.readouterr()
    assert compare.main(["runs/loss", "--baseline", "name=focal", "--samples", "50"]) == 0
    table = capsys.readouterr().out
    assert "focal" in table
    assert "no interval" not in table
    assert "paired bootstrap" in table

    checkpoints = [run.directory / "checkpoint_last.pth" for run in runs]
    assert analyze.main(["--resume", *map(str, checkpoints), "--out", "analysis", "--threshold", "0.01"]) == 0
    content = json.loads((swept / "analysis" / "analysis.json").read_text())
    assert [entry["label"] for entry in content["checkpoints"]] == ["classification-focal", "classification-ia_bce"]
    for entry, run in zip(content["checkpoints"], runs, strict=True):
        assert entry["metrics"]["AP"] == pytest.approx(run.evals[-1]["AP"], abs=1e-6)
        assert entry["oracle"]["as_is"] == pytest.approx(entry["metrics"]["AP"], abs=1e-6)
        assert entry["errors"]["ap50"] == pytest.approx(entry["metrics"]["AP50"], abs=1e-6)
        classes = [list(values.values()) for values in entry["average_precision_by_class"].values()]
        means = [np.mean(values) for values in classes if None not in values]
        assert np.mean(means) == pytest.approx(entry["metrics"]["AP"], abs=1e-6)
    for name in FIGURES:
        assert (swept / "analysis" / f"{name}.png").stat().st_size > 1000

    # The same numbers as columns of the table, in percent.
    capsys.readouterr()
    assert compare.main(["runs/loss", "--samples", "0", "--metrics", "AP", "--analysis", "analysis/analysis.json"]) == 0
    lines = [line.replace("**", "").strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    names = [name.strip() for name in lines[0]]
    added = "recall N, recall 2N, N within 0.02, Spearman, calibration, aligned AP, AP after NMS, duplicates"
    assert names[-8:] == added.split(", ")
    for entry, line in zip(content["checkpoints"], lines[2:4], strict=True):
        row = dict(zip(names, map(str.strip, line), strict=True))
        best = entry["best_regressed"]
        assert float(row["recall 2N"]) == pytest.approx(100 * best["recall"]["2N"]["IoU>=0"], abs=0.005)
        assert float(row["N within 0.02"]) == pytest.approx(100 * best["recall_within_0.02"]["N"], abs=0.005)
        assert float(row["AP after NMS"]) == pytest.approx(entry["oracle"]["after_nms"], abs=0.005)
        assert best["recall_within_0.02"]["N"] >= best["recall"]["N"]["IoU>=0"]
        assert float(row["calibration"]) == pytest.approx(
            100 * entry["misalignment"]["most_confident"]["calibration_error"], abs=0.005
        )
    assert compare.main(["runs/loss", "--analysis", "sweep.yaml"]) == 2
    assert "sweep.yaml: " in capsys.readouterr().err
    assert (
        compare.main(["runs/loss", "--analysis", "analysis/analysis.json", "analysis/../analysis/analysis.json"]) == 2
    )
    assert "classification-focal is in another of these analyses already" in capsys.readouterr().err
    content["checkpoints"].pop()
    Path("half.json").write_text(json.dumps(content))
    assert compare.main(["runs/loss", "--analysis", "half.json"]) == 2
    assert "not in these analyses: classification-ia_bce" in capsys.readouterr().err


@pytest.mark.slow
def test_mistakes_are_one_line(swept, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(swept)
    good = swept / "runs" / "loss" / "classification-focal" / "checkpoint_last.pth"
    other = torch.load(good, weights_only=True)
    other["categories"] = [*other["categories"][:-1], [99, "another"]]
    other = {key: value for key, value in other.items() if key != "format"}
    checkpoint.write(tmp_path, other)
    annotations = json.loads(Path("shapes/annotations/instances_val.json").read_text())
    annotations["images"] = annotations["images"][:3]
    kept = {image["id"] for image in annotations["images"]}
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] in kept]
    (tmp_path / "fewer.json").write_text(json.dumps(annotations))
    cases = [
        (["--resume", "nowhere.pth"], "nowhere.pth: there is no such checkpoint"),
        (
            ["--resume", str(good), str(tmp_path / "checkpoint_last.pth")],
            "is for other classes: its class 'another' (id 99) is",
        ),
        (["--resume", *["gone.pth"] * 9], "9 checkpoints: figures can tell at most 8 apart"),
        (["--resume", "gone.pth", "--labels", "a", "b"], "2 labels for 1 checkpoints"),
        (["--resume", "gone.pth", "lost.pth", "--labels", "a", "a"], "label 'a' is given to several checkpoints"),
        (["--resume", str(good), "--images", "1000"], "image 1000 is not in the validation set"),
        (["--resume", str(good), "--targets", "1000:0"], "--targets 1000:0: image 1000 is not in the validation set"),
        (["--resume", str(good), "--set", "data.val.annotations=gone.json"], "no annotation file gone.json"),
    ]
    for arguments, words in cases:
        assert analyze.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_labels_tell_checkpoints_apart():
    paths = [Path("runs/a/checkpoint_best.pth"), Path("runs/b/checkpoint_best.pth")]
    assert analyze.labels_of(paths) == ["a", "b"]
    assert analyze.labels_of([paths[0], Path("runs/a/checkpoint_last.pth")]) == ["a/best", "a/last"]
    assert analyze.labels_of([paths[0], Path("other/a/checkpoint_best.pth")]) == ["A: a/best", "B: a/best"]
