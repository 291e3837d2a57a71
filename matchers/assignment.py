"""Minimum-cost assignment of queries to targets where each target may take several queries."""

from __future__ import annotations

import functools
import logging

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from matchers import native
from ops.cache import BackendUnavailableError

_WORK_PER_THREAD = 200_000
"""Costs (slots × queries) that are worth a thread of their own."""

logger = logging.getLogger(__name__)

Index = NDArray[np.int64]


def assign(cost: NDArray[np.float32], counts: Index, capacity: Index) -> Index:
    """In each of P problems, match every target with ``capacity`` queries, no query twice, at the least total cost.

    Exact: the total is that of ``scipy.optimize.linear_sum_assignment`` on the cost with each target's row repeated.
    Where several assignments share the least total, which of them comes back depends on the costs alone, so it is
    the same in every run on every number of threads, but it is otherwise unspecified.

    Args:
        cost: [P, max G, Q], finite; rows from an own number of targets on are ignored.
        counts: [P] targets of each problem.
        capacity: [P] queries k ≥ 1 of each target, with k·G ≤ Q; or 1 with any G: if G > Q, every query is matched,
            and G − Q targets are left out, whichever choice is cheapest.

    Returns:
        [Σ k·G] queries of each target of each problem, in ascending order; −1 for a target that is left out.
    """
    assert cost.ndim == 3
    assert np.all((capacity == 1) | (counts * capacity <= cost.shape[2]))
    if _native_available():
        work = int((counts * capacity).sum()) * cost.shape[2]
        threads = min(torch.get_num_threads(), 1 + work // _WORK_PER_THREAD)
        return native.assign(np.ascontiguousarray(cost), counts, capacity, threads)
    return assign_with_scipy(cost, counts, capacity)


def assign_with_scipy(cost: NDArray[np.float32], counts: Index, capacity: Index) -> Index:
    """``assign`` for machines without a C++ compiler: the same totals, several times slower."""
    parts = [np.empty(0, dtype=np.int64)]
    for rows, count, k in zip(cost, counts, capacity, strict=True):
        slot, query = linear_sum_assignment(np.repeat(rows[:count], k, axis=0))
        query_of = np.full(count * k, -1, dtype=np.int64)
        query_of[slot] = query
        query_of = query_of.reshape(count, k)
        query_of.sort(axis=1)
        parts.append(query_of.reshape(-1))
    return np.concatenate(parts)


@functools.cache
def _native_available() -> bool:
    try:
        native.library()
    except BackendUnavailableError as reason:
        logger.warning("matching runs on scipy, several times slower than the C++ solver: %s", reason)
        return False
    return True
