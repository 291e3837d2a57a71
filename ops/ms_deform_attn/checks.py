"""Argument checks of the op: every complaint names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_value(value: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Check ``value[B, S, H, D]`` and return ``spatial_shapes`` as a tuple of pairs."""
    if isinstance(spatial_shapes, Tensor):
        raise ValueError("spatial_shapes must be a sequence of (h, w) integers on the host, not a tensor")
    if value.dim() != 4:
        raise ValueError(f"value must be [B, S, H, D], got {list(value.shape)}")
    if value.dtype not in VALUE_DTYPES:
        raise ValueError(f"value must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.shape[2] < 1 or value.shape[3] < 1:
        raise ValueError(f"value needs at least one head and one channel, got {list(value.shape)}")
    shapes = []
    for level, shape in enumerate(spatial_shapes):
        if len(shape) != 2:
            raise ValueError(f"spatial_shapes[{level}] must be (h, w), got {shape}")
        h, w = shape
        if h < 1 or w < 1:
            raise ValueError(f"spatial_shapes[{level}] must be positive, got ({h}, {w})")
        shapes.append((h, w))
    if not shapes:
        raise ValueError("spatial_shapes must have at least one level")
    tokens = sum(h * w for h, w in shapes)
    if tokens != value.shape[1]:
        raise ValueError(f"spatial_shapes hold {tokens} pixels, but value has {value.shape[1]}")
    return tuple(shapes)


def check_unfused(value: Tensor, levels: int, sampling_locations: Tensor, attention_weights: Tensor) -> None:
    """Check the tensors of the unfused form against ``value``."""
    B, _, H, _ = value.shape
    _check_samples("sampling_locations", sampling_locations, value, levels)
    expected = [B, sampling_locations.shape[1], H, levels, sampling_locations.shape[4]]
    if list(attention_weights.shape) != expected:
        raise ValueError(f"attention_weights must be [B, Q, H, L, P] = {expected}, got {list(attention_weights.shape)}")
    _check_companion("attention_weights", attention_weights, value)


def check_fused(
    value: Tensor, levels: int, valid_sizes: Tensor, reference: Tensor, sampling_offsets: Tensor, weight_logits: Tensor
) -> None:
    """Check the tensors of the fused form against ``value``."""
    B, _, H, _ = value.shape
    _check_samples("sampling_offsets", sampling_offsets, value, levels)
    Q, P = sampling_offsets.shape[1], sampling_offsets.shape[4]
    if list(valid_sizes.shape) != [B, levels, 2]:
        raise ValueError(f"valid_sizes must be [B, L, 2] = {[B, levels, 2]}, got {list(valid_sizes.shape)}")
    if valid_sizes.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"valid_sizes must be int64 or int32, got {valid_sizes.dtype}")
    if valid_sizes.device != value.device:
        raise ValueError(f"valid_sizes is on {valid_sizes.device}, but value is on {value.device}")
    if reference.dim() != 3 or reference.shape[0] != B or reference.shape[1] != Q or reference.shape[2] not in (2, 4):
        raise ValueError(f"reference must be [B, Q, 2 or 4] = [{B}, {Q}, 2 or 4], got {list(reference.shape)}")
    _check_companion("reference", reference, value)
    if list(weight_logits.shape) not in ([B, Q, H, levels * P], [B, Q, H, levels, P]):
        raise ValueError(
            f"weight_logits must be [B, Q, H, L*P] = {[B, Q, H, levels * P]} or {[B, Q, H, levels, P]}, "
            f"got {list(weight_logits.shape)}"
        )
    _check_companion("weight_logits", weight_logits, value)


def _check_samples(name: str, tensor: Tensor, value: Tensor, levels: int) -> None:
    """Check a ``[B, Q, H, L, P, 2]`` tensor."""
    B, _, H, _ = value.shape
    shape = tensor.shape
    if len(shape) != 6 or shape[0] != B or shape[2] != H or shape[3] != levels or shape[4] < 1 or shape[5] != 2:
        raise ValueError(f"{name} must be [B, Q, H, L, P, 2] = [{B}, Q, {H}, {levels}, P, 2], got {list(shape)}")
    _check_companion(name, tensor, value)


def _check_companion(name: str, tensor: Tensor, value: Tensor) -> None:
    """Check dtype and device of a tensor that is used beside ``value``."""
    if tensor.dtype not in VALUE_DTYPES:
        raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.device != value.device:
        raise ValueError(f"{name} is on {tensor.device}, but value is on {value.device}")
