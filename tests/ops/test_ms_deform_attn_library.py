"""The op under the tools of PyTorch: gradcheck, opcheck, compile, export, autocast, determinism, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deform_cases import Case, make_case
from torch import Tensor, nn

from ops.ms_deform_attn import available_backends, backends, cpu, fused_ms_deform_attn, ms_deform_attn
from ops.ms_deform_attn.library import ms_deform_attn_backward_op, ms_deform_attn_op

FLAT = [6, 5, 3, 4]
needs_cpu = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no C++ compiler")


class Attention(nn.Module):
    """The op between projections, as a model uses it."""

    def __init__(self, case: Case, backend: str = "auto") -> None:
        super().__init__()
        _, _, self.H, self.L, self.P, _ = case.offsets.shape
        dim = case.value.shape[2] * case.value.shape[3]
        self.shapes, self.backend = case.shapes, backend
        self.offsets = nn.Linear(dim, self.H * self.L * self.P * 2)
        self.logits = nn.Linear(dim, self.H * self.L * self.P)
        self.value = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, memory: Tensor, valid_sizes: Tensor, reference: Tensor) -> Tensor:
        value = self.value(memory).unflatten(-1, (self.H, -1))
        offsets = self.offsets(queries).unflatten(-1, (self.H, self.L, self.P, 2))
        logits = self.logits(queries).unflatten(-1, (self.H, self.L * self.P))
        return fused_ms_deform_attn(value, self.shapes, valid_sizes, reference, offsets, logits, self.backend)


def attention(backend: str = "auto", Q: int = 5) -> tuple[Attention, tuple[Tensor, ...]]:
    case = make_case(0, Q=Q, reference_size=4)
    torch.manual_seed(0)
    inputs = (torch.randn(2, Q, 32), torch.randn(2, 42, 32), case.valid_sizes, case.reference.float())
    return Attention(case, backend), inputs


@pytest.mark.parametrize("reference_size", [2, 4])
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_gradcheck(backend: str, reference_size: int) -> None:
    case = make_case(1, B=2, Q=2, H=2, D=3, P=2, reference_size=reference_size)
    value, reference, offsets, logits = case.fused()

    def fused(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return fused_ms_deform_attn(value, case.shapes, case.valid_sizes, reference, offsets, logits, backend)

    assert torch.autograd.gradcheck(fused, (value, reference, offsets, logits))
    unfused = case.unfused()
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, case.shapes, x, w, backend), unfused)


@needs_cpu
@pytest.mark.parametrize("fused", [True, False])
def test_opcheck(fused: bool) -> None:
    case = make_case(2, reference_size=4)
    value, reference, offsets, logits = case.fused(torch.float32)
    _, locations, weights = case.unfused(torch.float32)
    rest = (FLAT, case.valid_sizes, reference, offsets, logits) if fused else (FLAT, None, None, locations, weights)
    torch.library.opcheck(ms_deform_attn_op, (value, *rest, "cpu"))
    fixed = [t.detach() if isinstance(t, Tensor) else t for t in (torch.randn(2, 5, 32), value, *rest)]
    torch.library.opcheck(ms_deform_attn_backward_op, (*fixed, "cpu", fused))


@pytest.mark.parametrize("default", ["auto", "reference"])
def test_compiles_without_graph_breaks(default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of the backend, a build included, is a constant to the compiler."""
    torch.compiler.reset()
    monkeypatch.setattr(backends, "_default", default)
    monkeypatch.setattr(backends, "_failures", {})
    cpu.library.cache_clear()
    module, inputs = attention()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output = compiled(*inputs)
    expected = module(*inputs)
    expected.square().sum().backward()
    grads = [p.grad for p in module.parameters()]
    module.zero_grad()
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_export_holds_no_op_of_our_own() -> None:
    module, inputs = attention()
    program = torch.export.export(module, inputs)
    assert not any("align_detr" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_autocast_moves_the_value_and_not_the_locations(backend: str) -> None:
    case = make_case(3)
    value, reference, offsets, logits = case.fused(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = fused_ms_deform_attn(value, case.shapes, case.valid_sizes, reference, offsets, logits, backend)
    assert output.dtype == torch.bfloat16
    by_hand = fused_ms_deform_attn(value.bfloat16(), case.shapes, case.valid_sizes, reference, offsets, logits, backend)
    assert torch.equal(output, by_hand)
    output.float().sum().backward()
    assert value.grad is not None
    assert value.grad.dtype == torch.float32
    assert offsets.grad is not None
    assert offsets.grad.abs().sum() > 0


@needs_cpu
@pytest.mark.parametrize("fused", [True, False])
def test_results_do_not_depend_on_the_number_of_threads(fused: bool) -> None:
    case = make_case(4, B=1, Q=300, H=3, reference_size=4)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            inputs = case.fused(torch.float32) if fused else case.unfused(torch.float32)
            if fused:
                output = fused_ms_deform_attn(inputs[0], case.shapes, case.valid_sizes, *inputs[1:], backend="cpu")
            else:
                output = ms_deform_attn(inputs[0], case.shapes, *inputs[1:], backend="cpu")
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_cpu
def test_gradients_only_of_what_needs_them() -> None:
    case = make_case(5, reference_size=4)
    value, reference, offsets, logits = case.fused(torch.float32)
    output = fused_ms_deform_attn(value, case.shapes, case.valid_sizes, reference.detach(), offsets, logits, "cpu")
    output.sum().backward()
    assert reference.grad is None
    assert all(t.grad is not None for t in (value, offsets, logits))
    output = fused_ms_deform_attn(value, case.shapes, case.valid_sizes, reference, offsets, logits, "cpu")
    grad = torch.autograd.grad(output.sum(), value, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"derivative|autograd"):
        grad.sum().backward()


@needs_cpu
def test_saves_less_than_the_unfused_form_under_autocast() -> None:
    """Beside the value, 16-bit offsets and logits are kept instead of float32 locations and weights: half the bytes."""
    case = make_case(6, Q=64)
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    value, reference, _, _ = case.fused(torch.bfloat16)
    offsets, logits = case.offsets.bfloat16().requires_grad_(), case.logits.bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        fused_ms_deform_attn(value, case.shapes, case.valid_sizes, reference, offsets, logits, "cpu")
    constant = sum(t.untyped_storage().nbytes() for t in (value, reference, case.valid_sizes))
    samples = 64 * 2 * 2 * 2 * 3
    assert sum(saved.values()) - constant == samples * 3 * 2
    unfused = samples * 3 * 4
    assert sum(saved.values()) - constant <= unfused / 2


def test_importing_the_op_does_not_import_the_compiler() -> None:
    """It takes seconds, at every start."""
    code = "import sys; import torch; import ops.ms_deform_attn; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
