"""Values and gradients of the deformable attention op, against its definition and the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deform_cases import by_definition, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.ms_deform_attn import available_backends, fused_ms_deform_attn, ms_deform_attn

BACKENDS = [name for name in ("reference", "cpu") if available_backends()[name] is None]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest error relative to the largest entry."""
    assert actual.shape == expected.shape
    scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


def gradients(output: Tensor, inputs: tuple[Tensor, ...], seed: int = 0) -> tuple[Tensor, ...]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((output.double() * weight).sum(), inputs)


@pytest.mark.parametrize("reference_size", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_the_definition(backend: str, reference_size: int) -> None:
    case = make_case(0, reference_size=reference_size, Q=4, D=3)
    value, reference, offsets, logits = case.fused()
    output = fused_ms_deform_attn(value, case.shapes, case.valid_sizes, reference, offsets, logits, backend)
    close(output, by_definition(case), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unfused_output_is_the_definition(backend: str) -> None:
    case = make_case(1, padded=False, Q=4, D=3)
    value, locations, weights = case.unfused()
    close(ms_deform_attn(value, case.shapes, locations, weights, backend), by_definition(case), 1e-12)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ compiler")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    B=st.integers(1, 3),
    Q=st.sampled_from([1, 2, 63, 64, 65, 130]),
    H=st.integers(1, 5),
    D=st.sampled_from([1, 7, 16, 32, 33, 64]),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    P=st.integers(1, 9),
    reference_size=st.sampled_from([2, 4]),
    dtype=st.sampled_from(list(TOLERANCE)),
    fused=st.booleans(),
)
def test_kernels_match_the_float64_reference(
    seed: int, B: int, Q: int, H: int, D: int, shapes: Any, P: int, reference_size: int, dtype: torch.dtype, fused: bool
) -> None:
    case = make_case(seed, B, Q, H, D, shapes, P, reference_size, padded=fused)
    case.value = case.value.to(dtype).double()  # what is tested is the op, not the rounding of its input
    exact, actual = (case.fused(), case.fused(dtype)) if fused else (case.unfused(), case.unfused(dtype))

    def run(inputs: tuple[Tensor, ...], backend: str) -> Tensor:
        if fused:
            return fused_ms_deform_attn(inputs[0], case.shapes, case.valid_sizes, *inputs[1:], backend=backend)
        return ms_deform_attn(inputs[0], case.shapes, *inputs[1:], backend=backend)

    expected, output = run(exact, "reference"), run(actual, "cpu")
    assert output.dtype == dtype
    close(output, expected, TOLERANCE[dtype])
    for grad, expected_grad in zip(gradients(output, actual), gradients(expected, exact), strict=True):
        close(grad, expected_grad, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_that_are_nowhere_contribute_nothing(backend: str, reference_size: int, dtype: torch.dtype) -> None:
    case = make_case(2, reference_size=reference_size)
    plain = fused_ms_deform_attn(
        case.value.to(dtype), case.shapes, case.valid_sizes, *(t.detach() for t in case.fused(dtype)[1:]), backend
    )
    nowhere = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 1e9], dtype=torch.float64)
    flat = case.offsets.view(-1, 2)
    for i, bad in enumerate(nowhere):
        flat[4 * i, i % 2] = bad
    lost = torch.zeros(case.logits.numel(), dtype=torch.bool)
    lost[[4 * i for i in range(len(nowhere))]] = True
    inputs = case.fused(dtype)
    output = fused_ms_deform_attn(inputs[0], case.shapes, case.valid_sizes, *inputs[1:], backend)
    assert output.isfinite().all()
    grads = gradients(output, inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[2].view(-1, 2)[lost] == 0).all()
    # The other samples of the same query keep their weights: dropping by hand gives the same output.
    contributions = by_definition_without(case, lost, backend, dtype)
    close(output, contributions, TOLERANCE[dtype])
    assert not torch.equal(output, plain)


def by_definition_without(case: Any, lost: Tensor, backend: str, dtype: torch.dtype) -> Tensor:
    """The unfused form on the padded-to-zero value, with the lost samples' weights set to zero."""
    from ops.ms_deform_attn.reference import mask_padding

    _, locations, weights = case.unfused(dtype)
    weights = weights.detach().clone()
    weights.view(-1)[lost] = 0
    value = mask_padding(case.value.to(dtype), case.shapes, case.valid_sizes)
    return ms_deform_attn(value, case.shapes, locations.detach(), weights, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_read(backend: str) -> None:
    case = make_case(3, D=16, Q=40)
    inputs = case.fused(torch.float32)
    expected = fused_ms_deform_attn(inputs[0], case.shapes, case.valid_sizes, *inputs[1:], backend)
    expected_grads = gradients(expected, inputs)
    start = 0
    poisoned = inputs[0].detach().clone()
    inside = torch.zeros(poisoned.shape[:2], dtype=torch.bool)
    for level, (h, w) in enumerate(case.shapes):
        for image in range(len(poisoned)):
            valid_h, valid_w = case.valid_sizes[image, level].tolist()
            inside[image, start : start + h * w].view(h, w)[:valid_h, :valid_w] = True
        start += h * w
    assert not inside.all()
    poisoned[~inside] = float("nan")
    poisoned.requires_grad_()
    again = (poisoned, *inputs[1:])
    output = fused_ms_deform_attn(poisoned, case.shapes, case.valid_sizes, *inputs[1:], backend)
    assert torch.equal(output, expected)
    grads = gradients(output, again)
    assert (grads[0][~inside] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_do_not_mix(backend: str) -> None:
    case = make_case(4, B=3, Q=70)
    value, reference, offsets, logits = (t.detach() for t in case.fused(torch.float32))
    together = fused_ms_deform_attn(value, case.shapes, case.valid_sizes, reference, offsets, logits, backend)
    for b in range(3):
        one = slice(b, b + 1)
        alone = fused_ms_deform_attn(
            value[one], case.shapes, case.valid_sizes[one], reference[one], offsets[one], logits[one], backend
        )
        torch.testing.assert_close(alone[0], together[b], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "Q"), [(0, 5), (2, 0), (0, 0)])
def test_empty(backend: str, B: int, Q: int) -> None:
    case = make_case(5, B=2, Q=5)
    inputs = tuple(t.detach()[:B] for t in case.fused(torch.float32))
    inputs = (inputs[0], *(t[:, :Q] for t in inputs[1:]))
    for t in inputs:
        t.requires_grad_()
    output = fused_ms_deform_attn(inputs[0], case.shapes, case.valid_sizes[:B], *inputs[1:], backend)
    assert output.shape == (B, Q, 32)
    assert all((grad == 0).all() for grad in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_the_inputs_does_not_matter(backend: str) -> None:
    case = make_case(6)
    inputs = case.fused(torch.float32)

    def scattered(tensor: Tensor) -> Tensor:
        wide = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype).transpose(0, 1).contiguous()
        view = wide.transpose(0, 1)[..., ::2]
        view.copy_(tensor)
        assert not view.is_contiguous()
        return view

    strided = tuple(scattered(t.detach()).requires_grad_() for t in inputs)
    output = fused_ms_deform_attn(inputs[0], case.shapes, case.valid_sizes, *inputs[1:], backend)
    again = fused_ms_deform_attn(
        strided[0],
        case.shapes,
        case.valid_sizes.mT.contiguous().mT.int(),
        *strided[1:3],
        strided[3].flatten(3),
        backend,
    )
    assert torch.equal(output, again)
    for a, b in zip(gradients(output, inputs), gradients(again, strided), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_small_gradients_add_up(backend: str, dtype: torch.dtype) -> None:
    """In 16 bits, 256 + 1 = 256: a pixel that collects 3000 contributions must collect them in float32."""
    value = torch.zeros(1, 1, 1, 16, dtype=dtype, requires_grad=True)
    locations = torch.full((1, 3000, 1, 1, 1, 2), 0.5)
    weights = torch.ones(1, 3000, 1, 1, 1)
    ms_deform_attn(value, [(1, 1)], locations, weights, backend).sum().backward()
    assert value.grad is not None
    torch.testing.assert_close(value.grad, torch.full_like(value, 3000.0), rtol=0.01, atol=0)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ compiler")
def test_softmax_of_extreme_logits() -> None:
    case = make_case(7)
    case.logits = case.logits * 1000
    value, reference, offsets, logits = (t.detach() for t in case.fused(torch.float32))
    kernel = fused_ms_deform_attn(value, case.shapes, case.valid_sizes, reference, offsets, logits, "cpu")
    expected = fused_ms_deform_attn(
        value.double(),
        case.shapes,
        case.valid_sizes,
        reference.double(),
        offsets.double(),
        logits.double(),
        "reference",
    )
    close(kernel, expected, 1e-4)
    logits[0, 0, 0, 0, 0] = float("nan")
    poisoned = fused_ms_deform_attn(value, case.shapes, case.valid_sizes, reference, offsets, logits, "cpu")
    assert poisoned[0, 0, :16].isnan().all()
    assert torch.equal(poisoned[:, 1:], kernel[:, 1:])


BAD = {
    "value": {"value": torch.zeros(2, 42, 16)},
    "value dtype": {"value": torch.zeros(2, 42, 2, 16, dtype=torch.int32)},
    "value heads": {"value": torch.zeros(2, 42, 0, 16)},
    "spatial_shapes": {"spatial_shapes": [(6, 5)]},
    "spatial_shapes tensor": {"spatial_shapes": torch.tensor([[6, 5], [3, 4]])},
    "spatial_shapes sign": {"spatial_shapes": [(6, 5), (-3, -4)]},
    "spatial_shapes none": {"spatial_shapes": [], "value": torch.zeros(2, 0, 2, 16)},
    "spatial_shapes pair": {"spatial_shapes": [(6, 5), (3, 4, 1)]},
    "valid_sizes": {"valid_sizes": torch.ones(2, 3, 2, dtype=torch.long)},
    "valid_sizes dtype": {"valid_sizes": torch.ones(2, 2, 2)},
    "valid_sizes device": {"valid_sizes": torch.ones(2, 2, 2, dtype=torch.long, device="meta")},
    "reference": {"reference": torch.zeros(2, 5, 3)},
    "reference dtype": {"reference": torch.zeros(2, 5, 2, dtype=torch.long)},
    "sampling_offsets": {"sampling_offsets": torch.zeros(2, 5, 2, 2, 3)},
    "sampling_offsets levels": {"sampling_offsets": torch.zeros(2, 5, 2, 3, 3, 2)},
    "sampling_offsets device": {"sampling_offsets": torch.zeros(2, 5, 2, 2, 3, 2, device="meta")},
    "weight_logits": {"weight_logits": torch.zeros(2, 5, 2, 5)},
    "backend": {"backend": "magic"},
    "backend device": {"backend": "cuda"},
}


@pytest.mark.parametrize("change", BAD)
def test_wrong_arguments_are_named(change: str) -> None:
    case = make_case(8)
    value, reference, offsets, logits = (t.detach() for t in case.fused(torch.float32))
    arguments: dict[str, Any] = {
        "value": value,
        "spatial_shapes": case.shapes,
        "valid_sizes": case.valid_sizes,
        "reference": reference,
        "sampling_offsets": offsets,
        "weight_logits": logits,
    }
    fused_ms_deform_attn(**arguments)
    with pytest.raises(ValueError, match=change.split()[0]):
        fused_ms_deform_attn(**{**arguments, **BAD[change]})


def test_wrong_arguments_of_the_unfused_form_are_named() -> None:
    value, locations, weights = (t.detach() for t in make_case(9).unfused(torch.float32))
    shapes = [(6, 5), (3, 4)]
    with pytest.raises(ValueError, match="sampling_locations"):
        ms_deform_attn(value, shapes, locations[:, :, :, :1], weights)
    with pytest.raises(ValueError, match="attention_weights"):
        ms_deform_attn(value, shapes, locations, weights.flatten(3))
    with pytest.raises(ValueError, match="attention_weights"):
        ms_deform_attn(value, shapes, locations, weights.long())
