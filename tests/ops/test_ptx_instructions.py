"""What Triton's kernels have and this project's do not, in the executor of PTX that counts both: each of their
instructions beside what it means, and a kernel of theirs from its launch to its results."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from ptx_kernel import Kernel
from ptx_machine import Machine, PtxFaultError, Region
from torch import Tensor

from benchmarks.triton_launches import Launch, launches

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = scaled_sums = None

KERNEL = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
  .param .u64 .ptr .global .align 1 kernel_param_0,
  .param .u64 .ptr .global .align 1 kernel_param_1,
  .param .u32 kernel_param_2
)
{{
  .reg .pred %p<2>;
  .reg .b16 %rs<9>;
  .reg .b32 %r<9>;
  .reg .b64 %rd<9>;
  ld.param.b64 %rd1, [kernel_param_0];
  ld.param.b64 %rd2, [kernel_param_1];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 4;
  add.s64 %rd4, %rd1, %rd3;
  ld.global.b32 %r2, [ %rd4 + 0 ];
  mov.b32 {{%rs1, %rs2}}, %r2;
  {body}
  add.s64 %rd5, %rd2, %rd3;
  st.global.b32 [ %rd5 + 0 ], %r3;
  ret;
}}
"""


def run(body: str, words: Tensor, out: Tensor, grid: tuple[int, ...] = (1,)) -> Tensor:
    """``out`` after a block of as many threads as words has put %r3 there, each with its word in %r2, %rs1 and %rs2."""
    kernel = Kernel(KERNEL.format(body=body))
    parameter = struct.pack("QQi", words.data_ptr(), out.data_ptr(), -3)
    regions = [Region(words.data_ptr(), words.nbytes, False), Region(out.data_ptr(), out.nbytes, True)]
    Machine(kernel, len(words), [int(np.prod(grid)) - 1], 256, parameter, regions, None, grid).run()
    return out


def words() -> Tensor:
    """Numbers of all kinds, as bits of float32 or of pairs of bfloat16: ties, zeros, what is not finite, any."""
    special = [0, -0.0, 0.5, -0.5, 1.5, -7.25, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-9, 3e38, 1e-40, -1e-40]
    chosen = torch.tensor([*special, float("inf"), float("-inf"), float("nan"), 65504]).view(torch.int32)
    return torch.cat([chosen, torch.randint(-(2**31), 2**31, (48,), generator=torch.Generator().manual_seed(0))]).int()


def halves(w: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(w.view(torch.bfloat16).view(-1, 2).unbind(1))  # type: ignore[return-value]


def both(bf16: Tensor) -> Tensor:
    return torch.stack([bf16, bf16], 1)


MEANINGS = {
    "bfe.u32 %r3, %r2, 5, 7;": lambda w: w >> 5 & 127,
    "bfe.s32 %r3, %r2, 25, 7;": lambda w: w >> 25,
    "and.b32 %r3, %r2, 0xff0;": lambda w: w & 0xFF0,
    "cvt.rmi.ftz.f32.f32 %r3, %r2;": lambda w: torch.where(
        w.view(torch.float32).abs() < 2.0**-126, 0, w.view(torch.float32)
    ).floor(),
    "cvt.f32.bf16 %r3, %rs1;": lambda w: halves(w)[0].float(),
    "cvt.f32.bf16 %r3, %rs2;": lambda w: halves(w)[1].float(),
    "cvt.rn.bf16.f32 %rs3, %r2; mov.b32 %r3, {%rs3, %rs3};": lambda w: both(w.view(torch.float32).bfloat16()),
    "mov.b32 %r4, 0f3FC00000; cvt.rn.bf16x2.f32 %r3, %r4, %r2;": lambda w: torch.stack(
        [w.view(torch.float32).bfloat16(), torch.full(w.shape, 1.5, dtype=torch.bfloat16)], 1
    ),
    "mul.bf16 %rs3, %rs1, %rs2; mov.b32 %r3, {%rs3, %rs3};": lambda w: both(halves(w)[0] * halves(w)[1]),
    "ld.param.s32 %rd6, [kernel_param_2]; shr.u64 %rd7, %rd6, 32; cvt.u32.u64 %r3, %rd7;": lambda w: 0 * w - 1,
    "mov.b32 %r5, global_smem; shl.b32 %r6, %r1, 2; add.s32 %r7, %r5, %r6; st.shared::cta.b32 [ %r7 + 0 ], %r2; "
    "bar.sync 0; xor.b32 %r8, %r6, 252; ld.shared.b32 %r3, [ %r8 + 0 ];": lambda w: w.flip(0),
}


@pytest.mark.parametrize("body", MEANINGS)
def test_an_instruction_means_what_it_says(body: str) -> None:
    w = words()
    expected = MEANINGS[body](w)
    found = run(body.replace("; ", ";\n"), w, torch.zeros(64, dtype=torch.int32)).view(expected.dtype)
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("axis", "expected"), [("x", 1), ("y", 2), ("z", 3)])
def test_a_block_knows_its_place_along_each_axis(axis: str, expected: int) -> None:
    out = run(f"mov.u32 %r3, %ctaid.{axis};", words(), torch.zeros(64, dtype=torch.int32), (2, 3, 4))
    assert (out == expected).all()


def test_sums_of_bfloat16_in_memory_are_rounded_after_each_thread() -> None:
    numbers = torch.randn(64, 2, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = torch.ones(128, dtype=torch.bfloat16)
    registers = "{ %rs1, %rs2, %rs1, %rs2, %rs1, %rs2, %rs1, %rs2 }"
    old = "{ %rs3, %rs4, %rs5, %rs6, %rs7, %rs8, %rs7, %rs8 }"
    body = f"atom.global.gpu.relaxed.add.noftz.v8.bf16 {old}, [ %rd2 + 240 ], {registers};\nmov.b32 %r3, 0;\nret;"
    run(body, numbers.view(torch.int32).flatten(), out)
    expected = torch.ones(2, dtype=torch.bfloat16)
    for pair in numbers:
        expected += pair
    assert out[:120].eq(1).all()
    assert torch.equal(out[120:], expected.repeat(4))


def test_threads_may_write_the_same_to_one_place_of_shared_memory() -> None:
    body = "mov.b32 %r5, global_smem;\nst.shared::cta.b32 [ %r5 + 0 ], %r2;\nmov.b32 %r3, 0;"
    out = torch.zeros(64, dtype=torch.int32)
    run(body, torch.full((64,), 7, dtype=torch.int32), out)
    with pytest.raises(PtxFaultError, match="two threads write one address"):
        run(body, words(), out)


if triton is not None:

    @triton.jit
    def scaled_sums(value, factor, sums, total, rows, ROWS: tl.constexpr = 16, COLUMNS: tl.constexpr = 32):  # type: ignore[no-untyped-def]
        """Sums of rows of ``value * factor``, and their sum over all rows, of the image of ``program_id(1)``."""
        at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, COLUMNS)
        inside = at < rows
        row = tl.program_id(1) * rows + at
        numbers = tl.load(value + row[:, None] * COLUMNS + columns[None, :], inside[:, None], 0.0) * factor
        tl.store(sums + row, tl.sum(numbers.to(tl.float32), 1), inside)
        place = tl.program_id(1) * COLUMNS + columns[None, :] + 0 * at[:, None]
        tl.atomic_add(total + place, numbers.to(tl.float32), inside[:, None], sem="relaxed")


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_triton_run_without_a_gpu(dtype: torch.dtype) -> None:
    """Compiled for an H100, and executed: several warps, a grid of two axes, rows beyond the last left out."""
    images, rows, columns = 3, 37, 32
    value = torch.randn(images, rows, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    sums, total = torch.zeros(images, rows), torch.zeros(images, columns)
    seen: list[Launch] = []

    def handle(launch: Launch) -> None:
        seen.append(launch)
        regions = [Region(tensor.data_ptr(), tensor.nbytes, True) for tensor in launch.tensors]
        blocks = range(int(np.prod(launch.grid)))
        kernel = Kernel(launch.compiled.ptx)
        Machine(kernel, launch.threads, blocks, launch.shared_bytes, launch.parameter, regions, None, launch.grid).run()

    with launches(90, handle):
        scaled_sums[lambda named: (-(-named["rows"] // 16), images)](value, 2.5, sums, total, rows, COLUMNS=32)
    expected = value.float() * 2.5
    torch.testing.assert_close(sums, expected.sum(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, expected.sum(1), rtol=1e-5, atol=1e-5)
    (launch,) = seen
    assert launch.compiled.binary[:4] == b"\x7fELF"
    assert "Used" in launch.compiled.report
    assert (launch.grid, launch.threads) == ((3, images), 128)
