"""Minimum-cost assignment of queries to targets where each target may take several queries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

_DENSE_WORK = 20_000
"""Number of (slot, query) costs up to which solving the whole matrix is faster than pruning it first."""

Index = NDArray[np.int64]


def assign(cost: NDArray[np.float32], candidates: int) -> tuple[Index, Index]:
    """Match every target with ``candidates`` queries, no query twice, at the least total cost.

    Exact: the total is that of ``scipy.optimize.linear_sum_assignment`` on the cost with each row repeated. Where
    several assignments share the least total, which of them comes back is determined by the costs alone (so it is
    the same in every run), but otherwise unspecified.

    Args:
        cost: [G, Q], finite.
        candidates: k ≥ 1 queries for each target, with k·G ≤ Q; or 1 with any G: if G > Q, every query is matched
            and G − Q targets are left out, whichever choice is cheapest.

    Returns:
        target [M] and query [M], sorted by target, then query.
    """
    num_targets, num_queries = cost.shape
    assert candidates == 1 or candidates * num_targets <= num_queries
    slots = candidates * num_targets
    if slots * num_queries <= _DENSE_WORK or slots >= num_queries:
        slot, query = linear_sum_assignment(np.tile(cost, (candidates, 1)))
    else:
        slot, query = _assign_pruned(cost, candidates)
    target = slot % num_targets if num_targets else slot
    order = np.lexsort((query, target))
    return target[order].astype(np.int64), query[order].astype(np.int64)


def _assign_pruned(cost: NDArray[np.float32], candidates: int) -> tuple[Index, Index]:
    """Solve on each target's cheapest queries only; prove the result optimal, or lengthen the lists and repeat.

    The list of a target is every query that costs it at most θ. Let u ≤ 0 prices be optimal duals of the pruned
    problem (a free query has price 0). If the list of target i holds a free query j, then u_i ≤ c_ij ≤ θ_i < c_ij'
    for every j' outside the list: no omitted entry can improve the assignment. So it suffices that each list holds
    a free query or is complete.
    """
    num_targets, num_queries = cost.shape
    length = np.full(num_targets, min(2 * candidates + 6, num_queries))
    while True:
        listed = cost <= _thresholds(cost, length)[:, None]
        if listed.mean() > 0.5:
            slot, query = linear_sum_assignment(np.tile(cost, (candidates, 1)))
            return slot, query
        solution = _solve_lists(cost, listed, candidates)
        if solution is None:  # some targets compete for fewer queries than they need; which ones is not known
            length = np.minimum(length * 3, num_queries)
            continue
        free = np.ones(num_queries, dtype=bool)
        free[solution[1]] = False
        proven = (listed & free).any(axis=1)
        if proven.all():
            return solution
        length = np.where(proven, length, np.minimum(length * 3, num_queries))


def _thresholds(cost: NDArray[np.float32], length: Index) -> NDArray[np.float32]:
    """θ [G] such that at least length[i] entries of row i are at most θ_i (and not many more)."""
    num_targets, num_queries = cost.shape
    longest = int(length.max())
    blocks = 3 * longest
    if blocks * 2 <= num_queries:  # the n-th smallest of block minima has at least n entries at or below it
        width = num_queries // blocks
        cost = cost[:, : blocks * width].reshape(num_targets, width, blocks).min(axis=1)
    length = np.minimum(length, cost.shape[1])
    return np.sort(cost, axis=1)[np.arange(num_targets), length - 1]


def _solve_lists(cost: NDArray[np.float32], listed: NDArray[np.bool_], candidates: int) -> tuple[Index, Index] | None:
    """The cheapest assignment that uses listed entries only: slot and query, or None if there is none."""
    num_targets, num_queries = cost.shape
    flat = np.flatnonzero(listed)
    values = cost.reshape(-1)[flat].astype(np.float64)
    values += 1 - values.min()  # explicit zeros would be read as absent
    counts = np.tile(listed.sum(axis=1), candidates)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    columns = (flat % num_queries).astype(np.int32)
    graph = csr_array(
        (np.tile(values, candidates), np.tile(columns, candidates), offsets),
        shape=(candidates * num_targets, num_queries),
    )
    try:
        slot, query = min_weight_full_bipartite_matching(graph)
    except ValueError as error:
        if "no full matching" not in str(error):
            raise
        return None
    return slot, query
