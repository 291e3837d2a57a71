"""Times the CUDA kernels with other tiles, warps and blocks than those of ``cuda_plan``.

    python -m benchmarks.tune_ms_deform_attn [--dtype bfloat16] [--top 8]
    python -m benchmarks.tune_ms_deform_attn --compile 90     # no GPU needed: registers and shared memory of each

Every variant is first held against the default's results. Times are those of a replayed CUDA graph, in microseconds,
of the fused form at the sizes of ``benchmarks.ms_deform_attn``. Results go to benchmarks/results/.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import frame
from benchmarks import ms_deform_attn_cases as sizes
from benchmarks.ms_deform_attn import prepare, step
from benchmarks.ms_deform_attn_cases import CHANNELS, HEADS, POINTS, make_inputs
from benchmarks.ms_deform_attn_peers import Deterministic, ours
from ops.ms_deform_attn import cuda, cuda_compile
from ops.ms_deform_attn.cuda_plan import TYPES, Plan, Signature, backward_plan, forward_plan

CASES = ("encoder, grid", "decoder")
LIMIT_KIB = 227
"""Shared memory of a block on an H100 or H200, for --compile."""


class Variant(NamedTuple):
    """One way to run one of the kernels."""

    name: str
    plan: Plan


def signature_of(case: str, dtype: torch.dtype) -> Signature:
    """Of the fused form at one of the sizes."""
    encoder = case.startswith("encoder")
    return Signature(TYPES[dtype], 0, HEADS, CHANNELS, len(sizes.SHAPES), POINTS, 2 if encoder else 4, encoder)


def forward_variants(signature: Signature) -> Iterator[Variant]:
    """The default first."""
    yield Variant("default", forward_plan(signature))
    tiles = ((16, 8), (8, 16), (16, 4), (8, 8), (8, 4)) if signature.tiled else ((8, 4), (4, 4), (4, 2), (2, 2))
    for tile, threads in itertools.product(tiles, (128, 256, 512)):
        yield Variant(f"{tile[0]}x{tile[1]}, {threads} threads", forward_plan(signature, (tile,), threads))


def backward_variants(signature: Signature, shared_limit: int, deterministic: bool) -> Iterator[Variant]:
    """The default first; for the encoder's size also without sorting."""
    yield Variant("default", backward_plan(signature, shared_limit, deterministic))
    if signature.tiled:
        shapes = ((16, 4), (8, 8), (8, 4), (4, 4))
        for tile, warps, blocks in itertools.product(shapes, (4, 8, 16), (2, 3, 4)):
            plan = backward_plan(signature, shared_limit, deterministic, (tile,), warps, blocks)
            if plan.tiled:
                yield Variant(f"{tile[0]}x{tile[1]}, {warps} warps, {plan.blocks} blocks", plan)
    plain = signature._replace(tiled=False)
    for tile, warps in itertools.product(((8, 4), (4, 4), (4, 2), (2, 2)), (2, 4, 8)):
        plan = backward_plan(plain, shared_limit, deterministic, (tile,), warps=warps)
        yield Variant(f"unsorted, {tile[0]}x{tile[1]}, {warps} warps", plan)


def distinct(variants: Iterator[Variant]) -> list[Variant]:
    """Each plan once, under its first name."""
    found: dict[Plan, Variant] = {}
    for variant in variants:
        found.setdefault(variant.plan, variant)
    return list(found.values())


def all_variants(case: str, dtype: torch.dtype, shared_limit: int) -> dict[str, list[Variant]]:
    """By what is timed with them."""
    signature = signature_of(case, dtype)
    return {
        "forward": distinct(forward_variants(signature)),
        "forward and backward": distinct(backward_variants(signature, shared_limit, False)),
        "deterministic": distinct(backward_variants(signature, shared_limit, True)),
    }


def compile_all(case: str, dtype: torch.dtype, architecture: int) -> None:
    """Print what the compiler says of each variant."""
    for what, variants in all_variants(case, dtype, LIMIT_KIB * 1024).items():
        for name, plan in variants:
            report = cuda_compile.compile_kernel(plan, architecture).report
            registers, spills = (
                re.search(r"Used (\d+) registers", report),
                re.search(r"(\d+) bytes spill stores", report),
            )
            assert registers
            assert spills
            memory = f"{plan.shared_bytes:7d} bytes shared"
            print(f"{case:14} {what:20} {name:48} {registers[1]:>4} registers {spills[1]:>4} bytes spilled {memory}")


def build_all(variants: dict[str, list[Variant]]) -> None:
    """Build the kernels with all processors; what fails is met again, and reported, when it is used."""
    architecture = cuda_compile.architecture_for(torch.cuda.get_device_capability())
    plans = {variant.plan for group in variants.values() for variant in group}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(cuda_compile.cached_kernel, plan, architecture) for plan in plans]:
            future.exception()


def measure(case: str, dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    """Times of every variant at one size; those that fail are reported and left out."""
    x = make_inputs(case).to(dtype, "cuda")
    grad = torch.randn(1, x.reference.shape[1], HEADS * CHANNELS, device="cuda").to(dtype)
    rows: list[dict[str, object]] = []
    limit = cuda.shared_limit(torch.device("cuda", torch.cuda.current_device()))
    all_of_them = all_variants(case, dtype, limit)
    build_all(all_of_them)
    for what, variants in all_of_them.items():
        run = Deterministic(ours("fused", "cuda")) if what == "deterministic" else ours("fused", "cuda")
        call = functools.partial(run, x) if what == "forward" else functools.partial(step, run, "fused", x, grad)
        with torch.set_grad_enabled(what != "forward"):
            expected = flat(call())
            best: dict[str, float] = {}
            for name, plan in variants:
                use(what, plan)
                try:
                    for actual, wanted in zip(flat(call()), expected, strict=True):
                        torch.testing.assert_close(
                            actual, wanted, rtol=2e-2, atol=1e-4 if dtype.itemsize == 4 else 2e-2
                        )
                    clock = prepare(call, "cuda", time.perf_counter)
                    best[name] = min(clock() for _ in range(rounds))
                except (AssertionError, RuntimeError) as error:
                    print(f"{case}, {what}, {name}: {str(error).splitlines()[0]}")
        use("forward", None)
        plans = dict(variants)
        rows += [
            {
                "case": case,
                "what": what,
                "variant": name,
                "dtype": str(dtype).removeprefix("torch."),
                "us": 1e3 * ms,
                "blocks": cuda.occupancy(plans[name], x.value.device),
            }
            for name, ms in sorted(best.items(), key=lambda item: item[1])
        ]
    return rows


def use(what: str, plan: Plan | None) -> None:
    """Have the backend run this plan instead of its own choice; None gives that back."""
    cuda.forward_plan, cuda.backward_plan = forward_plan, backward_plan
    if plan is not None:
        name = "forward_plan" if what == "forward" else "backward_plan"
        setattr(cuda, name, functools.lru_cache(lambda *_: plan))


def flat(result: object) -> list[Tensor]:
    """The tensors of a call's result."""
    if isinstance(result, Tensor):
        return [result.detach()]
    assert isinstance(result, tuple)
    return [tensor for part in result for tensor in flat(part)]


def main() -> None:
    """The command line."""
    parser = frame.parser(__doc__)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), nargs="+", default=["float32", "bfloat16"]
    )
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--top", type=int, default=6, help="variants to print of each kind, the default beside")
    parser.add_argument("--compile", type=int, metavar="SM", help="only compile, for this architecture")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for case, dtype in itertools.product(arguments.case, (getattr(torch, name) for name in arguments.dtype)):
        if arguments.compile:
            compile_all(case, dtype, arguments.compile)
            continue
        found = measure(case, dtype, arguments.rounds)
        rows += found
        about = frame.machine("cuda")
        frame.save(arguments.save or frame.results_name("tune_ms_deform_attn", about), {**about, "rows": rows})
        for what, group in itertools.groupby(found, key=lambda row: row["what"]):
            for place, row in enumerate(group):
                if place < arguments.top or row["variant"] == "default":
                    print(
                        f"{case:14} {row['dtype']:9} {what!s:20} {place + 1:3}. {row['us']:8.1f} us, "
                        f"{row['blocks']} blocks a multiprocessor  {row['variant']}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
