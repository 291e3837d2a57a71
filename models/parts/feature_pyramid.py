"""Levels of several strides from the last map of a plain vision transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F


class SimpleFeaturePyramid(nn.Module):
    """Maps one map of stride s to maps of stride s/4, s/2, s and 2s.

    Source: ViTDet (arXiv 2203.16527, section 3 and appendix A.2): transposed convolutions, with a normalisation and a
    GELU between two, make the finer ones, pooling the coarser one. The 1×1 convolution that follows is the neck's.
    """

    SCALES = (0.25, 0.5, 1, 2)
    """Strides on offer, relative to that of the input."""

    def __init__(self, dim: int, stride: int, strides: Sequence[int]) -> None:
        """
        Args:
            dim: channels of the input, divisible by 4.
            stride: of the input, in pixels.
            strides: of the levels to make; each is one of ``SCALES`` times ``stride``.
        """
        super().__init__()
        self.levels = nn.ModuleList(_level(dim, level / stride) for level in strides)
        self.channels = tuple(dim // max(1, stride // level) for level in strides)

    def forward(self, feature: Tensor) -> list[Tensor]:
        """[B, dim, h, w] → a map [B, channels_i, h·stride/stride_i, w·stride/stride_i] for each level."""
        return [level(feature) for level in self.levels]


class _Halve(nn.Module):
    """The largest of each 2 × 2 values, of fewer at an odd end."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] → [B, C, ⌈h/2⌉, ⌈w/2⌉]."""
        # ceil_mode asks of an odd size what torch.export makes a rule of that no size keeps: the last is repeated here.
        for dim in (-2, -1):
            size = x.shape[dim]
            x = x.index_select(dim, torch.arange(2 * ((size + 1) // 2), device=x.device).clamp(max=size - 1))
        return F.max_pool2d(x, 2)


def _level(dim: int, scale: float) -> nn.Module:
    if scale >= 1:
        return nn.Identity() if scale == 1 else _Halve()
    finer: list[nn.Module] = [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)]
    if scale == 0.25:
        finer += [LayerNorm2d(dim // 2), nn.GELU(), nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)]
    return nn.Sequential(*finer)
