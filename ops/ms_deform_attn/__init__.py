"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3) as one op with several backends.

Sizes: B images, S pixels of all levels, Q queries, H heads, D channels per head, L levels, P points per level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ops.ms_deform_attn import reference as _reference
from ops.ms_deform_attn.backends import (
    BackendName,
    available_backends,
    describe_backend,
    resolve,
    set_default_backend,
)
from ops.ms_deform_attn.checks import check_fused, check_unfused, check_value
from ops.ms_deform_attn.library import KERNELS, autocast_value, ms_deform_attn_op

__all__ = [
    "BackendName",
    "available_backends",
    "describe_backend",
    "fused_ms_deform_attn",
    "ms_deform_attn",
    "set_default_backend",
]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples around each query, as the papers define it.

    Args:
        value: [B, S, H, D] float32, bfloat16, float16 or float64; level after level in raster order.
        spatial_shapes: (h, w) of each level, integers on the host; their products sum to S.
        sampling_locations: [B, Q, H, L, P, 2] (x, y) in [0, 1] of the (padded) map. What lies outside the map, is
            infinite or NaN contributes nothing.
        attention_weights: [B, Q, H, L, P], normally normalised over the last two dimensions.
        backend: ``auto``, or the name of one.

    Returns:
        [B, Q, H*D] in the dtype of ``value``; locations and accumulation are float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype or device is wrong (the message names the argument), or the backend is not available.
    """
    shapes = check_value(value, spatial_shapes)
    check_unfused(value, len(shapes), sampling_locations, attention_weights)
    flat = [size for shape in shapes for size in shape]
    chosen = _choose(backend, value, flat, sampling_locations)
    if chosen == "reference":
        return _reference.ms_deform_attn(autocast_value(value), shapes, sampling_locations, attention_weights)
    return ms_deform_attn_op(value, flat, None, None, sampling_locations, attention_weights, chosen)


def fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    valid_sizes: Tensor,
    reference: Tensor,
    sampling_offsets: Tensor,
    weight_logits: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Deformable attention from raw projections: softmax, location arithmetic and padding mask happen inside.

    Pixel coordinates have pixel centres at integers. For a reference point, x = cx * valid_w + offset_x - 0.5; for a
    reference box, x = (cx + offset_x / P * w * 0.5) * valid_w - 0.5; y likewise (Deformable DETR, appendix A.3, A.4).

    Args:
        value: [B, S, H, D] float32, bfloat16, float16 or float64; level after level in raster order.
        spatial_shapes: (h, w) of each level, integers on the host; their products sum to S.
        valid_sizes: [B, L, 2] integers: (h, w) of the region of each level that is not padding. Pixels outside it
            count as zeros, whatever they hold.
        reference: [B, Q, 2] points (cx, cy) or [B, Q, 4] boxes (cx, cy, w, h), in [0, 1] of the unpadded image.
        sampling_offsets: [B, Q, H, L, P, 2] (x, y).
        weight_logits: [B, Q, H, L*P] or [B, Q, H, L, P], before the softmax over all L*P samples.
        backend: ``auto``, or the name of one.

    Returns:
        [B, Q, H*D] in the dtype of ``value``; locations and accumulation are float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype or device is wrong (the message names the argument), or the backend is not available.
    """
    shapes = check_value(value, spatial_shapes)
    check_fused(value, len(shapes), valid_sizes, reference, sampling_offsets, weight_logits)
    flat = [size for shape in shapes for size in shape]
    chosen = _choose(backend, value, flat, sampling_offsets)
    if chosen == "reference":
        return _reference.fused_ms_deform_attn(
            autocast_value(value), shapes, valid_sizes, reference, sampling_offsets, weight_logits
        )
    logits = weight_logits.reshape(sampling_offsets.shape[:-1])
    return ms_deform_attn_op(value, flat, valid_sizes, reference, sampling_offsets, logits, chosen)


def _choose(backend: str, value: Tensor, spatial_shapes: Sequence[int], samples: Tensor) -> str:
    """The implementation for this call; exported programs hold plain PyTorch operations only."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "reference"
    chosen = resolve(backend, value.device.type, value.dtype == torch.float64)
    if chosen == "reference" or KERNELS[chosen].supports(value, spatial_shapes, samples):
        return chosen
    if backend == "auto":
        return "reference"
    raise ValueError(f"backend {backend!r} of ms_deform_attn has no room for value {list(value.shape)} at these sizes")
