"""Where queries look: recorded from a detector's last cross-attention while it predicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from structures import Looking, map_tensors


@contextmanager
def recorded(attention: nn.Module) -> Iterator[list[Looking]]:
    """While it is open, every call of ``attention`` adds to the list where the queries look; tensors on the host."""
    found: list[Looking] = []

    def hook(module: Any, arguments: tuple[Any, ...]) -> None:
        with torch.no_grad():
            looking = module.looking(*arguments)
        found.append(map_tensors(looking, torch.Tensor.cpu))

    handle = attention.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
