"""Where queries look: the sampling points and attention weights of a decoder's cross-attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Sampling(NamedTuple):
    """Of all queries of a batch; H heads, L levels, P points."""

    locations: Tensor
    """[B, Q, H, L, P, 2] (x, y) relative to the unpadded image; may lie outside of [0, 1]."""
    weights: Tensor
    """[B, Q, H, L, P], summing to 1 over levels and points."""
    reference: Tensor
    """[B, Q, 4] cxcywh boxes around which the points lie, relative to the unpadded image."""


def sampling_points(attention: nn.Module, query: Tensor, reference: Tensor) -> Sampling:
    """Where a deformable attention samples (Deformable DETR, arXiv 2010.04159, section 4.1 and appendix A.3).

    Args:
        attention: has the projections ``sampling_offsets`` and ``attention_weights``, and ``num_heads``,
            ``num_levels``, ``num_points``.
        query: [B, Q, embed_dim], position encoding included.
        reference: [B, Q, 4] cxcywh boxes.

    Raises:
        ValueError: it is no such module.
    """
    module: Any = attention
    try:
        groups = (module.num_heads, module.num_levels, module.num_points)
        offsets = module.sampling_offsets(query).unflatten(-1, (*groups, 2))
        logits = module.attention_weights(query).unflatten(-1, (groups[0], -1))
    except AttributeError as error:
        raise ValueError(f"{type(attention).__name__} is not a deformable attention: {error}") from error
    centre, size = reference[:, :, None, None, None, :2], reference[:, :, None, None, None, 2:]
    locations = centre + offsets / groups[2] * size * 0.5
    weights = logits.softmax(-1).unflatten(-1, groups[1:])
    return Sampling(locations.float(), weights.float(), reference.float())


def last_cross_attention(model: nn.Module) -> nn.Module:
    """That of the model's last decoder layer.

    Raises:
        ValueError: the model has no such part.
    """
    try:
        attention: nn.Module = model.get_submodule("decoder.layers")[-1].cross_attention  # type: ignore[index]
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{type(model).__name__} has no decoder with deformable cross-attention") from error
    return attention


@contextmanager
def recorded(attention: nn.Module) -> Iterator[list[Sampling]]:
    """While it is open, every call of ``attention(query, reference, …)`` adds its sampling to the list."""
    found: list[Sampling] = []

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        with torch.no_grad():
            sampling = sampling_points(module, arguments[0], arguments[1])
        found.append(Sampling(*(part.cpu() for part in sampling)))

    handle = attention.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
