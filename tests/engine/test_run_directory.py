"""One directory, one run, one process."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_training
from test_survival import wait_for_step
from tiny_training import Options
from training_processes import run_processes, start_processes

from engine import distributed
from engine.runs import session
from engine.runs.run_directory import RunDirectory, forget_after


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    options = Options(directory=str(tmp_path / "run"), steps=2)
    tiny_training.train(options)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    (ended,) = run_processes([options])
    assert ended.code == 2
    assert ended.errors == (
        f"error: output_dir={tmp_path / 'run'} already holds a run (checkpoint_last.pth): "
        "continue it with --resume auto, or choose another output_dir\n"
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_checkpoint_elsewhere_does_not_open_an_occupied_directory(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny_training.train(Options(directory=str(tmp_path / name), steps=2))
    loaded = session.checkpoint.load(tmp_path / "a" / session.checkpoint.LAST)
    with pytest.raises(ValueError, match="already holds a run"):
        session.open_run(tmp_path / "b", str(loaded.path), loaded)
    for place in ("a", "c"):
        opened = session.open_run(tmp_path / place, str(loaded.path), loaded)
        assert opened.loaded is loaded
        assert opened.directory is not None
        opened.directory.close()


def test_a_run_that_goes_on_elsewhere_has_the_best_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its directory is a run of its own; where the best one is gone, the next evaluation counts as the best."""
    first = Options(directory=str(tmp_path / "a"), steps=12, eval_every_steps=3)
    best = tiny_training.train(first).best
    assert best is not None
    (tmp_path / "b").mkdir()
    loaded = session.checkpoint.load(tmp_path / "a" / session.checkpoint.LAST)
    trainer = tiny_training.build(replace(first, directory=str(tmp_path / "b")))
    trainer.load_state_dict(loaded)
    found = session.checkpoint.load(tmp_path / "b" / session.checkpoint.BEST).state
    assert found["position"]["step"] == best["step"]
    assert trainer.best == best
    (tmp_path / "c").mkdir()
    (tmp_path / "a" / session.checkpoint.BEST).unlink()
    loaded.state["best"]["step"] = 4  # of which there is no checkpoint
    trainer = tiny_training.build(replace(first, directory=str(tmp_path / "c")))
    trainer.load_state_dict(loaded)
    assert trainer.best is None
    assert "of step 4, is not beside it" in (tmp_path / "a" / "log.txt").read_text()
    assert not list((tmp_path / "c").iterdir())


def test_a_restart_goes_on_with_its_own_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun restarts also what was refused: the run of another launch must not be taken for its own."""
    options = Options(directory=str(tmp_path / "run"), steps=2)
    tiny_training.train(options)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with monkeypatch.context() as another:
        another.setattr(distributed, "launcher", lambda: "another torchrun")
        with pytest.raises(ValueError, match="already holds a run"):
            tiny_training.train(replace(options, steps=4))
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert tiny_training.train(replace(options, steps=4)).step == 4


def test_a_launcher_is_a_process_and_its_start() -> None:
    (here,) = {distributed.launcher() for _ in range(2)}
    assert f" {os.getppid()} " in here
    command = [sys.executable, "-c", "from engine import distributed; print(distributed.launcher())"]
    child = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert child.stdout.strip() != here


def test_directory_in_use_is_refused_and_free_after_a_kill(tmp_path: Path) -> None:
    options = Options(directory=str(tmp_path / "run"), steps=100_000, delay=0.01, resume="auto")
    (running,) = start_processes([options])
    wait_for_step(tmp_path / "run", 1, [running])
    (second,) = run_processes([options], processes=1)
    assert second.code == 2
    assert second.errors == (
        f"error: output_dir={tmp_path / 'run'} is in use by another run (process {running.process.pid}): "
        "choose another output_dir\n"
    )
    running.process.kill()
    running.process.join()
    RunDirectory(tmp_path / "run", resuming=True).close()


@pytest.mark.parametrize("kind", ["file", "under a file", "read-only"])
def test_unwritable_directory_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    path = {"file": tmp_path / "file", "under a file": tmp_path / "file/run", "read-only": tmp_path / "dir"}[kind]
    if kind == "read-only":
        if os.geteuid() == 0:
            path = Path("/proc/run")  # where even the superuser cannot write
        else:
            path.mkdir(mode=0o500)
    with pytest.raises(ValueError, match=f"output_dir={path} cannot be written: .+"):
        RunDirectory(path, resuming=False)


def test_fallback_to_the_previous_checkpoint_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run"
    tiny_training.train(Options(directory=str(directory), steps=8))
    last = directory / session.checkpoint.LAST
    last.write_bytes(last.read_bytes()[:1000])
    opened = session.open_run(directory, session.AUTO)
    assert opened.loaded is not None
    assert opened.directory is not None
    opened.directory.close()
    assert opened.loaded.path.name == session.checkpoint.PREVIOUS
    assert "checkpoint_last.pth: cannot be read as a checkpoint" in capsys.readouterr().err


def test_auto_starts_afresh_in_an_empty_directory(tmp_path: Path) -> None:
    opened = session.open_run(tmp_path / "new", session.AUTO)
    assert opened.loaded is None
    assert opened.directory is not None
    opened.directory.close()


def test_records_of_repeated_steps_are_forgotten(tmp_path: Path) -> None:
    lines = [json.dumps({"kind": "train", "step": step}) for step in (1, 2, 3, 4)]
    lines.insert(2, json.dumps({"kind": "eval", "step": 2}))
    for evaluated, expected in ((True, [1, 2, 2]), (False, [1, 2])):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tra')
        forget_after(tmp_path, 2, evaluated=evaluated)
        kept = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert kept == expected


def test_file_systems_without_locks_are_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    RunDirectory(tmp_path / "run", resuming=False).close()
    assert "no locks on this file system" in caplog.text
