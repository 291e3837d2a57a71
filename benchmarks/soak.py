"""Does a long training grow? Runs a command and watches memory, file handles and threads of all its processes.

    python -m benchmarks.soak --minutes 60 --every 15 -- python main.py --cfg configs/shapes_r18.yaml data.num_workers=1

Linux only: figures come from /proc. Memory is the proportional set size: pages that processes share count once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"


class Sample(NamedTuple):
    """All processes of the command at one moment."""

    seconds: float
    memory_mib: float
    handles: int
    threads: int
    processes: int


def family(pid: int) -> list[int]:
    """List a process and all that descend from it."""
    found, queue = [], [pid]
    while queue:
        current = queue.pop()
        found.append(current)
        for task in Path(f"/proc/{current}/task").glob("*"):
            try:
                queue.extend(int(child) for child in (task / "children").read_text().split())
            except OSError:  # ended meanwhile
                continue
    return found


def measure(pid: int, seconds: float) -> Sample:
    """Sum over the family of a process; processes that end meanwhile do not count."""
    memory, handles, threads, processes = 0.0, 0, 0, 0
    for member in family(pid):
        root = Path(f"/proc/{member}")
        try:
            rollup = (root / "smaps_rollup").read_text().splitlines()
            open_files, tasks = len(list((root / "fd").iterdir())), len(list((root / "task").iterdir()))
        except OSError:
            continue
        memory += next((int(line.split()[1]) / 1024 for line in rollup if line.startswith("Pss:")), 0.0)
        handles, threads, processes = handles + open_files, threads + tasks, processes + 1
    return Sample(seconds, memory, handles, threads, processes)


def slope(samples: Sequence[Sample], field: str) -> float:
    """Fit the growth an hour by least squares."""
    hours = [sample.seconds / 3600 for sample in samples]
    values = [float(getattr(sample, field)) for sample in samples]
    return statistics.linear_regression(hours, values).slope


def summarise(samples: Sequence[Sample], settle: float) -> dict[str, dict[str, float]]:
    """Find level and growth of each quantity once ``settle`` seconds have passed: the first and the last quarter hour's
    medians, the highest value, and the slope an hour."""
    settled = [sample for sample in samples if sample.seconds >= settle]
    if len(settled) < 4:
        raise SystemExit(f"error: only {len(settled)} samples after the first {settle:.0f} s: soak longer")
    quarter = max(len(settled) // 4, 1)
    summary = {}
    for field in ("memory_mib", "handles", "threads"):
        values = [float(getattr(sample, field)) for sample in settled]
        summary[field] = {
            "first_quarter": statistics.median(values[:quarter]),
            "last_quarter": statistics.median(values[-quarter:]),
            "highest": max(values),
            "slope_per_hour": slope(settled, field),
        }
    return summary


def soak(command: Sequence[str], minutes: float, every: float) -> tuple[list[Sample], int]:
    """Run ``command`` for at most ``minutes``, then stop it in order; the samples and its exit code."""
    began = time.monotonic()
    process = subprocess.Popen(command)
    samples = []
    try:
        while process.poll() is None and time.monotonic() - began < 60 * minutes:
            samples.append(measure(process.pid, time.monotonic() - began))
            try:
                process.wait(every)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:  # its last step takes too long; what was measured is not lost for that
            process.kill()
    return samples, process.wait()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="stop the command after so long (default 60)")
    parser.add_argument("--every", type=float, default=15, help="seconds between samples (default 15)")
    parser.add_argument("--settle", type=float, default=300, help="seconds that do not count for growth (default 300)")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json", help="where figures and samples go")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command to watch")
    arguments = parser.parse_args()
    command = [word for word in arguments.command if word != "--"]
    if not command:
        parser.error("say what to watch: -- python main.py --cfg …")
    if not Path("/proc/self/smaps_rollup").exists():
        raise SystemExit("error: this needs Linux's /proc")
    samples, code = soak(command, arguments.minutes, arguments.every)
    summary = summarise(samples, arguments.settle)
    report = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()} {platform.system()}",
        "exit_code": code,
        "minutes": samples[-1].seconds / 60,
        "settle_seconds": arguments.settle,
        "summary": summary,
        "fields": list(Sample._fields),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps([round(value, 1) for value in sample]) for sample in samples)
    arguments.out.write_text(json.dumps(report, indent=1)[:-2] + f',\n "samples": [\n{rows}\n ]\n}}\n')
    for name, figures in summary.items():
        print(f"{name:12s}" + "".join(f"  {key} {value:10.1f}" for key, value in figures.items()))
    print(f"exit code {code} after {report['minutes']:.1f} minutes; written to {arguments.out}")


if __name__ == "__main__":
    main()
