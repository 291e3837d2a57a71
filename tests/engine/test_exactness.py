"""A run gives the same bits however often it is interrupted, and the same gradients however its batch is split."""

import functools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Options, Trainer, build, train
from torch import Tensor
from training_processes import run_processes

from engine import checkpoint, distributed
from engine.runs.signals import Interrupted

VARIABLE = {"environment", "seconds"}
"""What may differ between two runs: when and on what they ran."""


def assert_identical(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Equal in every bit, through all nesting."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - VARIABLE:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


def last(directory: str | Path) -> dict[str, Any]:
    return checkpoint.load(Path(directory) / checkpoint.LAST).state


def interrupted(options: Options, *steps: int) -> Trainer:
    """Run with a SIGTERM in each of the steps, and go on each time in a new trainer."""
    for index, step in enumerate(steps):
        with pytest.raises(Interrupted):
            train(replace(options, signal_at=step, resume="auto" if index else None))
        assert last(options.directory)["position"]["step"] == step
    return train(replace(options, resume="auto"))


VARIANTS = {
    "plain": {},
    "accumulation": {"accumulation_steps": 2},
    "no averaging, step schedule": {"ema_decay": None, "cosine": False},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "running statistics": {"batch_norm": True},
    "evaluations": {"eval_every_steps": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_run_equals_uninterrupted_one(tmp_path: Path, variant: str) -> None:
    options = Options(directory=str(tmp_path / "whole"), **VARIANTS[variant])  # type: ignore[arg-type]
    train(options)
    parts = replace(options, directory=str(tmp_path / "parts"))
    # Mid-epoch, at the end of an epoch, and at the last step (of 12, in epochs of 5).
    interrupted(parts, 3, 10, 11)
    assert_identical(last(options.directory), last(parts.directory))
    assert_identical(
        checkpoint.load(tmp_path / "whole" / checkpoint.BEST).state,
        checkpoint.load(tmp_path / "parts" / checkpoint.BEST).state,
    )
    # Neither lost nor repeated records.
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line)["step"] for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert steps == whole


def test_random_numbers_matter_to_the_comparison(tmp_path: Path) -> None:
    """Otherwise the tests above would hold without any care for random state."""
    for seed in (7, 8):
        trainer = build(Options(directory=str(tmp_path / str(seed)), seed=seed))
        trainer.optimizer_step.module.load_state_dict(
            build(Options(directory=str(tmp_path))).optimizer_step.module.state_dict()
        )
        trainer.directory.mkdir()
        trainer.fit()
    a, b = last(tmp_path / "7")["weights"], last(tmp_path / "8")["weights"]
    assert not torch.equal(a["box_head.weight"], b["box_head.weight"])


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    options = Options(directory=str(tmp_path / "run"))
    train(options)
    before, records = last(options.directory), (tmp_path / "run/metrics.jsonl").read_text()
    trainer = train(replace(options, resume="auto"))
    assert_identical(before, last(options.directory))
    assert (tmp_path / "run/metrics.jsonl").read_text() == records
    assert trainer.metrics["AP"] == before["metrics"]["AP"]


def test_killed_between_checkpoint_and_evaluation(tmp_path: Path) -> None:
    """The evaluation that was due is made up for, and its checkpoint is that of the uninterrupted run."""
    options = Options(directory=str(tmp_path / "whole"), eval_every_steps=4)
    train(options)
    parts = replace(options, directory=str(tmp_path / "parts"))

    class KilledError(Exception):
        pass

    def die(model: torch.nn.Module, give_up: Any) -> dict[str, Any]:
        raise KilledError

    Path(parts.directory).mkdir()
    trainer = build(parts)
    trainer.evaluate = die
    with pytest.raises(KilledError):
        trainer.fit()
    assert last(parts.directory)["position"] == {"step": 4, "steps_per_epoch": 5, "evaluated_step": 0}
    train(replace(parts, resume="auto"))
    assert_identical(last(options.directory), last(parts.directory))


TWO_PROCESS_VARIANTS = {"plain": {}, "accumulation": {"accumulation_steps": 2, "batch_norm": True}}
SPLITS = {
    "1x8": (1, {}),
    "1x4x2": (1, {"accumulation_steps": 2}),
    "2x4": (2, {}),
    "2x2x2": (2, {"accumulation_steps": 2}),
}
# Seeds 0 and 1: the first of two processes has no target.
SPLITS |= {"1x2": (1, {"batch_size": 2}), "2x1": (2, {"batch_size": 2})}


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, keeping_process_state: Callable[[], AbstractContextManager[None]]
) -> Path:
    """Results of all runs that take two processes, which are started only once."""
    root = tmp_path_factory.mktemp("shared")
    with keeping_process_state():
        train_all(root)
    return root


def train_all(root: Path) -> None:
    """Run them."""
    runs = []
    for name, changes in TWO_PROCESS_VARIANTS.items():
        whole = Options(directory=str(root / f"{name}-whole"), **changes)  # type: ignore[arg-type]
        parts = replace(whole, directory=str(root / f"{name}-parts"), resume="auto")
        # The signal reaches either process; both stop after the same step.
        runs += [whole, replace(parts, signal_at=3, signal_rank=1), replace(parts, signal_at=8), parts]
    one = Options(directory=str(root / "one"), dropout=0.0)
    train(one)
    up, down = (replace(one, directory=str(root / name), resume="auto") for name in ("up", "down"))
    with pytest.raises(Interrupted):
        train(replace(up, signal_at=6))
    runs += [up, replace(down, signal_at=6)]
    for name, (processes, changes) in SPLITS.items():
        run = replace(one, directory=str(root / "split"), resume="auto", gradients=str(root / name), **changes)  # type: ignore[arg-type]
        if processes == 2:
            runs.append(run)
        else:
            train(run)
    ended = run_processes(runs, processes=2)
    assert [e.code for e in ended] == [0, 0], ended[0].errors + ended[1].errors
    train(down)


@pytest.mark.parametrize("variant", TWO_PROCESS_VARIANTS)
def test_two_processes_are_exact_too(shared: Path, variant: str) -> None:
    assert_identical(last(shared / f"{variant}-whole"), last(shared / f"{variant}-parts"))
    assert (shared / f"{variant}-parts/log.txt").read_text().count("nothing is left") == 0


@pytest.mark.parametrize("direction", ["up", "down"])
def test_resume_with_another_number_of_processes(shared: Path, direction: str) -> None:
    """Same global batch, same order of the data: equal up to rounding, here 1e-5 (without dropout)."""
    changed, unchanged = last(shared / direction), last(shared / "one")
    assert changed["position"] == unchanged["position"]
    for key, value in unchanged["weights"].items():
        torch.testing.assert_close(changed["weights"][key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("other", "reference"), [("1x4x2", "1x8"), ("2x4", "1x8"), ("2x2x2", "1x8"), ("2x1", "1x2")])
def test_gradients_do_not_depend_on_the_split(shared: Path, other: str, reference: str) -> None:
    """Processes × images (× micro-batches), with 0 to 3 targets an image."""
    a, b = (torch.load(shared / name, weights_only=True) for name in (other, reference))
    for key, value in b.items():
        assert value is not None
        assert value.abs().sum() > 0
        torch.testing.assert_close(a[key], value, rtol=1e-5, atol=1e-5, msg=key)


def evaluate_everywhere(options: Options) -> None:
    """Train and evaluate; each process then has its own metrics, which must be those of all."""
    with distributed.process_group(torch.device("cpu"), 60):
        trainer = train(options)
        found = distributed.gather(trainer.metrics["AP"])
        assert len(set(found)) == 1, found


def test_processes_evaluate_the_same_running_statistics(tmp_path: Path) -> None:
    options = Options(directory=str(tmp_path / "run"), steps=3, batch_norm=True)
    ended = run_processes(functools.partial(evaluate_everywhere, options), processes=2)
    assert [e.code for e in ended] == [0, 0], ended[0].errors


def test_another_division_into_steps_is_refused(tmp_path: Path) -> None:
    options = Options(directory=str(tmp_path / "run"), steps=4)
    train(options)
    with pytest.raises(ValueError, match="was trained with 5 steps per epoch, this run has 6"):
        train(replace(options, resume="auto", steps_per_epoch=6))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_size": 4}, r"was trained with data.batch_size=8, this run has 4: .*--init-from"),
        ({"one_orientation": 2}, r"was trained with data.one_orientation=1, this run has 2: "),
        ({"images": 41}, "was trained on 40 images, this run has 41: "),
        ({"image_ids": "1 to 40"}, "was trained on other images"),
    ],
)
def test_other_images_in_as_many_steps_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    options = Options(directory=str(tmp_path / "run"), steps=4)
    train(options)
    with pytest.raises(ValueError, match=said):
        train(replace(options, resume="auto", **changed))
    # Checkpoints that do not say what they were trained on are taken.
    state = last(options.directory)
    del state["data"]
    checkpoint.write(tmp_path / "run", state)
    assert train(replace(options, resume="auto", steps=5, **changed)).step == 5


def test_going_back_to_an_earlier_checkpoint_is_for_good(tmp_path: Path) -> None:
    """Killed right after: what counts is where the run went back to, not the end of the course it has left."""
    options = Options(directory=str(tmp_path / "run"), eval_every_steps=4, checkpoint_every=100)
    train(options)
    older = last(options.directory)
    older["position"].update(step=4, evaluated_step=4)
    torch.save(older, tmp_path / "run" / checkpoint.BEST)
    before = (tmp_path / "run/metrics.jsonl").read_text()

    class KilledError(Exception):
        pass

    def die(epoch: int, start_step: int) -> Any:
        raise KilledError

    trainer = build(options)
    trainer.loader.iterate = die  # type: ignore[method-assign]
    trainer.load_state_dict(checkpoint.load(tmp_path / "run" / checkpoint.BEST))
    with pytest.raises(KilledError):
        trainer.fit()
    assert last(options.directory)["position"]["step"] == 4
    kept = (tmp_path / "run/metrics.jsonl").read_text()
    assert before.startswith(kept)
    assert json.loads(kept.splitlines()[-1])["step"] == 4


def test_longer_schedule_goes_on(tmp_path: Path) -> None:
    options = Options(directory=str(tmp_path / "run"), steps=4)
    train(options)
    assert train(replace(options, resume="auto", steps=6)).step == 6
