"""Every detector of the index through the commands: what the engine promises holds whatever the model."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_exactness import assert_identical, last
from torch import Tensor

import main
from datasets.shapes import ShapesConfig, generate
from engine import checkpoint, validation
from engine.runs.signals import Interrupted
from engine.step import OptimizerStep
from schema import plain
from tools import analyze
from tools.predictor import Predictor

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from family import DETECTORS, FAMILY, criterion_for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    generate(directory, ShapesConfig(train_images=4, val_images=2, image_size=48, max_object_size=40, seed=3), 1)
    return directory


def write_configuration(directory: Path, data: Path, name: str) -> Path:
    sets = {
        split: {"images": f"{data}/images/{split}", "annotations": f"{data}/annotations/instances_{split}.json"}
        for split in ("train", "val")
    }
    values = {
        "model": plain(FAMILY[name]),
        "criterion": plain(criterion_for(FAMILY[name])),
        "data": {**sets, "batch_size": 4, "num_workers": 0},
        "schedule": {"name": "cosine", "steps": 2, "warmup_steps": 1},
        "trainer": {"device": "cpu", "precision": "bf16", "accumulation_steps": 2, "log_every": 1},
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", DETECTORS.values(), ids=DETECTORS)
def test_it_trains_resumes_fine_tunes_predicts_and_is_analysed(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 and micro-batches: resuming gives the same bits; --init-from, prediction and analysis take its file."""
    monkeypatch.setattr(validation, "draw_predictions", lambda *_: None)
    options = ["--cfg", str(write_configuration(tmp_path, data, name))]
    main.run([*options, f"output_dir={tmp_path}/whole"])
    update, steps = OptimizerStep.update, itertools.count(1)

    def interrupt(step: OptimizerStep, norm: Tensor) -> None:
        update(step, norm)
        if next(steps) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as first_step:
        first_step.setattr(OptimizerStep, "update", interrupt)
        with pytest.raises(Interrupted):
            main.run([*options, f"output_dir={tmp_path}/parts"])
    assert last(tmp_path / "parts")["position"]["step"] == 1
    main.run([*options, f"output_dir={tmp_path}/parts", "--resume", "auto"])
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    for state in (whole, parts):
        del state["config"]["output_dir"]
    assert_identical(whole, parts)

    file = tmp_path / "whole" / checkpoint.LAST
    overrides = ["optimizer.lr=1e-12", "trainer.ema_decay=null", "schedule.steps=1"]
    main.run([*options, "--init-from", str(file), *overrides, f"output_dir={tmp_path}/tuned"])
    best = whole["weights"] if whole["ema"] is None else whole["ema"]
    for key, value in last(tmp_path / "tuned")["weights"].items():
        torch.testing.assert_close(value, typing.cast(Any, best)[key], msg=key)

    picture = next((data / "images" / "val").iterdir())
    (found,) = Predictor(file, device="cpu")([picture])
    assert len(found.scores) == min(20, 12 if FAMILY[name].no_object else 20)
    assert bool(found.boxes_xyxy.isfinite().all())
    drawn: list[Any] = []
    monkeypatch.setattr(analyze, "draw_all", lambda *_: [])
    monkeypatch.setattr(analyze, "draw_sampling", lambda *arguments: drawn.append(arguments))
    assert analyze.main(["--resume", str(file), "--out", str(tmp_path / "analysis")]) == 0
    assert (tmp_path / "analysis" / "analysis.json").exists()
    queries = [query for row in drawn[0][2] for query in row.queries]
    assert queries
    # Processors with instructions for bfloat16 round the weights to it.
    assert all(query.weights.sum() == pytest.approx(FAMILY[name].num_heads, rel=5e-3) for query in queries)
