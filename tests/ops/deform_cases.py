"""Random inputs of the deformable attention op, and an implementation that is nothing but its definition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the kernels against the float64 reference, relative to the largest element."""


@dataclass
class Case:
    """Inputs of the fused form in float64, and the same samples as inputs of the unfused one."""

    shapes: list[tuple[int, int]]
    value: Tensor
    valid_sizes: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    pixels: Tensor

    def fused(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Leaves (value in ``dtype``; reference, offsets, logits in float32 at most as precise) with gradients."""
        other = torch.float64 if dtype == torch.float64 else torch.float32
        return (
            leaf(self.value, dtype),
            leaf(self.reference, other),
            leaf(self.offsets, other),
            leaf(self.logits, other),
        )

    def unfused(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """Leaves (value in ``dtype``, locations, weights) with gradients."""
        other = torch.float64 if dtype == torch.float64 else torch.float32
        sizes = torch.tensor([(w, h) for h, w in self.shapes], dtype=torch.float64)[:, None]
        weights = self.logits.flatten(3).softmax(-1).view(self.logits.shape)
        return leaf(self.value, dtype), leaf((self.pixels + 0.5) / sizes, other), leaf(weights, other)


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that collects gradients."""
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def make_case(
    seed: int,
    B: int = 2,
    Q: int = 5,
    H: int = 2,
    D: int = 16,
    shapes: list[tuple[int, int]] | None = None,
    P: int = 3,
    reference_size: int = 2,
    padded: bool = True,
) -> Case:
    """Samples are everywhere in and around the maps, but not at pixel borders, where the gradient jumps."""
    shapes = shapes or [(6, 5), (3, 4)]
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64) * (high - low) + low

    L, S = len(shapes), sum(h * w for h, w in shapes)
    full = torch.tensor(shapes)[None].expand(B, L, 2)
    valid = full - (uniform(B, L, 2) * full / 2 * padded).long()
    sizes = valid.flip(-1)[:, None, None, :, None].double()
    cells = (uniform(B, Q, H, L, P, 2, low=-0.2, high=1.2) * sizes).floor()
    pixels = cells + uniform(B, Q, H, L, P, 2, low=0.05, high=0.95) - 1
    reference = uniform(B, Q, reference_size, low=0.1, high=0.9)
    centres = reference[:, :, None, None, None, :2]
    if reference_size == 2:
        offsets = pixels + 0.5 - centres * sizes
    else:
        offsets = ((pixels + 0.5) / sizes - centres) / (0.5 * reference[:, :, None, None, None, 2:]) * P
    logits = uniform(B, Q, H, L, P, low=-2, high=2)
    value = torch.randn(B, S, H, D, generator=generator, dtype=torch.float64)
    return Case(list(shapes), value, valid.contiguous(), reference, offsets, logits, pixels)


def by_definition(case: Case) -> Tensor:
    """The fused form, one sample, one tap and one term after another (Deformable DETR, equation 3)."""
    B, Q, H, _, P, _ = case.offsets.shape
    D = case.value.shape[-1]
    output = torch.zeros(B, Q, H, D, dtype=torch.float64)
    starts = [0]
    for h, w in case.shapes:
        starts.append(starts[-1] + h * w)
    for b in range(B):
        for q in range(Q):
            for head in range(H):
                terms = [math.exp(z) for z in case.logits[b, q, head].flatten().tolist()]
                for level, (_, w) in enumerate(case.shapes):
                    valid_h, valid_w = case.valid_sizes[b, level].tolist()
                    for point in range(P):
                        x, y = case.pixels[b, q, head, level, point].tolist()
                        weight = terms[level * P + point] / sum(terms)
                        for column in (math.floor(x), math.floor(x) + 1):
                            for row in (math.floor(y), math.floor(y) + 1):
                                if 0 <= column < valid_w and 0 <= row < valid_h:
                                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                                    pixel = case.value[b, starts[level] + row * w + column, head]
                                    output[b, q, head] += weight * share * pixel
    return output.flatten(2)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


def make_pyramid(seed: int, **options: Any) -> Case:
    """Queries are the pixels, and samples are near them, but for some."""
    case = make_case(seed, **{"H": 2, "P": 2, **options})
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
