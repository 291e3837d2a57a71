"""The assignment solvers against scipy on the repeated cost matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from matchers import assignment, native
from matchers.assignment import assign, assign_with_scipy
from ops.cache import BackendUnavailableError


def _native(cost, counts, capacity):
    return native.assign(np.ascontiguousarray(cost), counts, capacity, threads=2)


@pytest.fixture(params=[assign_with_scipy, _native], ids=["scipy", "native"])
def solver(request):
    if request.param is _native:
        try:
            native.library()
        except BackendUnavailableError as reason:
            pytest.skip(str(reason))
    return request.param


def optimum(cost, capacity):
    """Pairs (target, query) and total cost of scipy on each target's row repeated."""
    slot, query = linear_sum_assignment(np.tile(cost.astype(np.float64), (capacity, 1)))
    target = slot % max(1, len(cost))
    return set(zip(target.tolist(), query.tolist(), strict=True)), cost.astype(np.float64)[target, query].sum()


def check(solver, cost, counts, capacity, *, unique):
    counts, capacity = np.asarray(counts), np.asarray(capacity)
    found = solver(cost, counts, capacity)
    assert found.dtype == np.int64
    first = 0
    for rows, count, k in zip(cost, counts, capacity, strict=True):
        own = found[first : first + count * k].reshape(count, k)
        first += count * k
        assert (np.diff(own, axis=1) > 0).all() if k > 1 else True
        taken = own[own >= 0]
        assert len(set(taken.tolist())) == len(taken) == min(count * k, rows.shape[1] if k == 1 else count * k)
        expected_pairs, expected_total = optimum(rows[:count], k)
        pairs = {(t, q) for t in range(count) for q in own[t].tolist() if q >= 0}
        total = sum(float(rows[t, q]) for t, q in pairs)
        assert total == pytest.approx(expected_total, rel=1e-12, abs=1e-12)
        if unique:
            assert pairs == expected_pairs
    assert first == len(found)


@st.composite
def batches(draw):
    problems = draw(st.integers(1, 4))
    queries = draw(st.integers(1, 14))
    rows = draw(st.integers(0, 18))
    counts = draw(st.lists(st.integers(0, rows), min_size=problems, max_size=problems))
    capacity = [draw(st.integers(1, max(1, queries // count if count else 3))) for count in counts]
    ties = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (problems, rows, queries)
    cost = rng.integers(-2, 3, shape) if ties else rng.normal(size=shape)
    return cost.astype(np.float32), counts, capacity, not ties


@settings(max_examples=60, deadline=None)
@given(batches())
def test_scipy_solver_on_any_batch(batch):
    cost, counts, capacity, unique = batch
    check(assign_with_scipy, cost, counts, capacity, unique=unique)


@settings(max_examples=200, deadline=None)
@given(batches())
def test_chosen_solver_on_any_batch(batch):
    """The native solver, where the machine has a compiler."""
    cost, counts, capacity, unique = batch
    check(assign, cost, counts, capacity, unique=unique)


@pytest.mark.parametrize(("targets", "capacity"), [(7, 2), (60, 4), (75, 4), (100, 1), (450, 1)])
def test_published_sizes(solver, targets, capacity):
    """Few targets; crowded images; every query taken (75 × 4 of 300); more targets than queries."""
    rng = np.random.default_rng(0)
    centres, queries = rng.random((2, targets, 2)), rng.random((2, 300, 2))
    distance = np.abs(centres[:, :, None] - queries[:, None]).sum(-1)  # alone it would tie: swaps cost the same
    cost = (distance + 0.3 * rng.random(distance.shape)).astype(np.float32)
    check(solver, cost, [targets, targets], [capacity, capacity], unique=True)


def test_duplicate_targets_and_queries(solver):
    rng = np.random.default_rng(1)
    cost = np.repeat(np.repeat(rng.random((1, 4, 6)), 3, axis=1), 5, axis=2).astype(np.float32)
    check(solver, cost, [12], [2], unique=False)


def test_negative_and_huge_costs(solver):
    rng = np.random.default_rng(2)
    cost = (rng.normal(size=(1, 10, 30)) * 10.0 ** rng.integers(-6, 6, (1, 10, 30))).astype(np.float32)
    check(solver, cost, [10], [3], unique=False)


def test_same_result_on_any_number_of_threads():
    try:
        native.library()
    except BackendUnavailableError as reason:
        pytest.skip(str(reason))
    cost = np.random.default_rng(3).integers(0, 4, (9, 8, 40)).astype(np.float32)
    counts, capacity = np.full(9, 8), np.arange(9) % 5 + 1
    results = [native.assign(cost, counts, capacity, threads) for threads in (1, 2, 3, 50)]
    assert all(np.array_equal(results[0], result) for result in results)


def test_without_a_compiler_scipy_takes_over_and_says_so(monkeypatch, caplog):
    def unavailable():
        raise BackendUnavailableError("no C++ compiler")

    monkeypatch.setattr(native, "library", unavailable)
    assignment._native_available.cache_clear()
    try:
        found = assign(np.array([[[3, 1, 2]]], dtype=np.float32), np.array([1]), np.array([2]))
    finally:
        assignment._native_available.cache_clear()
    assert found.tolist() == [1, 2]
    assert "no C++ compiler" in caplog.text
