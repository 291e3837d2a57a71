"""Ranks of candidates, and the weights that follow from them."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_within(values: Tensor, groups: Tensor) -> Tensor:
    """Rank of each value among those of its group, 0 for the largest; equal values rank in their order.

    Args:
        values: [M].
        groups: [M] int64, which values are compared with each other.

    Returns:
        [M] int64. Nothing here synchronises.
    """
    order = torch.argsort(values.detach(), descending=True, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    grouped = groups[order]
    position = torch.arange(len(order), device=order.device)
    rank = torch.empty_like(order)
    rank[order] = position - torch.searchsorted(grouped, grouped)
    return rank


def prime_sample_weights(rank: Tensor, tau: float) -> Tensor:
    """w = e^(−r/τ) of ranks r [M], float32 (Align-DETR, arXiv 2304.07527, equation 7)."""
    return torch.exp(rank.float() / -tau)
