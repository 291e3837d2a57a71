"""Which implementation runs: explicit, by default, or picked; a backend that cannot be built says why, once."""

from __future__ import annotations

import logging
from typing import Literal, get_args

import torch

from ops.ms_deform_attn import cpu, cuda
from ops.native import compiler_command

BackendName = Literal["auto", "reference", "cpu", "cuda"]
"""``reference`` is plain PyTorch on any device; ``cpu`` and ``cuda`` are kernels; ``auto`` picks by device."""

NAMES: tuple[str, ...] = get_args(BackendName)

logger = logging.getLogger(__name__)

_default: str = "auto"
_failures: dict[str, str | None] = {}


def set_default_backend(name: str) -> None:
    """Choose what ``backend="auto"`` means from now on, in this process.

    Raises:
        ValueError: there is no such backend, or it cannot be built here (the message says why).
    """
    global _default
    _check_name(name)
    if name != "auto" and (failure := failure_of(name)) is not None:
        raise ValueError(f"backend {name!r} of ms_deform_attn is not available: {failure}")
    _default = name


def available_backends() -> dict[str, str | None]:
    """For each backend, None if it works on this machine, else the reason why not; builds those not yet built."""
    return {name: failure_of(name) for name in NAMES if name != "auto"}


def describe_backend(device: torch.device | str) -> str:
    """One line for a start banner: what runs for tensors of ``device``, and why not the kernel if it does not."""
    kind = torch.device(device).type
    chosen = resolve(_default, kind, False)
    if chosen == "cpu":
        return f"cpu: C++ kernels built by {' '.join(compiler_command())}"
    if chosen == "cuda":
        return f"cuda: {cuda.describe(torch.device(device))}"
    if _default == "reference":
        return "reference: plain PyTorch, as configured"
    reason = failure_of(kind) if kind in NAMES else f"no kernel for device {kind}"
    return f"reference: plain PyTorch ({kind}: {reason})"


def failure_of(name: str) -> str | None:
    """Why the backend cannot be used on this machine, None if it can; found out once."""
    if name not in _failures:
        failure = None
        try:
            if name == "cpu":
                cpu.library()
            elif name == "cuda":
                cuda.check()
        except RuntimeError as error:  # BackendUnavailableError, or what PyTorch says of a device that does not start
            failure = (str(error).splitlines() or [type(error).__name__])[0]
        _failures[name] = failure
    return _failures[name]


def resolve(backend: str, device: str, is_double: bool) -> str:
    """The name of the implementation for tensors of a device: ``reference``, ``cpu`` or ``cuda``.

    Raises:
        ValueError: an explicit choice is unknown, not available, or for another device.
    """
    _check_name(backend)
    chosen = _default if backend == "auto" else backend
    if chosen == "reference":
        return chosen
    if chosen == "auto":
        return device if _picked(device, is_double) else "reference"
    if chosen != device:
        raise ValueError(f"backend {chosen!r} of ms_deform_attn cannot take value on device {device!r}")
    if chosen == "cuda" and is_double:
        raise ValueError("backend 'cuda' of ms_deform_attn takes value in float32, bfloat16 or float16, not float64")
    if (failure := failure_of(chosen)) is not None:
        raise ValueError(f"backend {chosen!r} of ms_deform_attn is not available: {failure}")
    return chosen


# The mark of torch.compiler.assume_constant_result, which would import the whole compiler (seconds) to set it.
setattr(resolve, "_dynamo_marked_constant", True)  # noqa: B010 - a function has no such attribute for type checkers


def _picked(device: str, is_double: bool) -> bool:
    """Whether the kernels of a device can be used; says once if they ought to but cannot."""
    if device not in ("cpu", "cuda") or (device == "cuda" and is_double):
        return False
    known = device in _failures
    failure = failure_of(device)
    if failure is not None and not known:
        logger.warning("ms_deform_attn runs in plain PyTorch, slowly: backend %s failed: %s", device, failure)
    return failure is None


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend of ms_deform_attn must be one of {', '.join(NAMES)}, got {name!r}")
