"""Matching and criterion, forward and backward, against the straightforward per-layer implementation of the tests.

    python -m benchmarks.criterion [--threads 2] [--repeats 10] [--output results.json]

Prints milliseconds and ratios at L = 6 + encoder, B = 2, Q = 900, C = 80 for several numbers of targets G and
candidates k, the share of matching, and how time and memory grow with G where images are crowded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from losses import IABCE, Criterion
from matchers import Mixed, match_groups
from structures import DetectorOutputs, Targets
from tests.losses import criterion_oracle
from tests.losses.criterion_cases import make_outputs

TAU = 1.5
COMPARED = ((7, 1), (7, 2), (7, 4), (30, 2), (100, 1), (100, 2), (100, 4))
"""(targets an image, candidates) at two images."""
CROWDED = ((1, 1000, 1), (8, 300, 1), (8, 300, 2), (8, 300, 3))
"""(images, targets an image, candidates), measured without the oracle."""


def milliseconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Shortest elapsed and processor time of each call; called in turn, so that all share what disturbs them.

    Processor time counts all threads. On a machine that does other work, only its ratios mean anything.
    """
    elapsed: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start, start_processor = time.perf_counter(), time.process_time()
            run()
            if repeat:  # the first warms up
                elapsed[name].append((time.perf_counter() - start) * 1e3)
                processor[name].append((time.process_time() - start_processor) * 1e3)
    return {f"{name}_ms": min(times) for name, times in elapsed.items()} | {
        f"{name}_processor_ms": min(times) for name, times in processor.items()
    }


def case(images: int, targets: int) -> tuple[DetectorOutputs, Targets]:
    """A published-size output, in the middle of training: two queries of each target lie near it, others anywhere."""
    outputs, ground_truth = make_outputs(
        0, (targets,) * images, num_layers=6, num_queries=900, num_classes=80, denoising=False
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for image, (labels, boxes) in enumerate(ground_truth.split()):
            near = torch.randperm(900, generator=generator)[: 2 * targets]
            owner = torch.arange(len(near)) % targets
            for prediction in (group.prediction for group in outputs.groups.values()):
                noise = 0.02 * torch.randn(*prediction.boxes.shape[:-3], len(near), 4, generator=generator)
                prediction.boxes[..., image, near, :] = (boxes[owner] + noise).clamp(0.01, 0.99)
                prediction.logits[..., image, near, labels[owner]] += 3
    return outputs, ground_truth


def compare(targets: int, candidates: int, repeats: int) -> dict[str, float]:
    outputs, ground_truth = case(2, targets)
    leaves = [leaf for group in outputs.groups.values() for leaf in group.prediction]
    matcher = Mixed(candidates=candidates)
    config = Criterion(classification=IABCE(), matcher=matcher, prime_sample_tau=TAU)
    candidates_of = matcher.candidates_by_layer({"encoder": 1, "decoder": 6})
    layers = [k for group in candidates_of.values() for k in group]
    matchers = dict.fromkeys(outputs.groups, matcher)

    def ours() -> None:
        torch.autograd.grad(config(outputs, ground_truth).total, leaves)

    def oracle() -> None:
        total, _ = criterion_oracle.criterion(outputs, ground_truth, "ia_bce", layers, TAU)
        torch.autograd.grad(total, leaves)

    times = milliseconds(
        {
            "ours": ours,
            "matching": lambda: match_groups(outputs.groups, matchers, candidates_of, ground_truth),
            "oracle": oracle,
        },
        repeats,
    )
    return {
        "targets": targets,
        "candidates": candidates,
        **times,
        "ratio": times["oracle_ms"] / times["ours_ms"],
        "processor_ratio": times["oracle_processor_ms"] / times["ours_processor_ms"],
    }


def crowded(images: int, targets: int, candidates: int, repeats: int) -> dict[str, float]:
    outputs, ground_truth = case(images, targets)
    leaves = [leaf for group in outputs.groups.values() for leaf in group.prediction]
    config = Criterion(classification=IABCE(), matcher=Mixed(candidates=candidates), prime_sample_tau=TAU)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = milliseconds(
        {"ours": lambda: torch.autograd.grad(config(outputs, ground_truth).total, leaves)}, max(2, repeats // 4)
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"images": images, "targets": targets, "candidates": candidates, **times, "peak_growth_mib": grown}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--repeats", type=int, default=12, help="timed calls (default 12)")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON, with device and date")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(f"L = 6 + encoder, Q = 900, C = 80, IA-BCE, tau {TAU}, {arguments.threads} threads; forward and backward")
    compared = [show(compare(targets, k, arguments.repeats)) for targets, k in COMPARED]
    print("crowded images")
    large = [show(crowded(images, targets, k, arguments.repeats)) for images, targets, k in CROWDED]
    if arguments.output:
        device = f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}"
        report = {"benchmark": "criterion", "device": device, "date": datetime.date.today().isoformat(),
                  "compared": compared, "crowded": large}  # fmt: skip
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def show(row: dict[str, float]) -> dict[str, float]:
    """Print one measurement as soon as it is there, and return it."""
    print(*(f"{name} {value}" if isinstance(value, int) else f"{name} {value:.1f}" for name, value in row.items()),
          sep="  ", flush=True)  # fmt: skip
    return row


if __name__ == "__main__":
    main()
