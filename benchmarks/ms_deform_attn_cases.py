"""Inputs on which multi-scale deformable attention is timed: those of DINO on an image of 800 x 1333."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = [(100, 167), (50, 84), (25, 42), (13, 21)]
"""Levels of an 800 x 1333 image at strides 8 to 64."""
HEADS, CHANNELS, POINTS, DECODER_QUERIES = 8, 32, 4, 1100
CASES = ("encoder, grid", "encoder, uniform", "decoder")


class Inputs(NamedTuple):
    """Arguments of the fused form, and the same samples for the unfused one."""

    value: Tensor
    valid_sizes: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    locations: Tensor
    weights: Tensor

    def to(self, dtype: torch.dtype, device: str | torch.device) -> Inputs:
        """Value in ``dtype``, the rest in float32 or float64; all but sizes and reference collect gradients."""
        other = torch.float64 if dtype == torch.float64 else torch.float32
        moved = [t.to(device) if t is self.valid_sizes else t.to(device, other) for t in self]
        moved[0] = self.value.to(device, dtype)
        for i in (0, 3, 4, 5, 6):
            moved[i] = moved[i].detach().requires_grad_()
        return Inputs(*moved)


def make_inputs(case: str) -> Inputs:
    """Float32 inputs of batch size 1: offsets of about two pixels around grid points, uniform points, or boxes."""
    generator = torch.Generator().manual_seed(0)
    S, L = sum(h * w for h, w in SHAPES), len(SHAPES)
    if case == "encoder, grid":
        axes = [((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in SHAPES]
        grids = [torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).flatten(0, 1) for y, x in axes]
        reference = torch.cat(grids)[None]
    elif case == "encoder, uniform":
        reference = torch.rand(1, S, 2, generator=generator)
    else:
        reference = torch.rand(1, DECODER_QUERIES, 4, generator=generator) * 0.5 + 0.1
    Q = reference.shape[1]
    value = torch.randn(1, S, HEADS, CHANNELS, generator=generator)
    offsets = 2 * torch.randn(1, Q, HEADS, L, POINTS, 2, generator=generator)
    logits = torch.randn(1, Q, HEADS, L, POINTS, generator=generator)
    valid_sizes = torch.tensor(SHAPES)[None]
    sizes = torch.tensor([(w, h) for h, w in SHAPES])[:, None]
    spread = reference[:, :, None, None, None]
    if reference.shape[-1] == 2:
        locations = spread + offsets / sizes
    else:
        locations = spread[..., :2] + offsets / POINTS * spread[..., 2:] * 0.5
    return Inputs(
        value, valid_sizes, reference, offsets, logits, locations, logits.flatten(3).softmax(-1).view(logits.shape)
    )
