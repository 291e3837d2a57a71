"""From backbone features to equally wide levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Neck(nn.Module):
    """1×1 convolution and GroupNorm on each backbone level, 3×3 stride-2 convolutions for the coarser ones.

    Source: Deformable DETR (arXiv 2010.04159, appendix A.2): the first extra level comes from the last backbone
    feature, each further one from the level before it.
    """

    def __init__(self, input_dims: Sequence[int], embed_dim: int, num_levels: int, num_groups: int = 32) -> None:
        super().__init__()
        if num_levels < len(input_dims):
            raise ValueError(f"num_levels {num_levels} is less than the {len(input_dims)} levels of the backbone")
        if embed_dim % num_groups:
            raise ValueError(f"embed_dim {embed_dim} is not divisible into {num_groups} groups of GroupNorm")

        def level(convolution: nn.Conv2d) -> nn.Sequential:
            nn.init.xavier_uniform_(convolution.weight)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
            return nn.Sequential(convolution, nn.GroupNorm(num_groups, embed_dim))

        self.lateral = nn.ModuleList(level(nn.Conv2d(dim, embed_dim, 1)) for dim in input_dims)
        extra_inputs = [input_dims[-1], *[embed_dim] * (num_levels - len(input_dims) - 1)]
        self.extra = nn.ModuleList(
            level(nn.Conv2d(dim, embed_dim, 3, stride=2, padding=1))
            for dim in extra_inputs[: num_levels - len(input_dims)]
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Backbone features [B, dim_i, h_i, w_i], finest first → num_levels maps [B, embed_dim, h, w]."""
        levels = [layer(feature) for layer, feature in zip(self.lateral, features, strict=True)]
        source = features[-1]
        for layer in self.extra:
            source = layer(source)
            levels.append(source)
        return levels
