"""Times multi-scale deformable attention at DINO's sizes, for every backend and peer that works on this machine.

    python -m benchmarks.ms_deform_attn [--device cuda] [--dtype bfloat16] [--peer package.module:function]

All implementations take turns in one run; a time is the best of the rounds. On a GPU it is that of a replayed CUDA
graph of several calls, on a CPU that of the second of two calls: nobody pays for what another has left in the caches.
On a machine that others use too, --busy takes processor time, of one thread. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks import frame
from benchmarks import ms_deform_attn_cases as sizes
from benchmarks.ms_deform_attn_cases import CASES, CHANNELS, HEADS, POINTS, Inputs, make_inputs
from benchmarks.ms_deform_attn_peers import Deterministic, Run, implementations, ours, peers
from tools import console

GRAPH_CALLS = 10
L1_BYTES_PER_CLOCK = 128
"""Of one multiprocessor, every architecture since Volta."""


@dataclass
class Row:
    """One line of the table."""

    case: str
    form: str
    implementation: str
    dtype: str
    forward_ms: float
    both_ms: float
    forward_ratio: float | None
    both_ratio: float | None
    tap_gb_per_s: float
    floor_share: float | None
    output_error: float
    gradient_error: float


def step(run: Run, form: str, x: Inputs, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward and backward; deterministic if ``run`` is."""
    if isinstance(run, Deterministic):
        with run:
            return step(run.run, form, x, grad)
    output = run(x)
    leaves = (x.value, x.offsets, x.logits) if form == "fused" else (x.value, x.locations, x.weights)
    grads = torch.autograd.grad(output, leaves, grad)
    # Detached, lest it keep alive nodes of this stream, on which a captured graph would then have to wait.
    return output.detach(), grads


def prepare(call: Callable[[], object], device: str, clock: Callable[[], float]) -> Callable[[], float]:
    """A function that runs ``call`` and returns the milliseconds of one run; ``clock`` gives seconds on the host."""
    call()
    if device != "cuda":

        def on_host() -> float:
            call()
            start = clock()
            call()
            return 1e3 * (clock() - start)

        return on_host
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()

    def on_gpu() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / GRAPH_CALLS

    return on_gpu


def floor_ms(Q: int, itemsize: int) -> float | None:
    """The time in which the L1 caches of the GPU can deliver all taps; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    from cuda.bindings import driver

    device = torch.cuda.current_device()
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE
    error, kilohertz = driver.cuDeviceGetAttribute(attribute, device)
    if int(error):
        return None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return tap_bytes(Q, itemsize) / (processors * L1_BYTES_PER_CLOCK * kilohertz)


def tap_bytes(Q: int, itemsize: int) -> int:
    """What all taps of all queries read, were nothing shared."""
    return Q * HEADS * len(sizes.SHAPES) * POINTS * 4 * CHANNELS * itemsize


def relative_error(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Largest quotient of the root mean square error and the root mean square, over some tensors."""
    return max(
        float((a.detach().cpu().double() - b.detach()).square().mean().sqrt() / b.detach().square().mean().sqrt())
        for a, b in zip(actual, exact, strict=True)
    )


def measure(case: str, form: str, dtype: torch.dtype, arguments: argparse.Namespace, failures: list[str]) -> list[Row]:
    """All implementations of one form at one size; those that fail are printed, and added to ``failures``."""
    device, now = arguments.device, time.process_time if arguments.busy else time.perf_counter
    inputs = make_inputs(case)
    x = inputs.to(dtype, device)
    grad = torch.randn(1, x.reference.shape[1], HEADS * CHANNELS, generator=torch.Generator().manual_seed(1))
    exact = step(
        ours(form, "reference"), form, inputs._replace(value=x.value.cpu()).to(torch.float64, "cpu"), grad.double()
    )
    grad = grad.to(device, dtype)
    errors: dict[str, tuple[float, float]] = {}
    clocks: dict[tuple[str, bool], Callable[[], float]] = {}
    best: dict[tuple[str, bool], float] = {}
    for name, (run, own) in implementations(form, x, arguments).items():
        try:
            output, grads = step(run, form, own, grad)
            error = relative_error((output,), (exact[0],)), relative_error(grads[:1], exact[1][:1])
            with torch.no_grad():
                forward = prepare(functools.partial(run, own), device, now)
            both = prepare(functools.partial(step, run, form, own, grad), device, now)
        except Exception as failure:
            # It may not take this dtype, or there is no memory for it; the others are still to be measured.
            failures.append(f"{case}, {form}, {name}, {dtype}: {(str(failure).splitlines() or [repr(failure)])[0]}")
            print("left out:", failures[-1])
        else:
            errors[name], clocks[name, False], clocks[name, True] = error, forward, both
    for _ in range(arguments.rounds):
        for key, clock in clocks.items():
            with torch.set_grad_enabled(key[1]):
                best[key] = min(best.get(key, float("inf")), clock())
    Q = x.reference.shape[1]
    rows = []
    for name in errors:
        forward_ms, both_ms = best[name, False], best[name, True]
        floor = floor_ms(Q, dtype.itemsize) if device == "cuda" else None
        rows.append(
            Row(
                case,
                form,
                name,
                str(dtype).removeprefix("torch."),
                forward_ms,
                both_ms,
                best["reference", False] / forward_ms if "reference" in errors else None,
                best["reference", True] / both_ms if "reference" in errors else None,
                tap_bytes(Q, dtype.itemsize) / forward_ms / 1e6,
                None if floor is None else floor / forward_ms,
                *errors[name],
            )
        )
    return rows


def show(row: Row) -> str:
    """One line of the table."""
    floor = "     -" if row.floor_share is None else f"{row.floor_share:6.0%}"
    ratios = ["      -" if x is None else f"{x:6.1f}x" for x in (row.forward_ratio, row.both_ratio)]
    columns = (
        f"{row.case:17} {row.form:8} {row.implementation:10} {row.dtype:9}",
        f"{row.forward_ms:9.3f} {ratios[0]} {row.both_ms:9.3f} {ratios[1]}",
        f"{row.tap_gb_per_s:8.0f} {floor} {row.output_error:9.1e} {row.gradient_error:9.1e}",
    )
    return " ".join(columns)


@console.command
def main() -> int:
    """The command line."""
    parser = frame.parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peer", action="append", default=[], help="module:function of the unfused form's signature")
    parser.add_argument("--busy", action="store_true", help="on a CPU, processor time of one thread")
    parser.add_argument("--no-save", action="store_true", help="only print")
    arguments = parser.parse_args()
    peers(arguments.peer, arguments.device)  # lest one that does not exist be missed after an hour
    if arguments.busy:
        torch.set_num_threads(1)
    about = {**frame.machine(arguments.device), "clock": "processor" if arguments.busy else "wall"}
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    print("x: faster than the reference; GB/s of taps; floor: share of the L1 floor; errors of output and grad_value")
    print(
        f"{'case':17} {'form':8} {'who':10} {'dtype':9} {'fwd ms':>9} {'':7} {'both ms':>9} {'':7} "
        f"{'GB/s':>8} {'floor':>6} {'errors':>9}"
    )
    rows: list[Row] = []
    failures: list[str] = []
    own = frame.results_name("ms_deform_attn", about, "-busy" if arguments.busy else "")
    name_of_results = None if arguments.no_save else arguments.save or own
    for case in CASES:
        for form in ("fused", "unfused"):
            for name in arguments.dtype:
                found = measure(case, form, getattr(torch, name), arguments, failures)
                print(*map(show, found), sep="\n", flush=True)
                rows += found
                frame.save(name_of_results, {**about, "left_out": failures, "rows": [asdict(row) for row in rows]})
    if name_of_results:
        print(f"saved {name_of_results}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
