"""What is run where there is a GPU: in order, within its time, with options that exist, and whatever else fails."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/bin/sh
echo "ran $*"
case "$*" in
    *get_device_name*) echo "nvidia h100" ;;
    *pytest*) exit 1 ;;
esac
"""


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def commands(output: str) -> list[tuple[int, str]]:
    return [(int(limit), command) for limit, command in re.findall(r"^== (\d+) s: (.*)", output, re.MULTILINE)]


def test_the_dry_run_has_all_parts_in_order_and_in_time(tmp_path: Path) -> None:
    done = run_script("python", DRY_RUN="1", PEER="peers:public", PUBLIC_STEP="python step.py", RESULTS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = commands(done.stdout)
    order = [
        "pytest",
        "memcheck",
        "racecheck",
        "benchmarks.ms_deform_attn",
        "ncu",
        "tune",
        "benchmarks.step",
        "step.py",
    ]
    places = [next(i for i, (_, command) in enumerate(found) if word in command) for word in order]
    assert places == sorted(places)
    starts = [0, *itertools.accumulate(limit for limit, _ in found)]
    assert starts[-1] <= 14 * 60
    minutes = [f"{starts[i] // 60}:{starts[i] % 60:02}" for i in (*places, -1)]
    table = (ROOT / "docs" / "op.md").read_text().split("| from | part |")[1]
    parts = re.findall(r"^\| (\d+:\d\d) \| `(\w+)`", table, re.MULTILINE)
    del minutes[order.index("racecheck")]  # in one row with memcheck
    assert [start for start, _ in parts] == minutes[:-2]
    assert f":-{' '.join(name for _, name in parts)}}}" in (ROOT / "benchmarks" / "gpu.sh").read_text()
    assert f"from {minutes[-2]} a step of the public DINO; over at {minutes[-1]}" in table
    assert "--peer peers:public" in found[places[3]][1]
    assert not list(tmp_path.iterdir())


def test_every_option_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_script("python", DRY_RUN="1", PEER="peers:public", RESULTS=str(tmp_path))
    checked = 0
    for _, command in commands(done.stdout):
        if module := re.search(r"-m (benchmarks\.\w+)(.*)", command):
            monkeypatch.setattr(sys, "argv", [module[1], "--help"])
            with pytest.raises(SystemExit):
                importlib.import_module(module[1]).main()
            known = capsys.readouterr().out
            for option in re.findall(r"--[\w-]+", module[2]):
                assert option in known, command
                checked += 1
    assert checked >= 10


def test_a_part_that_fails_keeps_no_other_from_running(tmp_path: Path) -> None:
    python, results = tmp_path / "python", tmp_path / "results"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    done = run_script(str(python), "tests", "benchmark", "models", RESULTS=str(results), PATH=os.environ["PATH"])
    assert done.returncode == 1
    assert "failed: gpu-tests" in done.stdout
    kept = {path.name.split("-nvidia")[0].split("-ran")[0] for path in results.iterdir()}
    assert kept == {
        "gpu-tests",
        "gpu-benchmark",
        "gpu-inference-float32",
        "gpu-inference-bfloat16",
        "gpu-step-float32",
        "gpu-step-bfloat16",
    }
    assert "no such part: all" in run_script("python", "all", DRY_RUN="1", RESULTS=str(results)).stderr
