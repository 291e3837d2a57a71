"""The C++ assignment solver: compiled by the machine's own compiler at first use, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ops.ms_deform_attn.cache import BackendUnavailableError, cached_file, key_of
from ops.ms_deform_attn.cpu import compile_shared, compiler_command

SOURCE = Path(__file__).parent / "csrc" / "assignment.cpp"
FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros"),
    *("-fPIC", "-shared", "-pthread", "-w"),
)

Index = NDArray[np.int64]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        BackendUnavailableError: there is no compiler, or it fails, or the cache cannot be written.
    """
    compiler = compiler_command()
    flags = [*FLAGS, "-mcpu=native" if platform.machine() in ("aarch64", "arm64", "ppc64le") else "-march=native"]
    name = f"assignment-{key_of(SOURCE.read_bytes(), *compiler, *flags, _instruction_set())}.so"
    try:
        path = cached_file(name, lambda output: compile_shared(compiler, flags, SOURCE, output))
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailableError(f"the compiled library cannot be kept or loaded: {error}") from error
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


def _instruction_set() -> str:
    """What distinguishes the processors of machines that share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
