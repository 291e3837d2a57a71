"""The soak sees what grows, and stops what it watches in order."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import Sample, summarise

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")

LEAK = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; kept = bytearray(b'x') * 2**26; time.sleep(60)"])
def stop(*_):
    child.kill()
    sys.exit(7)
signal.signal(signal.SIGTERM, stop)
kept = []
while True:
    kept.append((open(os.devnull), bytearray(b"x") * 2**20))
    time.sleep(0.05)
"""


def test_growth_and_level() -> None:
    samples = [Sample(60.0 * i, 100 + i, 40, 3 + (i == 5), 1) for i in range(61)]
    summary = summarise(samples, settle=300)
    assert summary["memory_mib"]["slope_per_hour"] == pytest.approx(60)
    assert (summary["memory_mib"]["first_quarter"], summary["memory_mib"]["last_quarter"]) == (111.5, 153.5)
    assert summary["handles"] == {"first_quarter": 40, "last_quarter": 40, "highest": 40, "slope_per_hour": 0}
    assert summary["threads"]["highest"] == 4
    with pytest.raises(SystemExit, match="soak longer"):
        summarise(samples, settle=3500)


def test_a_real_leak_shows_with_all_processes(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    options = ["--minutes", "0.06", "--every", "0.3", "--settle", "1", "--out", str(out)]
    watch = [sys.executable, "-m", "benchmarks.soak", *options, "--", sys.executable, "-c", LEAK]
    done = subprocess.run(watch, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["exit_code"] == 7, "stopped by the signal that asks for an orderly end"
    last = dict(zip(report["fields"], report["samples"][-1], strict=True))
    assert last["processes"] == 2
    assert report["summary"]["memory_mib"]["highest"] > 64, "the child's memory counts"
    assert report["summary"]["memory_mib"]["slope_per_hour"] > 1000
    assert report["summary"]["handles"]["last_quarter"] > report["summary"]["handles"]["first_quarter"] + 5


def test_nothing_to_watch_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.soak"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "say what to watch" in done.stderr
