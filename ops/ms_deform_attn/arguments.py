"""What a kernel is given, in either form of the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The checked arguments of one call; ``valid_sizes`` and ``reference`` are None in the unfused form."""

    value: Tensor
    """[B, S, H, D]."""
    spatial_shapes: Sequence[int]
    """h, w of each level, flat."""
    valid_sizes: Tensor | None
    """[B, L, 2]."""
    reference: Tensor | None
    """[B, Q, 2 or 4]."""
    samples: Tensor
    """[B, Q, H, L, P, 2] offsets (fused) or locations."""
    weights: Tensor
    """[B, Q, H, L, P] logits (fused) or weights."""
