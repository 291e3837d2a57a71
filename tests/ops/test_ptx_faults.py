"""The execution of PTX sees what is wrong with a kernel: faults are planted in copies of the sources."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deform_cases import close, make_pyramid
from ptx_instructions import UnknownInstructionError
from ptx_kernel import Kernel
from ptx_launch import Launches, kernel_of, newest_architecture
from ptx_machine import PtxFaultError

from ops.ms_deform_attn import cuda, cuda_compile, fused_ms_deform_attn
from ops.ms_deform_attn.arguments import Arguments

pytestmark = pytest.mark.skipif(newest_architecture() is None, reason="NVRTC is not installed")
Plant = Callable[[str, str, str], None]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Lets kernels be compiled from sources in which a piece is another."""
    sources = shutil.copytree(cuda_compile.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(cuda_compile, "SOURCES", sources)
    kernel_of.cache_clear()

    def replace(file: str, old: str, new: str) -> None:
        text = (sources / file).read_text()
        assert text.count(old) == 1, f"{file} holds {text.count(old)} of {old!r}"
        (sources / file).write_text(text.replace(old, new))

    yield replace
    kernel_of.cache_clear()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches(90)
    monkeypatch.setattr(cuda, "launch", launches)
    monkeypatch.setattr(cuda, "shared_limit", lambda device: 227 * 1024)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)  # whatever a test has left
    return launches


def run_both() -> None:
    """Forward and backward of a small encoder, held against the reference."""
    case = make_pyramid(0, B=1, Q=99, D=16, shapes=[(9, 11)])
    exact = case.fused()
    value, reference, offsets, logits = (t.detach() for t in case.fused(torch.float32))
    arguments = Arguments(value, [9, 11], case.valid_sizes, reference, offsets, logits)
    expected = fused_ms_deform_attn(exact[0], case.shapes, case.valid_sizes, *exact[1:], backend="reference")
    close(cuda.forward(arguments), expected, 1e-4)
    grad = torch.ones_like(expected)
    for actual, wanted in zip(
        cuda.backward(grad.float(), arguments, True), torch.autograd.grad(expected, exact, grad), strict=True
    ):
        assert actual is not None
        close(actual, wanted, 1e-4)


def test_without_a_fault_all_is_well(plant: Plant, host: Launches) -> None:
    run_both()
    assert [plan.source for plan in host.plans] == ["forward.cu", "backward.cu"]


FAULTS = {
    "no barrier before the sorting": (
        "backward.cu",
        "  __syncthreads();\n#if SORTED",
        "#if SORTED",
        "a race",
    ),
    "taps are counted too early": (
        "sorted.cuh",
        "    __syncwarp();\n    if (cell < CELLS && same",
        "    if (cell < CELLS && same",
        "a race of a write after a read",
    ),
    "cells start with what was there": ("sorted.cuh", "cells[lane + 32] = 0;", "0;", "uninitialised shared memory"),
    "a change of pixel is missed": ("sorted.cuh", "pixels[t + 1] != pixels[t];", "pixel == NOWHERE;", "not close"),
    "the last sums are forgotten": ("sorted.cuh", "if (begin < count &&", "if (begin > count &&", "not close"),
    "a list that ends too early": ("sorted.cuh", "n = total + lane", "n = total + lane + 1", "uninitialised"),
    "a shuffle that some lanes skip": (
        "sorted.cuh",
        "      sum_over_lanes<LANES>(",
        "      if (threadIdx.x % 32 < 31) sum_over_lanes<LANES>(",
        "threads wait for each other for ever",
    ),
    "a barrier that a warp skips": (
        "backward.cu",
        "  __syncthreads();\n  write_samples(p, block, s);",
        "  if (threadIdx.x / 32 != 1) __syncthreads();\n  write_samples(p, block, s);",
        "a race",
    ),
    "places are read too early": (
        "forward.cu",
        "  locate_all(p, block, s);\n  __syncthreads();",
        "  locate_all(p, block, s);",
        "a race of a read after a write",
    ),
    "a tap beyond the border": ("forward.cu", "pixel < size ? axis ? 12 : 10", "true ? axis ? 12 : 10", "not close"),
    "a row far beyond the last": ("samples.cuh", "level.start + (row", "level.start + 99 + (row", "out of bounds"),
    "sums are stored, not added": ("device.cuh", "red.global.add.f32", "st.global.f32", "two threads write"),
    "an input is written": ("backward.cu", "(p.grad_samples + 2 * at", "((float*)p.samples + 2 * at", "an input"),
    "right is left": ("samples.cuh", "return tap & 1 ? x : 1 - x", "return tap & 1 ? 1 - x : x", "not close"),
}  # fmt: skip


QUICK = ("taps are counted too early", "a shuffle that some lanes skip", "right is left")


@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAULTS])
def test_planted_faults_are_found(fault: str, plant: Plant, host: Launches) -> None:
    file, old, new, message = FAULTS[fault]
    if "stored" in fault:
        plant("device.cuh", "if constexpr (count == 4)", "if constexpr (count == 5)")
    plant(file, old, new)
    with pytest.raises(AssertionError, match=message):
        run_both()


def test_too_little_shared_memory_is_out_of_bounds(host: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cuda.forward_plan
    monkeypatch.setattr(cuda, "forward_plan", lambda s: plan(s)._replace(shared_bytes=plan(s).shared_bytes // 2))
    with pytest.raises(PtxFaultError, match=r"out of bounds: block \d, thread \d+, line \d+: .*\.shared\."):
        run_both()


def test_a_view_without_a_copy_is_misaligned(host: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_aligned", lambda tensor: tensor)
    original = make_pyramid(0, B=1, Q=99, D=16, shapes=[(9, 11)])
    value, reference, offsets, logits = (t.detach() for t in original.fused(torch.float32))
    shifted = torch.cat([torch.zeros(1), value.flatten()])[1:].view(value.shape)
    with pytest.raises(PtxFaultError, match=r"misaligned access of 16 bytes.*ld\.global"):
        cuda.forward(Arguments(shifted, [9, 11], original.valid_sizes, reference, offsets, logits))


@pytest.mark.parametrize(
    "instruction", ["fma.rn.f64 %f1, %f1, %f1, %f1;", "ld.u32 %r1, [%r1];", "vote.sync.all.pred %p1, %p1, -1;"]
)
def test_an_unknown_instruction_is_refused(instruction: str) -> None:
    registers = ".reg .pred %p<2>;\n.reg .b32 %r<2>;\n.reg .f32 %f<2>;\n"
    Kernel(f"{{\n{registers}add.s32 %r1, %r1, 1;\nret;\n}}")
    with pytest.raises(UnknownInstructionError, match=instruction.split()[0]):
        Kernel(f"{{\n{registers}{instruction}\nret;\n}}")
