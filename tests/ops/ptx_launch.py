"""Stands in for the launch of the CUDA kernels: runs their PTX on host memory."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from ptx_kernel import Kernel
from ptx_machine import Machine, Region

from ops.cache import BackendUnavailableError
from ops.ms_deform_attn import cuda_compile
from ops.ms_deform_attn.cuda_plan import Plan


def newest_architecture() -> int | None:
    """That NVRTC knows; None without NVRTC."""
    try:
        return cuda_compile.architectures()[-1]
    except (BackendUnavailableError, RuntimeError):
        return None


@functools.lru_cache(maxsize=16)
def kernel_of(plan: Plan, architecture: int) -> Kernel:
    """The kernel, compiled and translated."""
    return Kernel(cuda_compile.compile_kernel(plan, architecture).ptx)


def regions(plan: Plan, problem: Any, blocks: int) -> list[Region]:
    """The tensors that a problem points to; what the kernel writes is writable."""
    macros = dict(plan.macros)
    levels, points, heads, channels, size = (
        int(macros[k]) for k in ("LEVELS", "POINTS", "HEADS", "CHANNELS", "REFERENCE_SIZE")
    )
    value, sample = (4 if macros[k] == "0" else 2 for k in ("VALUE_TYPE", "SAMPLE_TYPE"))
    images = blocks // (problem.tiles * heads)
    rows = images * problem.queries * heads
    samples, pixels = rows * levels * points, images * problem.pixels * heads * channels
    inputs = {
        "value": pixels * value,
        "valid": images * levels * 16,
        "reference": images * problem.queries * size * 4,
        "samples": 2 * samples * sample,
        "weights": samples * sample,
        "grad_output": rows * channels * value,
        "scale": 4,
    }
    outputs = {
        "output": rows * channels * value,
        "grad_value": pixels * (8 if macros["DETERMINISTIC"] == "1" else 4),
        "grad_samples": 2 * samples * sample,
        "grad_weights": samples * sample,
        "grad_reference": rows * size * 4,
    }
    return [
        Region(getattr(problem, name), size, writable)
        for group, writable in ((inputs, False), (outputs, True))
        for name, size in group.items()
        if getattr(problem, name)
    ]


class Launches:
    """The launches so far, all for one architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.plans: list[Plan] = []
        self.adds = 0
        """Numbers that the last one has added to global memory."""

    def __call__(self, plan: Plan, problem: Any, blocks: int, device: torch.device) -> None:
        """As ``cuda.launch``."""
        assert device.type == "cpu"
        self.plans.append(plan)
        parameter = ctypes.string_at(ctypes.addressof(problem), ctypes.sizeof(problem))
        kernel = kernel_of(plan, self.architecture)
        machine = Machine(
            kernel, plan.threads, range(blocks), plan.shared_bytes, parameter, regions(plan, problem, blocks)
        )
        machine.run()
        assert machine.issued.sum() > 0
        self.adds = machine.adds
