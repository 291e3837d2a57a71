"""Ranks of candidates, and the weights that follow from them."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_within(values: Tensor, groups: Tensor) -> Tensor:
    """Rank of each value among those of its group, 0 for the largest; equal values rank in their order.

    Args:
        values: [..., M].
        groups: [M] int64, which values are compared with each other.

    Returns:
        [..., M] int64. Nothing here synchronises.
    """
    order, first = _order_within(values, groups)
    place = torch.arange(len(groups), device=order.device) - first
    return torch.empty_like(order).scatter_(-1, order, place)


def max_within(values: Tensor, groups: Tensor) -> Tensor:
    """The largest value of each value's group, [..., M]; arguments as for :func:`rank_within`."""
    order, first = _order_within(values, groups)
    largest = values.gather(-1, order.gather(-1, first))
    return torch.empty_like(values).scatter_(-1, order, largest)


def _order_within(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Indices that sort by group, then by falling value, and for each place where its group starts."""
    order = torch.argsort(values.detach(), descending=True, stable=True)
    order = order.gather(-1, torch.argsort(groups[order], stable=True))
    grouped = groups[order]
    return order, torch.searchsorted(grouped, grouped)


def prime_sample_weights(rank: Tensor, tau: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """w = e^(−r/τ) of ranks r [M], 0 for the best (Align-DETR, arXiv 2304.07527, prime sample weighting)."""
    return torch.exp(rank.to(dtype) / -tau)
