"""The CUDA backend."""

from __future__ import annotations

import torch

from ops.ms_deform_attn.cache import BackendUnavailableError


def check() -> None:
    """Raise BackendUnavailableError if the kernels cannot run here."""
    raise BackendUnavailableError("no CUDA device")


def describe(device: torch.device) -> str:
    """One line about the kernels for ``device``."""
    return str(device)
