"""Matching and criterion, forward and backward, against the straightforward per-layer implementation of the tests.

    python -m benchmarks.criterion [--threads 2] [--repeats 10] [--save NAME]

Prints milliseconds and ratios at L = 6 + encoder, B = 2, Q = 900, C = 80 for several numbers of targets G and
candidates k, the share of matching, and how time and memory grow with G where images are crowded.
"""

from __future__ import annotations

import resource

import torch

from benchmarks import frame
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

    times = frame.times_in_turn(
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
        **milliseconds(times),
        "ratio": times["oracle"].elapsed / times["ours"].elapsed,
        "processor_ratio": times["oracle"].processor / times["ours"].processor,
    }


def milliseconds(times: dict[str, frame.Times]) -> dict[str, float]:
    return {f"{name}_ms": 1e3 * t.elapsed for name, t in times.items()} | {
        f"{name}_processor_ms": 1e3 * t.processor for name, t in times.items()
    }


def crowded(images: int, targets: int, candidates: int, repeats: int) -> dict[str, float]:
    outputs, ground_truth = case(images, targets)
    leaves = [leaf for group in outputs.groups.values() for leaf in group.prediction]
    config = Criterion(classification=IABCE(), matcher=Mixed(candidates=candidates), prime_sample_tau=TAU)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = {"ours": lambda: torch.autograd.grad(config(outputs, ground_truth).total, leaves)}
    times = milliseconds(frame.times_in_turn(run, max(2, repeats // 4)))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"images": images, "targets": targets, "candidates": candidates, **times, "peak_growth_mib": grown}


def main() -> None:
    """Run the command."""
    parser = frame.parser(__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--repeats", type=int, default=12, help="timed calls (default 12)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(f"L = 6 + encoder, Q = 900, C = 80, IA-BCE, tau {TAU}, {arguments.threads} threads; forward and backward")
    compared = [show(compare(targets, k, arguments.repeats)) for targets, k in COMPARED]
    print("crowded images")
    large = [show(crowded(images, targets, k, arguments.repeats)) for images, targets, k in CROWDED]
    frame.save(arguments.save, {**frame.machine(), "compared": compared, "crowded": large})


def show(row: dict[str, float]) -> dict[str, float]:
    """Print one measurement as soon as it is there, and return it."""
    print(*(f"{name} {value}" if isinstance(value, int) else f"{name} {value:.1f}" for name, value in row.items()),
          sep="  ", flush=True)  # fmt: skip
    return row


if __name__ == "__main__":
    main()
