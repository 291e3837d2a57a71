"""The C++ backend: compiled by the machine's own compiler at first use, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ops.ms_deform_attn.arguments import Arguments
from ops.native import load_library

SOURCES = Path(__file__).parent / "csrc"
HEADERS = ("simd.h", "samples.h")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math")
VALUE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
MAX_PIXELS = 2**31 - 1
"""Pixel indices within an image are 32-bit."""
_POINTERS = (
    *("shapes", "valid", "value", "reference", "samples", "weights", "output"),
    *("grad_output", "grad_value", "grad_samples", "grad_weights", "grad_reference"),
)


class _Problem(ctypes.Structure):
    """Mirrors ``struct Problem`` of csrc/samples.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("images", "pixels", "queries", "heads", "channels", "levels", "points", "value_type")
        ),
        *((name, ctypes.c_int64) for name in ("fused", "reference_size", "threads")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        BackendUnavailableError: there is no compiler, or it fails, or the cache cannot be written.
    """
    headers = [SOURCES / name for name in HEADERS]
    loaded = load_library("ms_deform_attn-cpu", SOURCES / "cpu.cpp", headers, FLAGS)
    for function in (loaded.ms_deform_attn_forward, loaded.ms_deform_attn_backward):
        function.argtypes = [ctypes.POINTER(_Problem)]
        function.restype = ctypes.c_bool
    return loaded


def supports(value: Tensor, spatial_shapes: Sequence[int], samples: Tensor) -> bool:
    """Whether the kernels can index these tensors."""
    return value.shape[1] <= MAX_PIXELS


def forward(arguments: Arguments) -> Tensor:
    """[B, Q, H*D] in the dtype of the value."""
    value, samples = arguments.value, arguments.samples
    call = _Call(arguments)
    B, Q, H = samples.shape[:3]
    output = value.new_empty(B, Q, H * value.shape[3], dtype=call.dtype)
    call.run("ms_deform_attn_forward", output=output)
    return output.to(value.dtype)


def backward(
    grad_output: Tensor, arguments: Arguments, needs_reference: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of value, reference (None unless needed), samples and weights, each in its own dtype."""
    value, _, _, reference, samples, weights = arguments
    wide = value.to(torch.float32) if value.dtype in (torch.bfloat16, torch.float16) else value
    call = _Call(arguments._replace(value=wide))
    # The kernel writes every pixel; but it does not run where there is nothing to attend.
    grad_value = (torch.zeros if call.empty else torch.empty)(value.shape, dtype=call.dtype)
    grad_samples = torch.empty(samples.shape, dtype=call.dtype)
    grad_weights = torch.empty(weights.shape, dtype=call.dtype)
    grad_reference = None
    if needs_reference and reference is not None:
        grad_reference = torch.empty(reference.shape, dtype=call.dtype)
    call.run(
        "ms_deform_attn_backward",
        grad_output=grad_output.to(call.dtype).contiguous(),
        grad_value=grad_value,
        grad_samples=grad_samples,
        grad_weights=grad_weights,
        grad_reference=grad_reference,
    )
    if grad_reference is not None and reference is not None:
        grad_reference = grad_reference.to(reference.dtype)
    return grad_value.to(value.dtype), grad_reference, grad_samples.to(samples.dtype), grad_weights.to(weights.dtype)


class _Call:
    """Arguments of one call in the kernels' layout and types; keeps alive what the pointers point to."""

    def __init__(self, arguments: Arguments) -> None:
        value, spatial_shapes, valid_sizes, reference, samples, weights = arguments
        self.dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        B, S, H, D = value.shape
        _, Q, _, L, P, _ = samples.shape
        self.problem = _Problem(
            images=B,
            pixels=S,
            queries=Q,
            heads=H,
            channels=D,
            levels=L,
            points=P,
            value_type=VALUE_TYPES[value.dtype],
            fused=valid_sizes is not None,
            reference_size=0 if reference is None else reference.shape[-1],
            threads=torch.get_num_threads(),
        )
        self.empty = B * Q == 0
        self.kept: list[Tensor] = []
        self._point(
            shapes=torch.tensor(spatial_shapes, dtype=torch.int64),
            valid=None if valid_sizes is None else valid_sizes.to(torch.int64).contiguous(),
            value=value.contiguous(),
            reference=None if reference is None else reference.to(self.dtype).contiguous(),
            samples=samples.to(self.dtype).contiguous(),
            weights=weights.to(self.dtype).contiguous(),
        )

    def _point(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                self.kept.append(tensor)
                setattr(self.problem, name, tensor.data_ptr())

    def run(self, function: str, **tensors: Tensor | None) -> None:
        """Run a kernel; ctypes releases the interpreter's lock meanwhile.

        Raises:
            MemoryError: there is not enough for the copies of the maps.
        """
        self._point(**tensors)
        if not self.empty and not getattr(library(), function)(ctypes.byref(self.problem)):
            raise MemoryError(f"{function}: not enough memory")
