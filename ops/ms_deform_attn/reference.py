"""Multi-scale deformable attention in plain PyTorch: the truth that every kernel is held against, and the export path.

Source: Deformable DETR, arXiv 2010.04159, equation 3. Differentiable by autograd and exportable; slow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OUTSIDE = -2.0
"""A pixel coordinate whose four bilinear taps all lie outside every map."""


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Unfused form; shapes as in ``ops.ms_deform_attn.ms_deform_attn``, arguments already checked."""
    dtype = compute_dtype(value)
    # Filled on the device: a list would be copied to it, which waits for it and cannot be part of a CUDA graph.
    sides = [sampling_locations.new_full((), side, dtype=dtype) for h, w in spatial_shapes for side in (w, h)]
    sizes = torch.stack(sides).view(-1, 2)  # [L, 2] as (x, y)
    locations = sampling_locations.to(dtype)
    inside = _inside(locations.detach() * sizes[:, None] - 0.5, sizes[:, None])
    pixels = torch.where(inside, locations, 0.0) * sizes[:, None] - 0.5
    pixels = torch.where(inside, pixels, OUTSIDE)
    return _sample(value.to(dtype), spatial_shapes, pixels, attention_weights.to(dtype)).to(value.dtype)


def fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    valid_sizes: Tensor,
    reference: Tensor,
    sampling_offsets: Tensor,
    weight_logits: Tensor,
) -> Tensor:
    """Fused form; shapes as in ``ops.ms_deform_attn.fused_ms_deform_attn``, arguments already checked."""
    dtype = compute_dtype(value)
    offsets, reference = sampling_offsets.to(dtype), reference.to(dtype)
    sizes = valid_sizes.flip(-1).to(dtype)[:, None, None, :, None]  # [B, 1, 1, L, 1, 2] as (x, y)
    centres = reference[:, :, None, None, None, :2]
    extents = reference[:, :, None, None, None, 2:] if reference.shape[-1] == 4 else None
    # A sample outside the map contributes nothing, to no gradient either: 0 * inf must not turn into NaN.
    with torch.no_grad():
        inside = _inside(pixel_locations(centres, extents, offsets, sizes), sizes)
    offsets = torch.where(inside, offsets, 0.0)
    centres = torch.where(inside, centres, 0.0)
    extents = None if extents is None else torch.where(inside, extents, 0.0)
    pixels = torch.where(inside, pixel_locations(centres, extents, offsets, sizes), OUTSIDE)
    weights = weight_logits.to(dtype).flatten(3).softmax(-1).view(offsets.shape[:-1])
    masked = mask_padding(value.to(dtype), spatial_shapes, valid_sizes)
    return _sample(masked, spatial_shapes, pixels, weights).to(value.dtype)


def compute_dtype(value: Tensor) -> torch.dtype:
    """Locations and accumulation are in float32, whatever the value's precision, or in float64 with it."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def pixel_locations(centres: Tensor, extents: Tensor | None, offsets: Tensor, sizes: Tensor) -> Tensor:
    """[B, Q, H, L, P, 2] sampling locations (x, y) in pixels, whose centres are at integers.

    Offsets are in pixels for reference points, and relative to half the box divided by P for reference boxes.
    """
    if extents is None:
        return centres * sizes + offsets - 0.5
    return (centres + offsets / offsets.shape[-2] * extents * 0.5) * sizes - 0.5


def mask_padding(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], valid_sizes: Tensor) -> Tensor:
    """``value[B, S, H, D]`` with zeros at the pixels outside ``valid_sizes[B, L, 2]`` (h, w)."""
    valid = []
    for level, (h, w) in enumerate(spatial_shapes):
        rows = torch.arange(h, device=value.device) < valid_sizes[:, level, 0, None]
        columns = torch.arange(w, device=value.device) < valid_sizes[:, level, 1, None]
        valid.append((rows[:, :, None] & columns[:, None, :]).flatten(1))
    return value.masked_fill(~torch.cat(valid, 1)[:, :, None, None], 0.0)


def _inside(pixels: Tensor, sizes: Tensor) -> Tensor:
    """[..., 1] whether any bilinear tap lies within the map; False for NaN."""
    return ((pixels >= -1) & (pixels < sizes)).all(-1, keepdim=True)


def _sample(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], pixels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples: value[B, S, H, D], pixels[B, Q, H, L, P, 2], weights[B, Q, H, L, P]."""
    B, _, H, D = value.shape
    Q, P = pixels.shape[1], pixels.shape[4]
    total = value.new_zeros(B * H, D, Q)
    levels = value.split([h * w for h, w in spatial_shapes], 1)
    for level, (h, w) in enumerate(spatial_shapes):
        maps = levels[level].permute(0, 2, 3, 1).reshape(B * H, D, h, w)
        # Python numbers as operands, not a tensor made of them: that would fix the sizes in an exported graph.
        x, y = pixels[:, :, :, level].unbind(-1)
        grid = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], dim=-1)
        grid = grid.transpose(1, 2).reshape(B * H, Q, P, 2)
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        total = total + (samples * weights[:, :, :, level].transpose(1, 2).reshape(B * H, 1, Q, P)).sum(-1)
    return total.view(B, H, D, Q).permute(0, 3, 1, 2).reshape(B, Q, H * D)
