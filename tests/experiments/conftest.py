"""Run directories as trainings leave them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

STEPS = 60


@pytest.fixture
def write_run() -> Callable[..., Path]:
    def write(
        directory: Path, config: dict[str, Any], aps: list[float], finished: bool = True, **metrics: float | None
    ) -> Path:
        """One epoch for each AP, and one more that is still to come where the run is not finished."""
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(yaml.safe_dump({**config, "schedule": {"steps": STEPS}}))
        lines: list[dict[str, Any]] = []
        for i, ap in enumerate(aps, start=1):
            step = STEPS * i // (len(aps) if finished else len(aps) + 1)
            lines.append({"kind": "train", "step": step, "epoch": float(i), "loss": 9.0 / i})
            lines.append({"kind": "eval", "step": step, "epoch": float(i), "AP": ap, "AP50": ap + 20, **metrics})
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return directory

    return write


@pytest.fixture
def hold() -> Callable[[Path], contextlib.AbstractContextManager[None]]:
    """Another process that has locked a file."""

    @contextlib.contextmanager
    def holding(file: Path) -> Iterator[None]:
        code = (
            f"import fcntl, sys; f = open({str(file)!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
            "print('locked', flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            yield
            other.communicate()

    return holding
