"""The CUDA kernels where there is no GPU: the PTX that NVRTC makes of them, executed with every access checked."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from deform_cases import TOLERANCE, Case, close, make_case, make_pyramid
from ptx_launch import Launches, newest_architecture
from torch import Tensor

from ops.ms_deform_attn import cuda, fused_ms_deform_attn, ms_deform_attn
from ops.ms_deform_attn.arguments import Arguments
from ops.ms_deform_attn.cuda_plan import Plan, Signature, backward_plan

NEWEST = newest_architecture()
pytestmark = pytest.mark.skipif(NEWEST is None, reason="NVRTC is not installed")


# The architecture of an H100 in every run of the tests; with the thorough ones the sources' other branch, and the last
# architecture that the compiler knows.
@pytest.fixture(
    params=[90, pytest.param(75, marks=pytest.mark.thorough), pytest.param(NEWEST, marks=pytest.mark.thorough)],
    ids="sm_{}".format,
)
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Lets cuda.forward and cuda.backward run here, on kernels for an architecture."""
    launches = Launches(request.param)
    monkeypatch.setattr(cuda, "launch", launches)
    monkeypatch.setattr(cuda, "shared_limit", lambda device: (64 if request.param == 75 else 227) * 1024)
    return launches


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
def test_ptx_kernels_with_sorted_taps(dtype: torch.dtype, sample_dtype: torch.dtype, host: Launches) -> None:
    shapes = [(13, 18), (7, 9)]
    case = make_pyramid(0, B=2, Q=13 * 18 + 7 * 9, D=32, shapes=shapes)
    check_against_reference(case, dtype, sample_dtype, fused=True)
    assert [plan.tiled for plan in host.plans] == [True, True]


@pytest.mark.parametrize(("levels", "P", "D"), [(5, 3, 4), (1, 1, 64), (2, 5, 6)])
def test_ptx_kernels_with_sorted_taps_of_any_shape(levels: int, P: int, D: int, host: Launches) -> None:
    """Many levels or one, an odd number of points, rows in several parts, rows in pairs of floats."""
    shapes = [(9, 11), (5, 6), (3, 3), (2, 2), (1, 1)][:levels]
    case = make_pyramid(5, B=1, Q=sum(h * w for h, w in shapes), D=D, P=P, shapes=shapes)
    check_against_reference(case, torch.float32, torch.float32, fused=True)
    assert [plan.tiled for plan in host.plans] == [True, True]
    assert host.plans[1].threads == 64 * max(2, levels)


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "warps", "blocks"), [((16, 8), 4, 1), ((16, 4), 12, 2), ((4, 4), 8, 3)])
def test_ptx_sorted_taps_of_other_plans(
    tile: tuple[int, int], warps: int, blocks: int, host: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What benchmarks.tune_ms_deform_attn tries gives the same results."""

    def plan(signature: Signature, limit: int, deterministic: bool) -> Plan:
        return backward_plan(signature, limit, deterministic, (tile,), warps, blocks)

    monkeypatch.setattr(cuda, "backward_plan", plan)
    case = make_pyramid(8, B=1, Q=13 * 18 + 7 * 9, D=16, P=4, shapes=[(13, 18), (7, 9)])
    check_against_reference(case, torch.float32, torch.float32, fused=True)
    assert (host.plans[1].tiled, host.plans[1].tile, host.plans[1].threads) == (True, tile, 32 * warps)


def test_ptx_sums_and_not_taps_are_added_to_memory(host: Launches) -> None:
    """Samples far from their queries, but close to each other."""
    H, W, P, D = 24, 24, 4, 16
    case = make_pyramid(7, B=1, Q=H * W, D=D, P=P, shapes=[(H, W)], padded=False)
    generator = torch.Generator().manual_seed(7)
    shift = torch.tensor([-7.0, 6.0]) + torch.rand(case.offsets.shape, generator=generator) * 2
    case.pixels = case.reference[:, :, None, None, None] * torch.tensor([W, H]) + shift
    case.offsets = shift.double() + 0.5
    check_against_reference(case, torch.float32, torch.float32, fused=True)
    inside = sum(((case.pixels + tap >= 0) & (case.pixels + tap < W)).all(-1).sum().item() for tap in (0, 1))
    assert host.adds < 0.3 * 2 * inside * D


@pytest.mark.parametrize("tiled", [True, False])
def test_ptx_softmax_of_logits_far_from_zero(tiled: bool, host: Launches) -> None:
    """Exponentials that cannot be summed as they are, of some of the queries; those of others can."""
    case = make_pyramid(9, B=1, Q=99, D=8, P=4, shapes=[(9, 11)]) if tiled else make_case(9, B=1, Q=33, D=8, P=5)
    far = torch.tensor([-500.0, 0.0, 90.0])[torch.arange(case.logits.shape[1]) % 3]
    case.logits = case.logits * 20 + far[None, :, None, None, None].double()
    check_against_reference(case, torch.float32, torch.float32, fused=True)


def test_ptx_taps_of_images_with_too_many_pixels_are_not_sorted(
    host: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "MAX_SORTED_PIXELS", 99)
    case = make_pyramid(5, B=1, Q=99, D=8, P=2, shapes=[(9, 11)])
    check_against_reference(case, torch.float32, torch.float32, fused=True)
    assert [plan.tiled for plan in host.plans] == [True, False]


@pytest.mark.parametrize("together", ["a query's", "all"])
def test_ptx_sorted_taps_at_one_place(together: str, host: Launches) -> None:
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
def test_ptx_kernels_without_sorted_taps(reference_size: int, D: int, host: Launches) -> None:
    case = make_case(1, B=2, Q=37, D=D, H=3, reference_size=reference_size or 2, padded=reference_size > 0)
    check_against_reference(case, torch.float32, torch.float32, fused=reference_size > 0)
    assert [plan.tiled for plan in host.plans] == [False, False]
    assert all(("CHANNELS", str(D)) in plan.macros for plan in host.plans)


def test_ptx_kernels_ignore_samples_that_are_nowhere(host: Launches) -> None:
    case = make_case(2, D=16, reference_size=4)
    flat = case.offsets.view(-1, 2)
    for i, bad in enumerate([float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 1e9]):
        flat[4 * i, i % 2] = bad
    check_against_reference(case, torch.float32, torch.float32, fused=True)


@pytest.mark.parametrize("tiled", [True, False])
def test_ptx_deterministic_backward(tiled: bool, host: Launches) -> None:
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
    assert ("DETERMINISTIC", "1") in host.plans[-1].macros
    assert host.plans[-1].tiled == tiled


def test_ptx_kernels_take_views_and_mixed_types(host: Launches) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_ptx_of_random_signatures(seed: int, host: Launches) -> None:
    rng = random.Random(100 * host.architecture + seed)
    levels, tiled, fused = rng.randint(1, 5), rng.random() < 0.6, rng.random() < 0.7
    options: dict[str, Any] = {"B": rng.randint(1, 2), "H": rng.randint(1, 3), "P": rng.randint(1, 8)}
    options["D"] = rng.choice([1, 2, 6, 8, 24, 32, 33, 40, 64, 100, 256])
    options["shapes"] = [(rng.randint(1, 7), rng.randint(1, 7)) for _ in range(levels)]
    dtype = rng.choice(list(TOLERANCE))
    sample_dtype = rng.choice([torch.float32, dtype])
    if tiled:
        case = make_pyramid(seed, Q=sum(h * w for h, w in options["shapes"]), **options)
    else:
        case = make_case(seed, Q=rng.randint(1, 40), reference_size=rng.choice([2, 4]), **options)
    torch.use_deterministic_algorithms(rng.random() < 0.3)
    try:
        check_against_reference(case, dtype, sample_dtype, fused)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(host.plans) == 2
