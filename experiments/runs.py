"""What a run has left in its directory, read without touching it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from engine.records import read_metrics
from engine.runs.run_directory import CONFIG, LOCK, METRICS

State = Literal["done", "running", "failed", "unfinished", "missing"]


class Run(NamedTuple):
    """A run directory as it stands."""

    directory: Path
    state: State
    """``running``: a process holds the directory at this moment; ``unfinished``: interrupted."""
    message: str
    """Why it failed; empty otherwise."""
    config: dict[str, Any]
    """Resolved; empty before the run has begun."""
    train: list[dict[str, Any]]
    """Records of training, by step."""
    evals: list[dict[str, Any]]
    """Records of evaluations, by step."""


def read_run(directory: Path, outcome_file: Path | None = None) -> Run:
    """Read a run directory; whatever is missing or half-written in it counts as absent.

    Args:
        directory: of the run; may not exist yet.
        outcome_file: where a sweep notes how the run last ended.
    """
    train, evals = read_metrics(directory / METRICS)
    config = _read_mapping(directory / CONFIG, yaml.safe_load)
    outcome = _read_mapping(outcome_file, json.loads) if outcome_file is not None else {}
    state: State
    if is_finished(config, train, evals):
        state = "done"
    elif is_running(directory):
        state = "running"
    elif outcome.get("exit_code", 0) not in (0, 130, 143) and not outcome.get("stopped"):
        state = "failed"
    else:
        state = "unfinished" if config or train else "missing"
    message = str(outcome.get("message") or f"exit code {outcome.get('exit_code')}") if state == "failed" else ""
    return Run(directory, state, message, config, train, evals)


def is_running(directory: Path) -> bool:
    """Whether another process holds the directory, wherever on this machine (or on a shared disk) it was started."""
    try:
        lock = os.open(directory / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared and given back at once: it is refused only while a run has its own.
        fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(lock)
    return False


def is_finished(config: Mapping[str, Any], train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> bool:
    """Tell whether the last step that the configuration asks for is logged and has been evaluated."""
    schedule = config.get("schedule") or {}
    if train and train[-1]["step"] == (config.get("trainer") or {}).get("stop_after"):
        return bool(evals) and evals[-1]["step"] == train[-1]["step"]
    unit, length = ("epoch", schedule.get("epochs")) if schedule.get("steps") is None else ("step", schedule["steps"])
    if length is None or not train or not evals:
        return False
    return train[-1].get(unit, 0) >= length and evals[-1]["step"] == train[-1]["step"]


def is_run(directory: Path) -> bool:
    """Whether a directory holds a run."""
    return (directory / CONFIG).is_file() or (directory / METRICS).is_file()


def find_runs(directory: Path) -> list[Path]:
    """Run directories in ``directory`` and one level below, or itself."""
    if is_run(directory):
        return [directory]
    return [path for path in sorted(directory.iterdir()) if path.is_dir() and is_run(path)]


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
