"""What is measured: the project's own implementations of multi-scale deformable attention, and what others have."""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import ms_deform_attn_cases as sizes
from benchmarks.ms_deform_attn_cases import Inputs
from ops.ms_deform_attn import available_backends, fused_ms_deform_attn, ms_deform_attn
from tools import console

Run = Callable[[Inputs], Tensor]
TRITON = {
    "triton": "deformops.backends.triton.msda_query_tiled:forward",
    "triton f32": "deformops.backends.triton.msda_query_tiled_fp32acc:forward",
}
"""Triton's kernels of the unfused form; the second ones sum gradients of 16 bits in float32."""

FILLING: Any = torch.utils.deterministic
"""A module whose switch type checkers do not know."""


def ours(form: str, backend: str) -> Run:
    """A backend of this project."""
    if form == "fused":
        return lambda x: fused_ms_deform_attn(
            x.value, sizes.SHAPES, x.valid_sizes, x.reference, x.offsets, x.logits, backend=backend
        )
    return lambda x: ms_deform_attn(x.value, sizes.SHAPES, x.locations, x.weights, backend=backend)


class Deterministic:
    """A run under ``torch.use_deterministic_algorithms``, without its filling of new tensors."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, x: Inputs) -> Tensor:
        """As the run itself: forwards are deterministic anyway."""
        return self.run(x)

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled(), FILLING.fill_uninitialized_memory
        FILLING.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *error: object) -> None:
        enabled, FILLING.fill_uninitialized_memory = self.before
        torch.use_deterministic_algorithms(enabled)


def unfused(functions: dict[str, Callable[..., Tensor]], device: str) -> dict[str, Run]:
    """Other implementations of the unfused form: f(value, shapes, level starts, locations, weights)."""
    shapes = torch.tensor(sizes.SHAPES, device=device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    return {
        name: lambda x, f=f: f(x.value, shapes, starts, x.locations, x.weights)  # type: ignore[misc] # default argument
        for name, f in functions.items()
    }


def triton_functions() -> dict[str, Callable[..., Tensor]]:
    """Those of ``TRITON`` that are installed."""
    found = {}
    for name, function in TRITON.items():
        with contextlib.suppress(ValueError):
            found[name] = console.named_function(function)
    return found


def peers(names: list[str], device: str) -> dict[str, Run]:
    """Implementations of the unfused form by others: those that are installed, and those named MODULE:FUNCTION.

    Raises:
        ValueError: there is no such module or function.
    """
    functions: dict[str, Callable[..., Tensor]] = {}
    if device == "cuda":
        with contextlib.suppress(ImportError):  # a peer that is not installed is not measured
            extension = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
            apply = extension.MultiScaleDeformableAttnFunction.apply
            functions["mmcv"] = lambda *arguments: apply(*arguments, 64)
        functions |= triton_functions()
    return unfused(functions | {name: console.named_function(name) for name in names}, device)


def implementations(form: str, x: Inputs, arguments: argparse.Namespace) -> dict[str, tuple[Run, Inputs]]:
    """What is to be measured, with its inputs: peers want weights of the value's dtype."""
    device = arguments.device
    runs: dict[str, tuple[Run, Inputs]] = {"reference": (ours(form, "reference"), x)}
    if available_backends()[device] is None:
        runs[device] = ours(form, device), x
        if device == "cuda":
            runs["cuda det."] = Deterministic(ours(form, device)), x
    if form == "unfused":
        theirs = x._replace(weights=x.weights.detach().to(x.value.dtype).requires_grad_())
        runs.update({name: (run, theirs) for name, run in peers(arguments.peer, device).items()})
    return runs
