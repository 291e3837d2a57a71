"""Triton's kernels where there is no GPU: compiled as they would be for one, their launches handed to whoever asks."""

from __future__ import annotations

import contextlib
import importlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.ms_deform_attn.cuda_compile import Compiled

CODES = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u32": "I", "u64": "Q", "fp32": "f"}
"""Of ``struct``, for Triton's names of types; pointers are ``Q``."""


class Launch(NamedTuple):
    """A kernel that was to be launched, and with what."""

    compiled: Compiled
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    parameter: bytes
    """The arguments as they lie in the kernel's space of parameters."""
    tensors: list[Tensor]


@contextlib.contextmanager
def launches(architecture: int, handle: Callable[[Launch], object]) -> Iterator[None]:
    """While it lasts, Triton compiles for an architecture (as 90), takes tensors in host memory, and launches nothing:
    each launch is given to ``handle``.

    Raises:
        ImportError: Triton is not installed.
    """
    jit, driver = (importlib.import_module(f"triton.runtime.{name}") for name in ("jit", "driver"))
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", architecture, 32)
    stand_in = SimpleNamespace(  # kernels are kept for each device, so that it has to be another than a real one
        get_current_device=lambda: -architecture,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    compile_or_launch = jit.JITFunction.run

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_or_launch(function, *args, grid=grid, warmup=True, **kwargs)
        bound = function.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in function.arg_names})
        bound.apply_defaults()
        if not warmup:
            grid = grid(bound.arguments) if callable(grid) else grid
            handle(launch_of(kernel, grid, bound.arguments, architecture))
        return kernel

    pretended: Any = torch.cuda
    current, device = driver.driver._active, torch.cuda.device
    driver.driver.set_active(stand_in)
    jit.JITFunction.run, pretended.device = run, lambda device: contextlib.nullcontext()
    try:
        yield
    finally:
        jit.JITFunction.run, pretended.device = compile_or_launch, device
        driver.driver.set_active(current)


def launch_of(kernel: Any, grid: tuple[int, ...], named: dict[str, Any], architecture: int) -> Launch:
    """The launch of a compiled kernel with arguments by name; those that were compiled in are left out."""
    kinds = {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"}
    values = [named[name] for name in kinds]
    codes = "@" + "".join("Q" if kind[0] == "*" else CODES[kind] for kind in kinds.values()) + "QQ"
    numbers = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
    tensors = [value for value in values if isinstance(value, Tensor)]
    about = kernel.metadata
    parameter = struct.pack(codes, *numbers, 0, 0)  # behind them room for what kernels of other kinds keep
    compiled = assemble(kernel.asm["ptx"], architecture)
    return Launch(compiled, tuple(grid), 32 * about.num_warps, about.shared, parameter, tensors)


def assemble(ptx: str, architecture: int) -> Compiled:
    """A kernel by Triton's own assembler, with its report, which Triton does not keep."""
    assembler = importlib.import_module("triton.backends.nvidia.compiler").get_ptxas(architecture).path
    name = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [assembler, "-v", "-lineinfo", f"--gpu-name={name}", source, "-o", binary]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return Compiled(binary.read_bytes(), ptx, report)
