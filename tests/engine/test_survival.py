"""Signals, killed processes and full disks: real processes, real signals, real failures to write."""

import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_training
from test_exactness import assert_identical, last
from tiny_training import Options, train
from training_processes import Ended, Started, run_processes, start_processes

from engine import checkpoint
from engine.runs.faults import DivergedError
from engine.runs.signals import SAME_REQUEST_SECONDS, Interrupted, StopRequest

KILLS = int(os.environ.get("ALIGN_DETR_KILLS", "4"))
"""How often the kill tests kill."""


def steps_taken(directory: Path) -> int:
    """Steps that left a record, which happens right after each."""
    if not (directory / "metrics.jsonl").exists():
        return 0
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return max((record["step"] for record in records), default=0)


def wait_until(reached: Callable[[], bool], started: list[Started]) -> None:
    """Wait for what a run does in time, while all of its processes live."""
    deadline = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < deadline, "the run does not get on"
        assert all(s.process.is_alive() for s in started), [s.errors.read_text() for s in started]
        time.sleep(0.02)


def wait_for_step(directory: Path, step: int, started: list[Started]) -> None:
    """Wait until a run has come so far."""
    wait_until(lambda: steps_taken(directory) >= step, started)


def wait_for_evaluation(directory: Path, started: list[Started]) -> None:
    """Wait until a run evaluates, which begins some time after the record of its step."""
    wait_until((directory / "evaluating").exists, started)


def check_stopped(ended: list[Ended], directory: Path, signal_number: int) -> None:
    """All have stopped after the same step, with the signal's code, and the checkpoint is of that step."""
    assert [e.code for e in ended] == [128 + signal_number] * len(ended), ended
    (said,) = re.findall(r"stopped by (\w+) after step (\d+); go on with --resume auto", ended[0].output)
    assert said == (signal.Signals(signal_number).name, str(steps_taken(directory)))
    assert last(directory)["position"]["step"] == steps_taken(directory)
    assert not any("Traceback" in e.errors for e in ended)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("times", [1, 2])
def test_signal_stops_after_the_step(tmp_path: Path, signal_number: signal.Signals, times: int) -> None:
    directory = tmp_path / "run"
    options = Options(directory=str(directory), steps=100_000, delay=0.01, checkpoint_every=100_000)
    started = start_processes([options])
    wait_for_step(directory, 3, started)
    for _ in range(times):
        os.kill(started[0].process.pid or 0, signal_number)
        time.sleep(0.002)
    check_stopped([started[0].wait(30)], directory, signal_number)


def test_signal_to_one_process_stops_all(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    options = Options(directory=str(directory), steps=100_000, delay=0.01, checkpoint_every=100_000)
    started = start_processes([options], processes=2)
    wait_for_step(directory, 3, started)
    os.kill(started[1].process.pid or 0, signal.SIGTERM)
    check_stopped([s.wait(30) for s in started], directory, signal.SIGTERM)


def test_signal_during_evaluation(tmp_path: Path) -> None:
    """The evaluation is given up; the checkpoint before it is there, and the next start makes up for it."""
    directory = tmp_path / "run"
    options = Options(directory=str(directory), steps=6, eval_every_steps=3, eval_seconds=200.0)
    started = start_processes([options], processes=2)
    wait_for_evaluation(directory, started)
    for one in started:
        os.kill(one.process.pid or 0, signal.SIGTERM)
    check_stopped([s.wait(30) for s in started], directory, signal.SIGTERM)
    assert last(directory)["position"]["evaluated_step"] == 0
    trainer = train(replace(options, eval_seconds=0.0, resume="auto"))
    evaluations = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in evaluations if r["kind"] == "eval"] == [3, 6]
    assert trainer.step == 6


@pytest.mark.parametrize("processes", [1, 2])
def test_signal_ends_a_wait_for_data_that_never_come(tmp_path: Path, processes: int) -> None:
    directory = tmp_path / "run"
    options = Options(directory=str(directory), steps=100_000, checkpoint_every=100_000, hang_at=3)
    started = start_processes([options], processes=processes)
    wait_for_step(directory, 3, started)
    time.sleep(0.2)
    for one in started:
        os.kill(one.process.pid or 0, signal.SIGHUP)
    check_stopped([s.wait(30) for s in started], directory, signal.SIGHUP)


def test_a_second_interrupt_ends_what_listens_to_nothing(tmp_path: Path) -> None:
    """At once; what was saved is kept."""
    directory = tmp_path / "run"
    options = Options(directory=str(directory), steps=6, eval_every_steps=3, eval_seconds=200.0, eval_is_deaf=True)
    started = start_processes([options])
    wait_for_evaluation(directory, started)
    os.kill(started[0].process.pid or 0, signal.SIGINT)
    while "SIGINT: stopping after this step; Ctrl-C ends at once" not in started[0].output.read_text():
        assert started[0].process.is_alive()
        time.sleep(0.02)
    time.sleep(SAME_REQUEST_SECONDS)
    assert started[0].process.is_alive()
    os.kill(started[0].process.pid or 0, signal.SIGINT)
    ended = started[0].wait(30)
    assert ended.code == 130
    assert re.fullmatch(r"error: ended at once by a second Ctrl-C: .* --resume auto\n", ended.errors)
    assert last(directory)["position"]["step"] == 3


@pytest.mark.parametrize("end", [{}, {"signal_at": 3}, {"nan_at": 3}, {"signal_at": 3, "nan_at": 3}])
def test_where_the_process_lives_on_ctrl_c_works_as_before(tmp_path: Path, end: dict[str, Any]) -> None:
    """As in a notebook: after a run that was done, stopped, has failed, or failed when it was to stop."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = Options(directory=str(tmp_path), steps=5, signal_number=int(signal.SIGINT), **end)
    with pytest.raises((Interrupted, DivergedError)) if end else nullcontext():
        train(options)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.set_wakeup_fd(-1) == -1


def test_where_the_process_lives_on_a_second_ctrl_c_interrupts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What listens to nothing, by an exception and not by the end of the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("engine.runs.signals.SAME_REQUEST_SECONDS", 0.2)
    gc.disable()  # an exception that is raised in a callback of it, such as hypothesis has, comes to nothing

    def press_twice() -> None:
        wait_for_evaluation(tmp_path, [])
        for wait in (0.5, 0.0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(wait)

    fingers = threading.Thread(target=press_twice)
    fingers.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train(Options(directory=str(tmp_path), steps=3, eval_seconds=100.0, eval_is_deaf=True))
    finally:
        gc.enable()
    fingers.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert last(tmp_path)["position"]["step"] == 3


def test_what_is_to_outlive_its_terminal_does() -> None:
    """As nohup starts it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.wait_for(iter([1])) == 1
    assert not stop.signal_number


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Again and again, most often while a checkpoint is being written; the end is that of an undisturbed run."""
    generator = random.Random(0)
    every = 3
    options = Options(
        directory=str(tmp_path / "killed"),
        steps=20 * (KILLS + 1),
        checkpoint_every=every,
        ballast_mib=16,
        dropout=0.3,
        resume="auto",
    )
    directory = Path(options.directory)
    lost, in_writing, resumed_from = [], 0, 0
    for _ in range(KILLS):
        started = start_processes([options])
        wait_for_step(directory, resumed_from + generator.randint(1, 12), started)
        time.sleep(generator.uniform(0, 0.1))
        started[0].process.kill()
        started[0].process.join()
        in_writing += any(directory.glob(".*.writing"))
        taken = steps_taken(directory)
        found, _ = checkpoint.find_latest(directory)
        resumed_from = 0 if found is None else found.state["position"]["step"]
        lost.append(taken - resumed_from)
        # The record of a step and its checkpoint are written one after the other.
        assert -1 <= lost[-1] <= every, lost
    print(f"steps lost: {lost}; killed while writing a checkpoint: {in_writing} of {KILLS}")
    train(options)
    undisturbed = replace(options, directory=str(tmp_path / "undisturbed"))
    train(undisturbed)
    assert_identical(last(undisturbed.directory), last(options.directory))
    assert not list(directory.glob(".*.writing"))


def test_dead_process_ends_the_others_with_a_reason(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    began = time.monotonic()
    ended = run_processes([Options(directory=str(directory), die_at=5, die_rank=1)], processes=2)
    assert [e.code for e in ended] == [1, -signal.SIGKILL]
    assert re.match(r"error: lost contact with another process, whose own error says why \(.+\)\n$", ended[0].errors)
    assert time.monotonic() - began < 60
    assert last(directory)["position"]["step"] == 4


def test_hanging_process_is_given_up(tmp_path: Path) -> None:
    """A stopped process keeps its connections open: only the time tells."""
    hanging: dict[str, Any] = {"signal_at": 5, "signal_number": int(signal.SIGSTOP), "signal_rank": 1}
    options = Options(directory=str(tmp_path / "run"), collective_timeout=3, **hanging)
    waiting, stopped = start_processes([options], processes=2)
    try:
        ended = waiting.wait(60)
        assert stopped.process.is_alive()
    finally:
        stopped.process.kill()
    assert ended.code == 1
    assert re.match(r"error: lost contact with another process, whose own error says why \(.+\)\n$", ended.errors)
    assert last(tmp_path / "run")["position"]["step"] == 4


def torchrun(options: Options, *arguments: str) -> list[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return [*program, str(Path(tiny_training.__file__)), json.dumps(asdict(options))]


@pytest.mark.slow
def test_torchrun_brings_a_run_back(tmp_path: Path) -> None:
    """Without --resume: after a restart the run's own checkpoint is what counts."""
    undisturbed, died = Options(directory=str(tmp_path / "a"), resume="auto"), Options(directory=str(tmp_path / "b"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = torchrun(replace(died, die_at=6, die_rank=1), "--max-restarts", "1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [e.code for e in run_processes([undisturbed], processes=2)] == [0, 0]
    assert_identical(last(undisturbed.directory), last(died.directory))


@pytest.mark.slow
def test_signal_through_torchrun_twice(tmp_path: Path) -> None:
    """As a scheduler does it: to the whole process group, so that each process has it from two sides, and again."""
    directory = tmp_path / "run"
    options = Options(directory=str(directory), steps=100_000, delay=0.01, checkpoint_every=100_000)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            torchrun(options),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for_step(directory, 3, [])
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.01)
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(60) != 0
        finally:
            process.kill()
    text = (tmp_path / "log").read_text()
    assert "stopped by SIGTERM after step" in text
    assert last(directory)["position"]["step"] == steps_taken(directory)


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """The largest file that may be written is smaller than a checkpoint: writing fails as on a full disk."""
    directory = tmp_path / "run"
    options = Options(directory=str(directory), steps=4, ballast_mib=2)
    train(options)
    before = last(directory)
    size = (directory / checkpoint.LAST).stat().st_size
    more = replace(options, steps=8, resume="auto", file_limit=size // 2)
    ended = run_processes([more], processes=2)
    assert [e.code for e in ended] == [2, 2], ended
    assert "".join(e.errors for e in ended) == (
        f"error: {directory}: cannot write a checkpoint: File too large "
        "(checkpoint_last.pth, checkpoint_previous.pth, checkpoint_best.pth kept)\n"
    )
    assert_identical(before, last(directory))
    assert not list(directory.glob(".*.writing"))
    assert [e.code for e in run_processes([replace(more, file_limit=None)])] == [0]
    assert last(directory)["position"]["step"] == 8
