"""The CUDA kernels on a GPU."""

from __future__ import annotations

import pytest
import torch
from deform_cases import TOLERANCE, Case, close, make_case, make_pyramid
from torch import Tensor

from ops.ms_deform_attn import fused_ms_deform_attn, ms_deform_attn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.detach().cuda().requires_grad_() for t in case.fused(dtype))


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
        make_pyramid(0, B=2, Q=297, D=D, shapes=shapes)
        if tiled
        else make_case(0, Q=37, D=D, reference_size=reference_size)
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


def test_gpu_beyond_32_bit_elements() -> None:
    Q = 2**31 // 256 + 100
    value = torch.randn(1, 4, 8, 32, device="cuda", dtype=torch.bfloat16)
    locations = torch.rand(1, Q, 8, 1, 1, 2, device="cuda", dtype=torch.bfloat16)
    weights = torch.ones(1, Q, 8, 1, 1, device="cuda", dtype=torch.bfloat16)
    output = ms_deform_attn(value, [(2, 2)], locations, weights, backend="cuda")
    tail = ms_deform_attn(value, [(2, 2)], locations[:, -50:], weights[:, -50:], backend="cuda")
    assert torch.equal(output[:, -50:], tail)


def test_gpu_runs_in_a_graph_and_without_synchronisation() -> None:
    case = make_case(0, Q=37, D=32, reference_size=4)
    inputs, valid = on_gpu(case, torch.float32), case.valid_sizes.cuda()

    def step() -> tuple[Tensor, ...]:
        output = fused_ms_deform_attn(inputs[0], case.shapes, valid, *inputs[1:], backend="cuda")
        gradients = torch.autograd.grad(output.sum(), inputs)
        return output.detach(), *gradients  # attached, it would tie the captured graph to this stream

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
