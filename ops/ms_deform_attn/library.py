"""The op as torch.library knows it: kernels, shapes for tracing, gradients and autocast.

One op serves both forms: ``valid_sizes`` and ``reference`` are None in the unfused one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.ms_deform_attn import cpu, cuda
from ops.ms_deform_attn.arguments import Arguments

KERNELS = {"cpu": cpu, "cuda": cuda}


@torch.library.custom_op("align_detr::ms_deform_attn", mutates_args=())
def ms_deform_attn_op(
    value: Tensor,
    spatial_shapes: Sequence[int],
    valid_sizes: Tensor | None,
    reference: Tensor | None,
    samples: Tensor,
    weights: Tensor,
    backend: str,
) -> Tensor:
    """[B, Q, H*D]; torch.library wants every one of ``Arguments`` by itself."""
    return KERNELS[backend].forward(Arguments(value, spatial_shapes, valid_sizes, reference, samples, weights))


@torch.library.custom_op("align_detr::ms_deform_attn_backward", mutates_args=())
def ms_deform_attn_backward_op(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    valid_sizes: Tensor | None,
    reference: Tensor | None,
    samples: Tensor,
    weights: Tensor,
    backend: str,
    needs_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, reference (empty unless needed), samples and weights."""
    arguments = Arguments(value, spatial_shapes, valid_sizes, reference, samples, weights)
    grads = KERNELS[backend].backward(grad_output, arguments, needs_reference)
    return grads[0], value.new_empty(0) if grads[1] is None else grads[1], grads[2], grads[3]


@ms_deform_attn_op.register_fake
def _forward_fake(value: Tensor, *others: Any) -> Tensor:
    *rest, _ = others
    samples = Arguments(value, *rest).samples
    return value.new_empty(value.shape[0], samples.shape[1], value.shape[2] * value.shape[3])


@ms_deform_attn_backward_op.register_fake
def _backward_fake(grad_output: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, _, needs_reference = others
    x = Arguments(value, *rest)
    reference = x.reference if needs_reference and x.reference is not None else value.new_empty(0)
    made = [tensor.new_empty(tensor.shape) for tensor in (value, reference, x.samples, x.weights)]
    return made[0], made[1], made[2], made[3]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, *tensors, ctx.backend = inputs
    ctx.save_for_backward(value, *tensors)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, *tensors = ctx.saved_tensors
    needs_reference = ctx.needs_input_grad[3]
    grad_value, grad_reference, grad_samples, grad_weights = ms_deform_attn_backward_op(
        grad_output, value, ctx.spatial_shapes, *tensors, ctx.backend, needs_reference
    )
    return grad_value, None, None, grad_reference if needs_reference else None, grad_samples, grad_weights, None


ms_deform_attn_op.register_autograd(_backward, setup_context=_setup_context)


def autocast_value(value: Tensor) -> Tensor:
    """``value`` in the dtype of autocast, where it is on; as everywhere, float64 stays.

    Locations and weights keep their precision, which the sampling positions need.
    """
    kind = value.device.type
    if value.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return value
    return value.to(torch.get_autocast_dtype(kind))


def _autocast(device_type: str) -> Callable[..., Tensor]:
    def kernel(value: Tensor, *rest: Any) -> Tensor:
        value = autocast_value(value)
        with torch.autocast(device_type, enabled=False):
            return ms_deform_attn_op(value, *rest)

    return kernel


_implementations = torch.library.Library("align_detr", "IMPL")
_implementations.impl("ms_deform_attn", _autocast("cpu"), "AutocastCPU")
_implementations.impl("ms_deform_attn", _autocast("cuda"), "AutocastCUDA")
