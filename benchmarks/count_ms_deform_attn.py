"""Counts what the CUDA kernels ask of a multiprocessor at the encoder's size: no GPU is needed, and nothing is timed.

    python -m benchmarks.count_ms_deform_attn [--architecture 90] [--blocks 128] [--dtype float32 bfloat16]
    python -m benchmarks.count_ms_deform_attn --peer module:function    # and others' kernels

Triton's kernels of ``ms_deform_attn_peers`` are counted beside them where they are installed. A peer's function takes
the architecture and the number of blocks, and yields of each of its kernels a name, the ``ms_deform_attn_cases.Inputs``
it was given, and what :func:`count_launch` returned.

Some blocks of a launch, evenly spread over the grid, are run by the tests' executor of PTX. Counted are

- instructions of warps: those of the PTX as executed, times what the assembler makes of each source line (SASS
  instructions to PTX instructions, by the line tables of both; nvdisasm comes with Triton): an estimate;
- wavefronts: passes of the load/store unit, each 32 banks of shared memory or one 128-byte line of global memory;
  accesses of 16 bytes are made by a quarter of a warp at a time, those of 8 by half of one;
  exchanges between lanes (shuffles and matches) are counted on their own;
- bytes from L2 of a block's loads, with its share of the L1 cache and the least recently used sector leaving first, and
  bytes of reductions, which go to L2.

Cycles are those of one multiprocessor if nothing but the count limited it: four instructions, one wavefront and
``L2_BYTES`` a cycle. The floor of load and store reads every row of a tap once; the backward's also adds it once.
"""

from __future__ import annotations

import collections
import ctypes
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import frame
from benchmarks import ms_deform_attn_cases as sizes
from benchmarks.ms_deform_attn_peers import Run, triton_functions, unfused
from benchmarks.sass import instructions_executed
from benchmarks.triton_launches import Launch, launches
from ops.ms_deform_attn import cuda
from ops.ms_deform_attn.arguments import Arguments
from ops.ms_deform_attn.cuda_compile import Compiled, compile_kernel
from ops.ms_deform_attn.cuda_plan import Plan
from tools import console

ROOT = Path(__file__).parents[1]
L2_BYTES = 24
"""A cycle and multiprocessor: 5.5 TB/s of 132 at 1.755 GHz, an H100."""
CARVE_OUTS = (0, 8, 16, 32, 64, 100, 132, 164, 196, 228)
"""KiB of an H100's 256 that can be shared memory; the rest is L1 cache."""
SECTOR = 32


def executor(module: str) -> Any:
    """A module of the tests' executor."""
    folder = str(ROOT / "tests" / "ops")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(module)


def wavefronts(space: str, threads: Any, addresses: Any, size: int) -> int:
    """Passes that one instruction of all its warps needs."""
    group = threads // (32 * 4 // max(size, 4))
    if space == "global":
        return len(np.unique(group * (1 << 42) + (addresses >> np.uint64(7)).astype(np.int64)))
    words = (addresses.astype(np.int64) // 4)[:, None] + np.arange(max(size // 4, 1))
    distinct = np.unique(group[:, None] * (1 << 24) + words)
    places, counts = np.unique(distinct // (1 << 24) * 32 + distinct % 32, return_counts=True)
    return int(np.maximum.reduceat(counts, np.flatnonzero(np.diff(places // 32, prepend=-1))).sum())


class Counter:
    """Sees all accesses of some blocks."""

    def __init__(self, threads: int, regions: Sequence[Any]) -> None:
        self.threads = threads
        self.starts = np.array(sorted(region.start for region in regions), np.uint64)
        self.waves: collections.Counter[str] = collections.Counter()
        self.reduced = 0
        self.sectors: list[tuple[Any, Any]] = []
        """Blocks and sectors that were loaded, in order."""

    def __call__(self, access: Any) -> None:
        """Of one instruction."""
        kind = access.space if not access.write or access.space == "shared" else "reductions and stores"
        addresses = access.addresses
        if access.space == "global":  # as if allocated on a GPU, which begins every tensor at a multiple of 512
            tensor = int(np.searchsorted(self.starts, addresses[0], "right")) - 1
            addresses = addresses - self.starts[tensor] + np.uint64(tensor << 36)
        self.waves[kind] += wavefronts(access.space, access.threads, addresses, access.size)
        if kind == "global":
            block = access.threads // self.threads
            sectors = np.unique(block * (1 << 48) + (addresses // np.uint64(SECTOR)).astype(np.int64))
            self.sectors.append((sectors >> 48, sectors & (1 << 48) - 1))
        elif kind == "reductions and stores":
            self.reduced += access.size * len(access.threads)

    def bytes_from_l2(self, l1_bytes: float) -> int:
        """With so much cache for each block."""
        caches: dict[int, collections.OrderedDict[int, None]] = collections.defaultdict(collections.OrderedDict)
        missed = 0
        for blocks, sectors in self.sectors:
            for block, sector in zip(blocks.tolist(), sectors.tolist(), strict=True):
                cache = caches[block]
                if sector in cache:
                    cache.move_to_end(sector)
                    continue
                missed += 1
                cache[sector] = None
                if len(cache) > l1_bytes // SECTOR:
                    cache.popitem(last=False)
        return missed * SECTOR


def resident(threads: int, shared_bytes: int, registers: int) -> tuple[int, float]:
    """Blocks on a multiprocessor of an H100, and bytes of L1 for each."""
    memory = shared_bytes + 1024
    blocks = min(2048 // threads, 65536 // (-(-registers // 8) * 8 * threads), 228 * 1024 // memory, 32)
    carve_out = next(kib for kib in CARVE_OUTS if kib * 1024 >= blocks * memory)
    return blocks, (256 - carve_out) * 1024 / blocks


def count(plan: Plan, problem: Any, blocks: int, architecture: int, sampled: int) -> dict[str, Any]:
    """The counts of one launch of this project's kernels."""
    compiled = compile_kernel(plan, architecture, ["--generate-line-info"])
    parameter = ctypes.string_at(ctypes.addressof(problem), ctypes.sizeof(problem))
    regions = executor("ptx_launch").regions(plan, problem, blocks)
    return count_launch(compiled, plan.threads, plan.shared_bytes, parameter, regions, (blocks,), sampled)


def count_launch(
    compiled: Compiled,
    threads: int,
    shared_bytes: int,
    parameter: bytes,
    regions: Sequence[Any],
    grid: Sequence[int],
    sampled: int,
) -> dict[str, Any]:
    """The counts of one launch of any kernel, scaled up from some of its blocks."""
    blocks = int(np.prod(grid))
    binary, ptx, report = compiled
    kernel = executor("ptx_kernel").Kernel(ptx)
    ids = np.unique(((np.arange(sampled) + 0.5) * blocks / sampled).astype(int))
    counter = Counter(threads, regions)
    shared = max(shared_bytes, kernel.static_shared, 16)
    machine = executor("ptx_machine").Machine(kernel, threads, ids, shared, parameter, regions, counter, grid)
    machine.run()
    scale = blocks / len(ids)
    executed = machine.executed()
    registers = int((re.search(r"Used (\d+) registers", report) or [0, 0])[1])
    instructions = [i for segment in kernel.segments for i in segment.instructions]
    together, l1 = resident(threads, shared, registers)
    return {
        "registers": registers,
        "spilled": int((re.search(r"(\d+) bytes spill stores", report) or [0, 0])[1]),
        "shared bytes": shared,
        "blocks": together,
        "l1 KiB": round(l1 * together / 1024),
        "instructions": scale * instructions_executed(kernel, executed, binary, ptx),
        "ptx": scale * sum(executed.values()),
        "exchanges": scale * sum(executed[i.number] for i in instructions if i.name.startswith(("shfl", "match"))),
        **{f"wavefronts, {kind}": scale * number for kind, number in counter.waves.items()},
        "wavefronts": scale * sum(counter.waves.values()),
        "l2 bytes": scale * (counter.bytes_from_l2(l1) + counter.reduced),
    }


def cycles(counts: dict[str, Any], multiprocessors: int = 132) -> dict[str, float]:
    """Of a multiprocessor, were each count alone what limits."""
    limits = {
        "issue": counts["instructions"] / 4,
        "wavefronts": counts["wavefronts"],
        "l2": counts["l2 bytes"] / L2_BYTES,
    }
    return {name: value / multiprocessors for name, value in limits.items()}


def floor_wavefronts(x: sizes.Inputs, backward: bool) -> float:
    """Rows of existing taps, read once, for the backward added once: each a pass, for no two lie beside each other."""
    pixels = (x.locations.double() * torch.tensor([(w, h) for h, w in sizes.SHAPES])[:, None] - 0.5).floor()
    limits = torch.tensor([(w, h) for h, w in sizes.SHAPES])[:, None]
    taps = sum(
        int(((pixels + torch.tensor(tap) >= 0) & (pixels + torch.tensor(tap) < limits)).all(-1).sum())
        for tap in ((0, 0), (1, 0), (0, 1), (1, 1))
    )
    return taps * (1 + backward)


def about(case: str, kernel: str, x: sizes.Inputs, counts: dict[str, Any]) -> dict[str, Any]:
    """The counts, the cycles that follow from them, and the floor."""
    limits, floor = cycles(counts), floor_wavefronts(x, kernel.endswith("backward")) / 132
    dtype = str(x.value.dtype).removeprefix("torch.")
    derived = {"cycles": limits, "floor cycles": floor, "times the floor": max(limits.values()) / floor}
    return {"case": case, "kernel": kernel, "dtype": dtype, **counts, **derived}


def measure(case: str, dtype: torch.dtype, architecture: int, sampled: int) -> list[dict[str, Any]]:
    """Forward and backward at one size."""
    x = sizes.make_inputs(case)
    x = x._replace(value=x.value.to(dtype))
    flat = [side for shape in sizes.SHAPES for side in shape]
    arguments = Arguments(x.value, flat, x.valid_sizes, x.reference, x.offsets, x.logits)
    rows: list[dict[str, Any]] = []

    def launch(plan: Plan, problem: Any, blocks: int, device: torch.device) -> None:
        name = Path(plan.source).stem
        rows.append(about(case, name, x, count(plan, problem, blocks, architecture, sampled)))

    cuda.launch, before = launch, cuda.launch
    cuda.shared_limit, limit = lambda device: 227 * 1024, cuda.shared_limit  # type: ignore[assignment]
    try:
        output = cuda.forward(arguments)
        cuda.backward(torch.randn(output.shape).to(dtype), arguments, False)
    finally:
        cuda.launch, cuda.shared_limit = before, limit
    return rows


def measure_triton(name: str, run: Run, dtype: torch.dtype, architecture: int, sampled: int) -> list[dict[str, Any]]:
    """Forward and backward of a peer at the encoder's size, as Triton compiles them."""
    x = sizes.make_inputs("encoder, grid").to(dtype, "cpu")
    x = x._replace(weights=x.weights.detach().to(dtype).requires_grad_())
    rows: list[dict[str, Any]] = []

    def handle(launch: Launch) -> None:
        regions = [executor("ptx_machine").Region(t.data_ptr(), t.nbytes, True) for t in launch.tensors]
        counts = count_launch(
            launch.compiled, launch.threads, launch.shared_bytes, launch.parameter, regions, launch.grid, sampled
        )
        rows.append(about("encoder, grid", f"{name}, {'backward' if rows else 'forward'}", x, counts))

    with launches(architecture, handle):
        output = run(x)
        torch.autograd.grad(output, (x.value, x.locations, x.weights), torch.randn_like(output))
    return rows


def show(row: dict[str, Any]) -> str:
    """Some lines about a kernel."""
    waves = ", ".join(f"{k.split(', ')[1]} {v / 1e6:.2f}" for k, v in row.items() if k.startswith("wavefronts, "))
    limits = ", ".join(f"{name} {value:,.0f}" for name, value in row["cycles"].items())
    return (
        f"{row['case']}, {row['kernel']}, {row['dtype']}: {row['registers']} registers, {row['spilled']} spilled, "
        f"{row['shared bytes']} shared, {row['blocks']} blocks, L1 {row['l1 KiB']} KiB\n"
        f"    {row['instructions'] / 1e6:.2f} M instructions ({row['ptx'] / 1e6:.2f} M of PTX); "
        f"{row['wavefronts'] / 1e6:.2f} M wavefronts ({waves}) and {row['exchanges'] / 1e6:.2f} M exchanges; "
        f"{row['l2 bytes'] / 1e6:.0f} MB of L2\n"
        f"    cycles: {limits}; {row['times the floor']:.2f} times the floor of {row['floor cycles']:,.0f}"
    )


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = frame.parser(__doc__)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--blocks", type=int, default=128, help="to execute of each launch")
    parser.add_argument("--case", choices=sizes.CASES, nargs="+", default=["encoder, grid"])
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), nargs="+", default=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="the backward whose sums do not depend on the order"
    )
    parser.add_argument("--peer", nargs="+", default=[], metavar="MODULE:FUNCTION", help="others' kernels, see above")
    arguments = parser.parse_args(argv)
    torch.use_deterministic_algorithms(arguments.deterministic)
    others = {name: console.named_function(name) for name in arguments.peer}
    triton = unfused(triton_functions(), "cpu")
    rows = []
    for case in arguments.case:
        for dtype in arguments.dtype:
            rows += measure(case, getattr(torch, dtype), arguments.architecture, arguments.blocks)
            print(*(show(row) for row in rows[-2:]), sep="\n", flush=True)
    for name, run in triton.items():
        for dtype in arguments.dtype:
            if (name, dtype) == ("triton f32", "float32"):  # the same as triton's
                continue
            rows += measure_triton(name, run, getattr(torch, dtype), arguments.architecture, arguments.blocks)
            print(*(show(row) for row in rows[-2:]), sep="\n", flush=True)
    for peer, kernels in others.items():
        for name, x, counts in kernels(arguments.architecture, arguments.blocks):
            rows.append(about("encoder, grid", f"{peer}, {name}", x, counts))
            print(show(rows[-1]), flush=True)
    frame.save(arguments.save, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
