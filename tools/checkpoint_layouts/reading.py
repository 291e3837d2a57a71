"""Reading checkpoint files of other programs without executing anything in them."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops.errors import describe_error


class Inert:
    """Stands in for an object of a training program; takes whatever the file says about it and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What trainers leave in their checkpoints beside tensors and plain values: settings, histories, numpy numbers. None of
# it is code; all but the settings is read as nothing.
_HARMLESS: tuple[Any, ...] = (
    argparse.Namespace,
    *(
        (type(name.rpartition(".")[2], (Inert,), {}), name)
        for name in (
            "mmengine.logging.history_buffer.HistoryBuffer",
            "mmengine.config.config.ConfigDict",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.ndarray",
            "numpy.dtype",
            "pathlib.PosixPath",
            "pathlib.WindowsPath",
            "_codecs.encode",
        )
    ),
)


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of PyTorch, on the host.

    Raises:
        ValueError: it is not there, damaged, or holds objects that could execute code; in one line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        with torch.serialization.safe_globals(list(_HARMLESS)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, error)) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a readable PyTorch checkpoint ({describe_error(error):.160})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _refusal(path: Path, error: pickle.UnpicklingError) -> str:
    try:
        names = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except (ValueError, RuntimeError, OSError, pickle.UnpicklingError):
        names = ""
    if not names:
        return f"{path}: not a readable PyTorch checkpoint ({describe_error(error):.160})"
    return (
        f"{path}: refused, it asks for {names}, and to load these could execute code. If you trust its source, "
        "re-save the tensors alone in the environment that wrote it: "
        'c = torch.load(path, weights_only=False); torch.save({"model": c["model"]}, "weights.pth")'
    )


ENTRIES = ("model", "ema_model", "state_dict", "ema_state_dict", "weights")
"""Keys under which training programs keep their weights, in the order in which they are looked for."""


def select_weights(content: Mapping[str, Any], entry: str | None, path: Path) -> tuple[str, dict[str, Tensor]]:
    """(key, tensors by name) of the wanted weights.

    Args:
        content: of the file.
        entry: key to take; None takes the first of ``ENTRIES`` that is there, or the whole content if it is tensors.
        path: of the file, for messages.

    Raises:
        ValueError: there are no weights, or not under that key.
    """
    offered = [key for key in ENTRIES if isinstance(content.get(key), Mapping) and _tensors(content[key])]
    if entry is None and not offered:
        if _tensors(content):
            return "", _clean(content)
        raise ValueError(f"{path}: holds no weights; its keys are {', '.join(map(str, content)) or 'none'}")
    if entry is not None and entry not in offered:
        raise ValueError(f"{path}: has no weights under '{entry}', it has {', '.join(offered) or 'none under a key'}")
    key = entry or offered[0]
    return key, _clean(content[key])


def _tensors(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values.values())


def _clean(values: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Only tensors; without the prefix that data-parallel wrappers leave."""
    return {str(name).removeprefix("module."): value for name, value in values.items() if isinstance(value, Tensor)}
