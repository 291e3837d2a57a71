"""Launches a kernel through the real cuda.bindings, with recording_driver.cpp as libcuda.so.1; asserts what arrives."""

from __future__ import annotations

import contextlib
import ctypes
import types
from typing import Any

import torch

from ops.cache import BackendUnavailableError
from ops.ms_deform_attn import cuda
from ops.ms_deform_attn.cuda_plan import Signature, backward_plan, lay_out


class Recording(ctypes.Structure):
    """Mirrors the structure of recording_driver.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("retained", "loaded", "launches")),
        *((name, ctypes.c_uint64) for name in ("current", "largest_shared", "carve_out", "stream", "extra")),
        ("capture_mode", ctypes.c_int64),
        ("grid", ctypes.c_uint64 * 3),
        ("block", ctypes.c_uint64 * 3),
        ("shared", ctypes.c_uint64),
        ("name", ctypes.c_char * 64),
        ("parameter", ctypes.c_char * 512),
    )


def main() -> None:
    """Two launches and one that the driver refuses."""
    pretended: Any = torch.cuda
    pretended.device = lambda device: contextlib.nullcontext()
    pretended.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0x57)
    pretended.get_device_capability = lambda device: (9, 0)
    pretended.get_device_properties = lambda device: types.SimpleNamespace(shared_memory_per_multiprocessor=228 * 1024)
    plan = backward_plan(Signature(0, 0, 8, 32, 4, 4, 2, True), 227 * 1024, False)
    problem, blocks = lay_out(plan, [10, 10, 5, 5, 3, 3, 2, 2], 2, 138, 138, 8)
    problem.value, problem.scale = 0x1230, 0x4560
    for _ in range(2):
        cuda.launch(plan, problem, blocks, torch.device("cuda", 1))
    seen = Recording.in_dll(ctypes.CDLL("libcuda.so.1"), "recording")
    assert (seen.retained, seen.loaded, seen.launches) == (1, 1, 2)  # context and module are kept
    assert seen.current == 0xC000 + 41
    assert seen.name == b"ms_deform_attn_backward"
    assert (seen.largest_shared, seen.carve_out) == (plan.shared_bytes, 61)  # per cent of 228 KiB, for four blocks
    assert seen.capture_mode == 0  # GLOBAL again, in which the driver refuses to load
    assert (list(seen.grid), list(seen.block)) == ([blocks, 1, 1], [plan.threads, 1, 1])
    assert (seen.shared, seen.stream, seen.extra) == (plan.shared_bytes, 0x57, 0)
    size = ctypes.sizeof(problem)
    assert ctypes.string_at(ctypes.addressof(seen) + Recording.parameter.offset, size) == ctypes.string_at(
        ctypes.addressof(problem), size
    )
    try:
        cuda.launch(plan, problem, 0, torch.device("cuda", 1))
    except BackendUnavailableError as error:
        print(error)


if __name__ == "__main__":
    main()
