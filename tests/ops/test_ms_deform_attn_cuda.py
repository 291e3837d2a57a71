"""The CUDA kernels: compiled for every architecture, emulated on the host, and, where there is a GPU, run."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deform_cases import Case, make_case
from torch import Tensor

from ops.ms_deform_attn import available_backends, cpu, cuda, fused_ms_deform_attn, ms_deform_attn
from ops.ms_deform_attn.cache import cached_file, key_of
from ops.ms_deform_attn.cuda_plan import Plan, Signature, backward_plan, forward_plan

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 103, 120)
SHARED_BYTES = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""KiB of shared memory that a block may have."""
MODEL = Signature(value_type=0, sample_type=0, channels=32, levels=4, points=4, reference_size=2, tiled=True)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HERE = Path(__file__).parent

needs_compiler = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no C++ compiler")


def has_nvrtc() -> bool:
    try:
        cuda.nvrtc_version()
    except RuntimeError:
        return False
    return True


def registers(plan: Plan, architecture: int) -> int:
    """Compile, hold that nothing is spilled, and return the registers of a thread."""
    binary, report = cuda.compile_kernel(plan, architecture)
    assert binary[:4] == b"\x7fELF"
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
    assert re.search(r"\b0 bytes stack frame", report), report
    found = re.search(r"Used (\d+) registers", report)
    assert found, report
    return int(found[1])


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_for_every_architecture(architecture: int) -> None:
    """With 64 registers a thread, 1024 threads run on a multiprocessor, half of what it can hold."""
    assert registers(forward_plan(MODEL), architecture) <= 64
    backward = backward_plan(MODEL, SHARED_BYTES[architecture] * 1024, False)
    assert backward.tiled
    assert registers(backward, architecture) <= 64


VARIANTS = {
    "bfloat16, boxes": MODEL._replace(value_type=1, sample_type=1, reference_size=4, tiled=False),
    "float16": MODEL._replace(value_type=2, sample_type=0),
    "unfused, 64 channels": MODEL._replace(reference_size=0, channels=64, tiled=False),
    "odd": MODEL._replace(channels=33, levels=3, points=5),
}


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", [75, 90])
def test_variants_compile(variant: str, architecture: int) -> None:
    signature = VARIANTS[variant]
    assert registers(forward_plan(signature), architecture) <= 64
    assert registers(backward_plan(signature, SHARED_BYTES[architecture] * 1024, True), architecture) <= 64


def test_plans_fit_into_shared_memory() -> None:
    for levels, points, channels in [(1, 1, 1), (4, 4, 32), (5, 8, 64), (4, 256, 16), (1, 1024, 1024)]:
        signature = MODEL._replace(levels=levels, points=points, channels=channels)
        assert forward_plan(signature).shared_bytes <= 48 * 1024
        for limit in SHARED_BYTES.values():
            for tiled in (True, False):
                plan = backward_plan(signature._replace(tiled=tiled), limit * 1024, False)
                assert plan.shared_bytes <= (limit * 1024 if plan.tiled else 48 * 1024)
                assert plan.tiled <= tiled


def emulated(plan: Plan) -> Callable[..., None]:
    """The kernel compiled for the host."""
    defines = "".join(f"#define {name} {value}\n" for name, value in plan.macros)
    kernel = f"ms_deform_attn_{Path(plan.source).stem}"
    program = (
        f'{defines}#include "cuda_emulation.h"\n#include "{plan.source}"\n'
        'extern "C" void run(const Problem* p, int blocks, int bytes, int order) {\n'
        f"  emulation::run([&] {{ {kernel}(*p); }}, blocks, THREADS, bytes, order);\n}}\n"
    )
    headers = [HERE / "cuda_emulation.h", *(cuda.SOURCES / name for name in (*cuda.HEADERS, plan.source))]
    key = key_of(program, *(path.read_bytes() for path in headers))

    def build(output: Path) -> None:
        source = output.with_suffix(".cpp")
        source.write_text(program)
        flags = ("-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{HERE}", f"-I{cuda.SOURCES}")
        cpu.compile_shared(cpu.compiler_command(), flags, source, output)

    return ctypes.CDLL(str(cached_file(f"emulated-{key}.so", build))).run


@pytest.fixture(params=[1, 97], ids=["in order", "out of order"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Lets cuda.forward and cuda.backward run on the host; returns the plans that were run."""
    plans: list[Plan] = []

    def launch(plan: Plan, problem: Any, blocks: int, device: torch.device) -> None:
        assert device.type == "cpu"
        plans.append(plan)
        emulated(plan)(ctypes.byref(problem), blocks, plan.shared_bytes, request.param)

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


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


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
        arguments = (rounded[0], flat, case.valid_sizes, *rounded[1:])
    else:
        expected = ms_deform_attn(exact[0], case.shapes, *exact[1:], backend="reference")
        arguments = (rounded[0], flat, None, None, *rounded[1:])
    output = cuda.forward(*arguments)
    assert output.dtype == dtype
    close(output, expected, TOLERANCE[dtype])
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected_grads = list(torch.autograd.grad(expected, exact, grad.double()))
    grads = [g for g in cuda.backward(fenced(grad, fences), *arguments, fused) if g is not None]
    tolerance = TOLERANCE[torch.bfloat16 if sample_dtype == torch.bfloat16 else dtype]
    for actual, wanted in zip(grads, expected_grads, strict=True):
        close(actual, wanted, tolerance)


def pyramid(seed: int, **options: Any) -> Case:
    """Queries are the pixels, and samples are near them, but for some."""
    case = make_case(seed, H=2, P=2, **options)
    B, Q, H, L, P, _ = case.offsets.shape
    generator = torch.Generator().manual_seed(seed)
    centres = torch.cat(
        [
            torch.stack(torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij"), -1)
            .flip(-1)
            .flatten(0, 1)
            for h, w in case.shapes
        ]
    ).double()
    assert len(centres) == Q
    case.reference = centres[None].expand(B, Q, 2).contiguous()
    near = (case.reference[:, :, None, None, None] * case.valid_sizes.flip(-1)[:, None, None, :, None]).floor()
    shift = torch.randint(-3, 3, (B, Q, H, L, P, 2), generator=generator)
    fraction = torch.rand(B, Q, H, L, P, 2, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    far = torch.rand(B, Q, H, L, P, 1, generator=generator) < 0.1
    case.pixels = torch.where(far, case.pixels, near + shift + fraction)
    sizes = case.valid_sizes.flip(-1)[:, None, None, :, None].double()
    case.offsets = case.pixels + 0.5 - case.reference[:, :, None, None, None] * sizes
    return case


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "sample_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_emulated_kernels_with_windows(dtype: torch.dtype, sample_dtype: torch.dtype, host: list[Plan]) -> None:
    shapes = [(13, 18), (7, 9)]
    case = pyramid(0, B=2, Q=13 * 18 + 7 * 9, D=32, shapes=shapes)
    check_against_reference(case, dtype, sample_dtype, fused=True)
    assert [plan.tiled for plan in host] == [True, True]


@needs_compiler
@pytest.mark.parametrize(("reference_size", "D"), [(2, 33), (4, 64), (0, 16)])
def test_emulated_kernels_without_windows(reference_size: int, D: int, host: list[Plan]) -> None:
    case = make_case(1, B=2, Q=37, D=D, H=3, reference_size=reference_size or 2, padded=reference_size > 0)
    check_against_reference(case, torch.float32, torch.float32, fused=reference_size > 0)
    assert [plan.tiled for plan in host] == [False, False]
    assert all(("CHANNELS", str(D)) in plan.macros for plan in host)


@needs_compiler
def test_emulated_kernels_ignore_samples_that_are_nowhere(host: list[Plan]) -> None:
    case = make_case(2, D=16, reference_size=4)
    flat = case.offsets.view(-1, 2)
    for i, bad in enumerate([float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 1e9]):
        flat[4 * i, i % 2] = bad
    check_against_reference(case, torch.float32, torch.float32, fused=True)


@needs_compiler
@pytest.mark.parametrize("tiled", [True, False])
def test_emulated_deterministic_backward(tiled: bool, host: list[Plan]) -> None:
    """Fixed-point sums are as exact as float32 ones, whatever the magnitude; infinite gradients stay visible."""
    case = pyramid(3, B=1, Q=99, D=16, shapes=[(9, 11)]) if tiled else make_case(3, B=1, Q=33, D=16)
    value, reference, offsets, logits = (t.detach() for t in case.fused(torch.float32))
    flat = [size for shape in case.shapes for size in shape]
    grad = torch.randn(1, value.shape[1] if tiled else 33, 32)
    arguments = (value, flat, case.valid_sizes, reference, offsets, logits)
    expected = cuda.backward(grad, *arguments, True)
    torch.use_deterministic_algorithms(True)
    try:
        for magnitude in (1.0, 1e-12, 1e12):
            actual = cuda.backward(grad * magnitude, *arguments, True)
            for a, b in zip(actual, expected, strict=True):
                assert a is not None
                assert b is not None
                close(a / magnitude, b, 1e-5)
        grad[0, 0, 0] = float("inf")
        assert not cuda.backward(grad, *arguments, True)[0].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert ("DETERMINISTIC", "1") in host[-1].macros
    assert host[-1].tiled == tiled


@needs_compiler
def test_emulated_kernels_take_views_and_mixed_types(host: list[Plan]) -> None:
    case = make_case(4, D=16)
    value, reference, offsets, logits = (t.detach() for t in case.fused(torch.float32))
    flat = [6, 5, 3, 4]
    plain = cuda.forward(value, flat, case.valid_sizes, reference, offsets, logits)
    shifted = torch.cat([torch.zeros(1), value.flatten()])[1:].view(value.shape)
    mixed = cuda.forward(
        shifted, flat, case.valid_sizes.int(), reference.double(), offsets.mT.contiguous().mT, logits.double()
    )
    assert torch.equal(plain, mixed)


def test_limits_of_the_kernels() -> None:
    value, samples = torch.empty(1, 12, 2, 32), torch.empty(1, 5, 2, 1, 4, 2)
    assert cuda.supports(value, [3, 4], samples)
    assert not cuda.supports(torch.empty(1, 40000, 2, 32, device="meta"), [1, 40000], samples)
    assert not cuda.supports(value, [3, 4], torch.empty(1, 5, 2, 1, 1025, 2))
    assert not cuda.supports(torch.empty(1, 12, 2, 1025), [3, 4], samples)


def test_a_machine_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert available_backends()["cuda"] == "no CUDA device"


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.detach().cuda().requires_grad_() for t in case.fused(dtype))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("D", "reference_size", "tiled"), [(32, 2, True), (64, 4, False), (16, 2, True), (33, 4, False)]
)
def test_gpu_matches_the_reference(
    dtype: torch.dtype, deterministic: bool, D: int, reference_size: int, tiled: bool
) -> None:
    shapes = [(13, 18), (7, 9)]
    case = (
        pyramid(0, B=2, Q=297, D=D, shapes=shapes) if tiled else make_case(0, Q=37, D=D, reference_size=reference_size)
    )
    case.value = case.value.to(dtype).double()
    exact, inputs = case.fused(), on_gpu(case, dtype)
    expected = fused_ms_deform_attn(exact[0], case.shapes, case.valid_sizes, *exact[1:], backend="reference")
    torch.use_deterministic_algorithms(deterministic)
    try:
        results = []
        for _ in range(3):
            output = fused_ms_deform_attn(inputs[0], case.shapes, case.valid_sizes.cuda(), *inputs[1:], backend="cuda")
            results.append((output, *torch.autograd.grad(output, inputs, torch.ones_like(output))))
    finally:
        torch.use_deterministic_algorithms(False)
    close(results[0][0].cpu(), expected, TOLERANCE[dtype])
    for actual, wanted in zip(results[0][1:], torch.autograd.grad(expected.sum(), exact), strict=True):
        close(actual.cpu(), wanted, TOLERANCE[dtype])
    if deterministic:
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@gpu
@pytest.mark.gpu
def test_gpu_beyond_32_bit_elements() -> None:
    Q = 2**31 // 256 + 100
    value = torch.randn(1, 4, 8, 32, device="cuda", dtype=torch.bfloat16)
    locations = torch.rand(1, Q, 8, 1, 1, 2, device="cuda", dtype=torch.bfloat16)
    weights = torch.ones(1, Q, 8, 1, 1, device="cuda", dtype=torch.bfloat16)
    output = ms_deform_attn(value, [(2, 2)], locations, weights, backend="cuda")
    tail = ms_deform_attn(value, [(2, 2)], locations[:, -50:], weights[:, -50:], backend="cuda")
    assert torch.equal(output[:, -50:], tail)


@gpu
@pytest.mark.gpu
def test_gpu_runs_in_a_graph_and_without_synchronisation() -> None:
    case = make_case(0, Q=37, D=32, reference_size=4)
    inputs, valid = on_gpu(case, torch.float32), case.valid_sizes.cuda()

    def step() -> tuple[Tensor, ...]:
        output = fused_ms_deform_attn(inputs[0], case.shapes, valid, *inputs[1:], backend="cuda")
        return output, *torch.autograd.grad(output.sum(), inputs)

    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
