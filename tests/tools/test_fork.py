"""Forks of a small run: the branch in which nothing is swapped is the run itself, and what is said of gradients."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import config
from analysis import style
from datasets.shapes import ShapesConfig, generate
from engine import checkpoint
from engine.gradient_parts import PARTS, gradient_parts
from engine.records import read_records
from engine.runs.signals import StopRequest
from engine.step import OptimizerStep, seed_step
from engine.trainer import Trainer
from experiments.comparison import collect, group
from losses.criterion import GroupSupervision, LossWeights
from losses.ia_bce import IABCE
from main import prepare
from structures import BatchSize
from tools import fork

STEPS = 7
"""Of the original run, whose checkpoints are of steps 3, 6 and 7; forks are at 4."""


@pytest.fixture(autouse=True, scope="module")
def _restored(keeping_process_state: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    with keeping_process_state(), pytest.MonkeyPatch.context() as patch:
        # The branches' own pictures take longer than all else in them.
        patch.setattr(Trainer, "_draw", lambda *_: None)
        patch.setattr("engine.validation.draw_predictions", lambda *_: None)
        yield


def settings(directory: Path) -> dict[str, Any]:
    def split(name: str) -> dict[str, Any]:
        return {
            "images": f"{directory}/shapes/images/{name}",
            "annotations": f"{directory}/shapes/annotations/instances_{name}.json",
            "transforms": [{"name": "random_flip"}] if name == "train" else [],
        }

    backbone = {"model": "resnet10t", "pretrained": False, "norm": "batch", "frozen_stages": 0, "strides": [16, 32]}
    return {
        "model": {
            "backbone": backbone, "embed_dim": 32, "num_heads": 2, "num_levels": 3, "encoder_layers": 1,
            "decoder_layers": 2, "ffn_dim": 32, "num_queries": 8, "denoising": {"queries": 6}, "dropout": 0.1,
        },
        "criterion": {"classification": "ia_bce", "matcher": "mixed", "prime_sample_tau": 1.5},
        "data": {"train": split("train"), "val": split("val"), "batch_size": 2, "num_workers": 0},
        "optimizer": {"lr": 1e-3, "lr_scales": {}, "clip_norm": 0.5},
        "schedule": {"name": "cosine", "steps": STEPS, "warmup_steps": 2},
        "trainer": {"ema_decay": 0.9, "eval_every_epochs": None, "checkpoint_every": 3, "log_every": 1},
    }  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of step 7, and beside it, in ``kept``, its checkpoint of step 3."""
    directory = tmp_path_factory.mktemp("fork")
    generate(directory / "shapes", ShapesConfig(train_images=8, val_images=4, image_size=64, max_object_size=48), 1)
    run, kept = directory / "run", directory / "kept"
    run.mkdir()
    kept.mkdir()
    torch.set_deterministic_debug_mode("warn")
    cfg = config.from_dict({**settings(directory), "output_dir": str(run)})
    trainer = prepare(cfg, torch.device("cpu"), None, None)
    with StopRequest() as stop:
        for _ in trainer.steps(stop):
            if trainer.step == 4:
                shutil.copy(run / checkpoint.LAST, kept / checkpoint.LAST)
    return run


def fork_at_4(original: Path, values: str, out: Path) -> int:
    """Fork between two checkpoints."""
    return fork.main([
        str(original.parent / "kept"), "--at", "4", "--swap", f"criterion.classification={values}", "--steps", "3",
        "--parts-every", "2", "--samples", "20", "--match-norms", "--out", str(out),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def forked(original: Path) -> Path:
    """Forks with what the run had, with another loss, and with the same with another number."""
    out = original.parent / "forks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 55)
        assert fork_at_4(original, "ia_bce,vfl,{name: ia_bce, gamma: 1.0}", out) == 0
    return out


def identical(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(identical(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(identical, first, second))
    return bool(first == second)


def test_a_branch_with_nothing_swapped_is_the_original_run_to_the_bit(original, forked):
    whole, branch = (checkpoint.load(path / checkpoint.LAST).state for path in (original, forked / "ia_bce"))
    for part in ("weights", "ema", "optimizer", "scaler", "position"):
        assert identical(whole[part], branch[part]), part
    logged, own = (read_records(path / "metrics.jsonl") for path in (original, forked / "ia_bce"))
    assert [without_clocks(r) for r in logged if r["step"] > 4] == [without_clocks(r) for r in own]
    other = checkpoint.load(forked / "vfl" / checkpoint.LAST).state["weights"]
    assert not identical(whole["weights"], other)


CLOCKS = ("seconds", "seconds_per_step", "images_per_second", "data_wait", "memory_gib", "eta_seconds")


def test_what_is_reported_of_each_step(forked):
    records = read_records(forked / "fork.jsonl")
    names = ["ia_bce", "vfl", "{name: ia_bce, gamma: 1.0}"]
    assert [(r["branch"], r["baseline"]) for r in records if r["kind"] == "branch"] == [
        (n, n == "ia_bce") for n in names
    ]
    steps = [r for r in records if r["kind"] == "step"]
    assert [(r["step"], r["branch"]) for r in steps] == [(step, name) for step in (5, 6, 7) for name in names]
    assert [r["step"] for r in steps if "shares" in r] == [5] * 3 + [7] * 3
    for record in steps:
        assert record["terms"]["decoder.1/class"] > 0
        assert set(record["cosines"]) == set(names) - {record["branch"]}
        if "shares" in record:
            assert sum(record["shares"][part] for part in PARTS) == pytest.approx(1)
            # The parts were taken from the very step that followed.
            assert record["norms"]["total"] == pytest.approx(record["grad_norm"], rel=1e-4)
    assert steps[1]["cosines"]["ia_bce"] == pytest.approx(steps[0]["cosines"]["vfl"])
    assert steps[1]["cosines"]["ia_bce"] < 0.999
    results = [r for r in records if r["kind"] == "result"]
    assert [r["branch"] for r in results] == names
    assert (forked / "fork.png").stat().st_size > 1000


def test_matched_norms_are_equal_at_the_fork(forked):
    """On average over the batches on which they were measured; the first of them is near it."""
    weights = config.load(forked / "vfl" / "config.yaml").criterion.weights
    assert weights.classification != 1
    assert (weights.bbox, weights.giou) == pytest.approx((5, 2), rel=1e-6)
    first = {
        r["branch"]: r["norms"] for r in read_records(forked / "fork.jsonl") if r["kind"] == "step" and r["step"] == 5
    }
    assert first["vfl"]["boxes_in_all"] == pytest.approx(first["ia_bce"]["boxes_in_all"], rel=1e-5)
    assert first["vfl"]["classes_in_all"] == pytest.approx(first["ia_bce"]["classes_in_all"], rel=0.3)


class Killed(BaseException):
    """In place of the end of the process."""


def test_a_killed_fork_goes_on_as_if_nothing_had_happened(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed before its branches, while records are written, and in the evaluation of the second branch."""
    monkeypatch.setattr("experiments.fork.MATCHED_ON", 1)
    monkeypatch.setattr(fork, "draw_fork", lambda *_: None)
    assert fork_at_4(original, "vfl", tmp_path / "whole") == 0
    out, append, evaluate, evaluations = tmp_path / "parts", fork.append, Trainer._evaluate, itertools.count(1)

    def killed_before_branches(*args: Any) -> None:
        raise Killed

    def killed_in_records(path: Path, record: dict[str, Any]) -> None:
        if (record.get("branch"), record.get("step"), record["kind"]) == ("vfl", 6, "step"):
            path.write_text(path.read_text() + '{"kind": "step", "branch": "vf')
            raise Killed
        append(path, record)

    def killed_in_evaluation(*args: Any) -> None:
        evaluate(*args)
        if next(evaluations) == 2:
            raise Killed

    for place, name, death in (
        (fork, "matched", killed_before_branches),
        (fork, "append", killed_in_records),
        (Trainer, "_evaluate", killed_in_evaluation),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, death)
            with pytest.raises(Killed):
                fork_at_4(original, "vfl", out)
    assert fork_at_4(original, "vfl", out) == 0
    assert "2 branches of 3 steps, 2 of them taken before: original, vfl" in capsys.readouterr().out
    for name in ("fork.jsonl", "original/metrics.jsonl", "vfl/metrics.jsonl"):
        whole, parts = ([without_clocks(r) for r in read_records(path / name)] for path in (tmp_path / "whole", out))
        assert whole == parts, name
    for branch in ("original", "vfl"):
        whole, parts = (checkpoint.load(path / branch / checkpoint.LAST).state for path in (tmp_path / "whole", out))
        for part in ("weights", "ema", "optimizer", "position"):
            assert identical(whole[part], parts[part]), (branch, part)
    assert fork.main([str(original), "--swap", "seed=1", "--steps", "1", "--out", str(out)]) == 2
    assert "holds a sweep, or a fork with other options" in capsys.readouterr().err


def without_clocks(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in (*CLOCKS, "environment")}


def test_branches_are_rows_for_compare(forked):
    members, baseline = collect([forked])
    assert baseline == "ia_bce"
    assert [(one.variant, one.status()) for one in group(members)][:2] == [("ia_bce", "1"), ("vfl", "1")]


def test_parts_of_a_gradient_are_those_of_the_terms(original):
    """Against a backward pass of each term alone, with the weights of the others at zero."""
    cfg = config.from_dict({**settings(original.parent), "output_dir": str(original)})
    weights = {"classification": (1.0, 0.0, 0.0), "boxes": (0.0, 5.0, 2.0), "total": (1.0, 5.0, 2.0)}
    expected = {}
    trainer = prepare(cfg, torch.device("cpu"), None, checkpoint.load(original / checkpoint.LAST))
    step = trainer.optimizer_step
    batches = next(trainer.loader.iterate(0, 0))
    size = BatchSize(sum(batches[0].targets.counts), 2)
    found = gradient_parts(seeded(step), cfg.criterion.match, batches, size)
    assert all(p.grad is None for p in step.parameters)
    for name, (classes, bbox, giou) in weights.items():
        own = LossWeights(classification=classes, bbox=bbox, giou=giou)
        step.criterion = dataclasses.replace(cfg.criterion, weights=own)
        expected[name] = float(seeded(step).backward(batches, size)[0])
    step.criterion = dataclasses.replace(cfg.criterion, groups={"denoising": GroupSupervision(weight=0.0)})
    without = float(seeded(step).backward(batches, size)[0])
    norms = found.norms
    assert norms["classes_in_all"] == pytest.approx(expected["classification"], rel=1e-4)
    assert norms["boxes_in_all"] == pytest.approx(expected["boxes"], rel=1e-4)
    assert norms["total"] == pytest.approx(expected["total"], rel=1e-4)
    # ‖total − denoising‖² = ‖total‖² − 2⟨denoising, total⟩ + ‖denoising‖²
    squared = norms["total"] ** 2 * (1 - 2 * found.shares["denoising"]) + norms["denoising"] ** 2
    assert math.sqrt(squared) == pytest.approx(without, rel=1e-4)
    step.criterion = dataclasses.replace(cfg.criterion, classification=IABCE(matched_weight=0.0))
    unmatched_alone = gradient_parts(seeded(step), cfg.criterion.match, batches, size).norms
    assert unmatched_alone["matched"] == 0
    assert unmatched_alone["unmatched"] == pytest.approx(norms["unmatched"], rel=1e-4)


def seeded(step: OptimizerStep) -> OptimizerStep:
    seed_step(0, 0, 0)
    return step


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--at", "2"], "its checkpoints are of step 7, and --at 2 needs one at or before that step"),
        (["--at", "8"], "its schedule ends before step 9: lower --at or --steps"),
        (["--swap", "criterion.classification=vlf"], "unknown name 'vlf', did you mean 'vfl'"),
        (["--swap", "model.embed_dim=64"], "is for another model: *"),
        (["--steps", "0"], "--steps and --parts-every must be at least 1"),
    ],
)
def test_mistakes_are_one_line(original, tmp_path, capsys, arguments, words):
    if "--swap" in arguments and "--at" not in arguments:
        arguments = ["--set", f"schedule.steps={STEPS + 1}", *arguments]
    given = ["--swap", "criterion.classification=vfl", "--steps", "1", *arguments]
    assert fork.main([str(original), *given, "--out", str(tmp_path / "out")]) == 2
    assert fnmatch.fnmatch(capsys.readouterr().err.splitlines()[-1], f"error: *{words}*")
