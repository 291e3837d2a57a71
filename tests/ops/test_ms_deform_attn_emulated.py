"""The arithmetic of the CUDA kernels where there is no GPU: the same source compiled for the host, thread by thread."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deform_cases import TOLERANCE, Case, close, make_case, make_pyramid
from torch import Tensor

from ops.cache import cached_file, key_of
from ops.ms_deform_attn import available_backends, cuda, cuda_compile, fused_ms_deform_attn, ms_deform_attn
from ops.ms_deform_attn.arguments import Arguments
from ops.ms_deform_attn.cuda_plan import Plan, Signature, backward_plan
from ops.native import compile_shared, compiler_command

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no C++ compiler")


def emulated(plan: Plan) -> Callable[..., int]:
    """The kernel compiled for the host; returns how many numbers it has added to global memory so far."""
    defines = "".join(f"#define {name} {value}\n" for name, value in plan.macros)
    kernel = f"ms_deform_attn_{Path(plan.source).stem}"
    program = (
        f'{defines}#include "cuda_emulation.h"\n#include "{plan.source}"\n'
        'extern "C" long long run(const Problem* p, int blocks, int bytes, int order) {\n'
        f"  emulation::run([&] {{ {kernel}(*p); }}, blocks, THREADS, bytes, order);\n"
        "  return emulation::adds;\n}\n"
    )
    headers = [
        HERE / "cuda_emulation.h",
        *(cuda_compile.SOURCES / name for name in (*cuda_compile.HEADERS, plan.source)),
    ]
    key = key_of(program, *(path.read_bytes() for path in headers))

    def build(output: Path) -> None:
        source = output.with_suffix(".cpp")
        source.write_text(program)
        flags = ("-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{HERE}", f"-I{cuda_compile.SOURCES}")
        compile_shared(compiler_command(), flags, source, output)

    run: Callable[..., int] = ctypes.CDLL(str(cached_file(f"emulated-{key}.so", build))).run
    return run


class Plans(list[Plan]):
    """The plans that were run, and how many numbers the last kernel has added to global memory."""

    adds = 0


@pytest.fixture(params=[1, 97], ids=["in order", "out of order"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Plans:
    """Lets cuda.forward and cuda.backward run on the host."""
    plans = Plans()

    def launch(plan: Plan, problem: Any, blocks: int, device: torch.device) -> None:
        assert device.type == "cpu"
        plans.append(plan)
        kernel = emulated(plan)
        before = kernel(ctypes.byref(problem), 0, plan.shared_bytes, request.param)
        plans.adds = kernel(ctypes.byref(problem), blocks, plan.shared_bytes, request.param) - before

    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "shared_limit", lambda device: 227 * 1024)
    return plans


def fenced(tensor: Tensor, fences: list[Tensor]) -> Tensor:
    """A copy between stretches of NaN: what is read out of bounds shows in the result."""
    flat = torch.full((tensor.numel() + 512,), float("nan"), dtype=tensor.dtype)
    inside = flat[256 : 256 + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor.detach())
    fences.append(flat)
    return inside


def check_against_reference(case: Case, dtype: torch.dtype, sample_dtype: torch.dtype, fused: bool) -> None:
    """Forward and backward of the kernels against the float64 reference at the same, rounded inputs."""
    case.value = case.value.to(dtype).double()
    exact = list(case.fused() if fused else case.unfused())
    fences: list[Tensor] = []
    rounded = [fenced(exact[0].to(dtype), fences)]
    for tensor in exact[1:]:
        rounded.append(fenced(tensor.to(sample_dtype), fences))
    if sample_dtype != torch.float32:
        exact[1:] = [t.double().requires_grad_() for t in rounded[1:]]
    flat = [size for shape in case.shapes for size in shape]
    if fused:
        expected = fused_ms_deform_attn(exact[0], case.shapes, case.valid_sizes, *exact[1:], backend="reference")
        arguments = Arguments(rounded[0], flat, case.valid_sizes, *rounded[1:])
    else:
        expected = ms_deform_attn(exact[0], case.shapes, *exact[1:], backend="reference")
        arguments = Arguments(rounded[0], flat, None, None, *rounded[1:])
    output = cuda.forward(arguments)
    assert output.dtype == dtype
    close(output, expected, TOLERANCE[dtype])
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected_grads = list(torch.autograd.grad(expected, exact, grad.double()))
    grads = [g for g in cuda.backward(fenced(grad, fences), arguments, fused) if g is not None]
    tolerance = TOLERANCE[torch.bfloat16 if sample_dtype == torch.bfloat16 else dtype]
    for actual, wanted in zip(grads, expected_grads, strict=True):
        close(actual, wanted, tolerance)


@pytest.mark.parametrize(
    ("dtype", "sample_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_emulated_kernels_with_windows(dtype: torch.dtype, sample_dtype: torch.dtype, host: Plans) -> None:
    shapes = [(13, 18), (7, 9)]
    case = make_pyramid(0, B=2, Q=13 * 18 + 7 * 9, D=32, shapes=shapes)
    check_against_reference(case, dtype, sample_dtype, fused=True)
    assert [plan.tiled for plan in host] == [True, True]


@pytest.mark.parametrize(("levels", "P", "D"), [(5, 3, 4), (1, 1, 64), (2, 5, 6)])
def test_emulated_kernels_with_windows_of_any_shape(levels: int, P: int, D: int, host: Plans) -> None:
    """Many windows or one, an odd number of points, rows in several parts, rows in pairs of floats."""
    shapes = [(9, 11), (5, 6), (3, 3), (2, 2), (1, 1)][:levels]
    case = make_pyramid(5, B=1, Q=sum(h * w for h, w in shapes), D=D, P=P, shapes=shapes)
    check_against_reference(case, torch.float32, torch.float32, fused=True)
    assert [plan.tiled for plan in host] == [True, True]
    assert host[1].threads == max(128, 64 * levels)


@pytest.mark.parametrize(
    ("tile", "halo", "queries", "warps"), [((16, 8), 2, 16, 4), ((16, 4), 3, 64, 12), ((4, 4), 4, 8, 8)]
)
def test_emulated_windows_of_other_plans(
    tile: tuple[int, int], halo: int, queries: int, warps: int, host: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What benchmarks.tune_ms_deform_attn tries gives the same results."""

    def plan(signature: Signature, limit: int, deterministic: bool) -> Plan:
        return backward_plan(signature, limit, deterministic, (tile,), (halo,), queries, warps)

    monkeypatch.setattr(cuda, "backward_plan", plan)
    case = make_pyramid(8, B=1, Q=13 * 18 + 7 * 9, D=16, P=4, shapes=[(13, 18), (7, 9)])
    check_against_reference(case, torch.float32, torch.float32, fused=True)
    assert (host[1].tiled, host[1].tile, host[1].threads) == (True, tile, 32 * warps)


def test_emulated_windows_lie_where_the_samples_are(host: Plans) -> None:
    """Samples far from their queries, but close to each other: what is added to memory are sums, not taps."""
    H, W, P, D = 24, 24, 4, 16
    case = make_pyramid(7, B=1, Q=H * W, D=D, P=P, shapes=[(H, W)], padded=False)
    generator = torch.Generator().manual_seed(7)
    shift = torch.tensor([-7.0, 6.0]) + torch.rand(case.offsets.shape, generator=generator) * 2
    case.pixels = case.reference[:, :, None, None, None] * torch.tensor([W, H]) + shift
    case.offsets = shift.double() + 0.5
    check_against_reference(case, torch.float32, torch.float32, fused=True)
    inside = sum(((case.pixels + tap >= 0) & (case.pixels + tap < W)).all(-1).sum().item() for tap in (0, 1))
    assert host.adds < 0.3 * 2 * inside * D


@pytest.mark.parametrize("together", ["a query's", "all"])
def test_emulated_windows_take_samples_at_one_place(together: str, host: Plans) -> None:
    """Samples that follow each other add to the same pixels: none may be lost."""
    case = make_pyramid(6, B=1, Q=12 * 13, D=16, P=4, shapes=[(12, 13)], padded=False)
    if together == "all":
        case.pixels = torch.full_like(case.pixels, 5.25)
    else:
        case.pixels = case.pixels[..., :1, :].expand_as(case.pixels).clone()
    sizes = case.valid_sizes.flip(-1)[:, None, None, :, None].double()
    case.offsets = case.pixels + 0.5 - case.reference[:, :, None, None, None] * sizes
    check_against_reference(case, torch.float32, torch.float32, fused=True)


@pytest.mark.parametrize(("reference_size", "D"), [(2, 33), (4, 64), (0, 16)])
def test_emulated_kernels_without_windows(reference_size: int, D: int, host: Plans) -> None:
    case = make_case(1, B=2, Q=37, D=D, H=3, reference_size=reference_size or 2, padded=reference_size > 0)
    check_against_reference(case, torch.float32, torch.float32, fused=reference_size > 0)
    assert [plan.tiled for plan in host] == [False, False]
    assert all(("CHANNELS", str(D)) in plan.macros for plan in host)


def test_emulated_kernels_ignore_samples_that_are_nowhere(host: Plans) -> None:
    case = make_case(2, D=16, reference_size=4)
    flat = case.offsets.view(-1, 2)
    for i, bad in enumerate([float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 1e9]):
        flat[4 * i, i % 2] = bad
    check_against_reference(case, torch.float32, torch.float32, fused=True)


@pytest.mark.parametrize("tiled", [True, False])
def test_emulated_deterministic_backward(tiled: bool, host: Plans) -> None:
    """Fixed-point sums are as exact as float32 ones, whatever the magnitude; infinite gradients stay visible."""
    case = make_pyramid(3, B=1, Q=99, D=16, shapes=[(9, 11)]) if tiled else make_case(3, B=1, Q=33, D=16)
    value, reference, offsets, logits = (t.detach() for t in case.fused(torch.float32))
    flat = [size for shape in case.shapes for size in shape]
    grad = torch.randn(1, value.shape[1] if tiled else 33, 32)
    arguments = Arguments(value, flat, case.valid_sizes, reference, offsets, logits)
    expected = cuda.backward(grad, arguments, True)
    torch.use_deterministic_algorithms(True)
    try:
        for magnitude in (1.0, 1e-12, 1e12):
            actual = cuda.backward(grad * magnitude, arguments, True)
            for a, b in zip(actual, expected, strict=True):
                assert a is not None
                assert b is not None
                close(a / magnitude, b, 1e-5)
        grad[0, 0, 0] = float("inf")
        assert not cuda.backward(grad, arguments, True)[0].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert ("DETERMINISTIC", "1") in host[-1].macros
    assert host[-1].tiled == tiled


def test_emulated_kernels_take_views_and_mixed_types(host: Plans) -> None:
    case = make_case(4, D=16)
    value, reference, offsets, logits = (t.detach() for t in case.fused(torch.float32))
    flat = [6, 5, 3, 4]
    plain = cuda.forward(Arguments(value, flat, case.valid_sizes, reference, offsets, logits))
    shifted = torch.cat([torch.zeros(1), value.flatten()])[1:].view(value.shape)
    transposed = offsets.mT.contiguous().mT
    mixed = cuda.forward(
        Arguments(shifted, flat, case.valid_sizes.int(), reference.double(), transposed, logits.double())
    )
    assert torch.equal(plain, mixed)
