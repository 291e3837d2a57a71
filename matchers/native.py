"""The C++ assignment solver: compiled by the machine's own compiler at first use, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ops.native import load_library

SOURCE = Path(__file__).parent / "csrc" / "assignment.cpp"
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros")

Index = NDArray[np.int64]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        BackendUnavailableError: there is no compiler, or it fails, or the cache cannot be written.
    """
    loaded = load_library("assignment", SOURCE, (), FLAGS)
    loaded.assign_all.restype = None
    loaded.assign_all.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64),
    ]
    return loaded


def assign(cost: NDArray[np.float32], counts: Index, capacity: Index, threads: int) -> Index:
    """Solve P problems; see ``assignment.assign``. ``cost`` [P, max G, Q] must be contiguous."""
    assert cost.dtype == np.float32
    assert cost.flags.c_contiguous
    problems, rows, queries = cost.shape
    counts, capacity = np.ascontiguousarray(counts, np.int64), np.ascontiguousarray(capacity, np.int64)
    cost_offset = np.arange(problems, dtype=np.int64) * (rows * queries)
    output_offset = np.concatenate(([0], np.cumsum(counts * capacity))).astype(np.int64)
    query_of = np.empty(output_offset[-1], dtype=np.int64)
    arrays = (cost_offset, counts, capacity, output_offset, query_of)
    library().assign_all(cost.ctypes.data, problems, queries, *(array.ctypes.data for array in arrays), threads)
    return query_of
