"""What the benchmarks share: their parser, the machine they run on, calls timed in turn, results as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ops.ms_deform_attn import describe_backend

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser whose help is the module's docstring as it is written, and which knows ``--save NAME``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    return made


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe what the numbers depend on."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "backend": describe_backend(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(name: str | None, content: Mapping[str, Any]) -> None:
    """Write the results of that name, if there is one; as often as there are new ones, lest an early end take all."""
    if name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def results_name(benchmark: str, about: Mapping[str, Any], mode: str = "") -> str:
    """Name the results of a benchmark by machine and date."""
    device = "".join(c if c.isalnum() else " " for c in str(about["device"]))
    return f"{benchmark}-{'-'.join(device.split()[:3]).lower()}{mode}-{about['date']}"


class Times(NamedTuple):
    """The shortest times of a call, in seconds."""

    elapsed: float
    processor: float
    """Of all threads: on a machine that does other work, only its ratios mean anything."""


def times_in_turn(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Time each call, in turn, so that all share what else the machine does; a first round warms up."""
    measured: dict[str, list[Times]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start, start_processor = time.perf_counter(), time.process_time()
            run()
            measured[name].append(Times(time.perf_counter() - start, time.process_time() - start_processor))
    return {name: Times(*map(min, zip(*times[1:], strict=True))) for name, times in measured.items()}
