"""Run directories as trainings leave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def write_run() -> Callable[..., Path]:
    def write(
        directory: Path, config: dict[str, Any], aps: list[float], finished: bool = True, **metrics: float | None
    ) -> Path:
        """One epoch of 10 steps for each AP."""
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        lines: list[dict[str, Any]] = []
        for i, ap in enumerate(aps, start=1):
            left = 10.0 * (len(aps) - i) if finished else 99.0
            lines.append(
                {"kind": "train", "step": 10 * i, "epoch": i, "loss": 9.0 / i, "eta_seconds": left,
                 "seconds_per_step": 0.5}
            )  # fmt: skip
            lines.append(
                {"kind": "eval", "step": 10 * i, "epoch": float(i), "AP": ap, "AP50": ap + 20, "seconds": 3, **metrics}
            )
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return directory

    return write
