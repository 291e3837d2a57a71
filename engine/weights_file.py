"""Weights as safetensors: the tensors that are evaluated, with configuration and classes in the file's header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.whole_files import replacing
from ops.errors import describe_error

ENDING = ".safetensors"
_KEPT = ("format", "config", "categories", "position")


def write_weights(path: Path, state: Mapping[str, Any]) -> None:
    """Write what a checkpoint's evaluation needs: its averaged weights, where it has them, and what they are of.

    Args:
        path: ends in ``.safetensors``; replaced as a whole or not at all.
        state: of a checkpoint.
    """
    averaged = state.get("ema")
    weights = state["weights"] if averaged is None else averaged["weights"]
    header = {"align_detr": json.dumps({key: state[key] for key in _KEPT})}
    with replacing(path) as temporary:
        # Copies: the format knows no tensors that share memory.
        save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, temporary, header)


def read_weights(path: Path) -> dict[str, Any]:
    """As a checkpoint without what only training needs; of another program's file, the tensors alone.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            header = (file.metadata() or {}).get("align_detr")
        return weights if header is None else {**json.loads(header), "weights": weights, "ema": None}
    except (SafetensorError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"damaged: {describe_error(error)}") from error
