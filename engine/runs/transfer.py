"""Weights of one run as the start of another, whose classes may differ (``--init-from``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.checkpoint import CheckpointError, read_file


class Transfer(NamedTuple):
    """Names of the tensors that were taken over, made anew, and left unused."""

    copied: list[str]
    by_class: list[str]
    """One row per class: rows of classes of the same name were copied, the others are new."""
    fresh: list[str]
    """Left at their initialisation: absent from the checkpoint, or of another shape."""
    unused: list[str]
    kept_classes: list[str]
    new_classes: list[str]

    def report(self) -> list[str]:
        """Lines for the log."""
        lines = [f"{len(self.copied)} tensors taken over, {len(self.by_class)} by class"]
        for title, names in (
            ("classes kept", self.kept_classes),
            ("classes made anew", self.new_classes),
            ("by class", self.by_class),
            ("left at their initialisation", self.fresh),
            ("not used", self.unused),
        ):
            if names:
                lines.append(f"{title}: {', '.join(names)}")
        return lines


def initialise_from(
    model: nn.Module,
    path: Path,
    categories: Sequence[Sequence[Any]],
    *,
    by_class: Sequence[str],
    required: str | None = None,
) -> Transfer:
    """Start from the weights (the averaged ones, where there are) of a checkpoint or of a plain state dict.

    Args:
        model: receives the weights.
        path: checkpoint of this program, or a dictionary of tensors, possibly under ``model`` or ``state_dict``.
        categories: [id, name] of each class of the new run.
        by_class: names of modules with one row per class, wherever they are in the model.
        required: module all of whose tensors must come from the file, such as a backbone whose pretrained weights have
            not been loaded: parts of it may be frozen, and would stay random. None: no such module.

    Raises:
        CheckpointError: if the file cannot be read, fits less than half of the model's tensors, or lacks some of
            ``required``.
    """
    weights, saved = _weights_of(read_file(path), path)
    names = [str(name) for _, name in categories]
    old_names = [str(name) for _, name in saved] if saved is not None else names
    expected = model.state_dict()
    result = Transfer([], [], [], [name for name in weights if name not in expected], [], [])
    result.kept_classes.extend(name for name in names if name in old_names)
    result.new_classes.extend(name for name in names if name not in old_names)
    for name, tensor in expected.items():
        old = weights.get(name)
        if old is not None and any(part in name.split(".") for part in by_class) and old_names != names:
            merged = _merge_classes(tensor, old, old_names, names)
            if merged is not None:
                tensor.copy_(merged)
                result.by_class.append(name)
                continue
        if old is None or old.shape != tensor.shape:
            result.fresh.append(name)
            if old is not None:
                result.unused.append(name)
            continue
        tensor.copy_(old)
        result.copied.append(name)
    fitting = len(result.copied) + len(result.by_class)
    if 2 * fitting < len(expected):
        raise CheckpointError(f"{path}: is for another model: only {fitting} of {len(expected)} tensors fit")
    lacking = [name for name in result.fresh if required is not None and name.startswith(f"{required}.")]
    if lacking:
        raise CheckpointError(
            f"{path}: its backbone is another one: {len(lacking)} tensors of {required} are absent or of another shape "
            f"({lacking[0]}, …); set model.backbone as in the run that it comes from"
        )
    return result


def _weights_of(content: Any, path: Path) -> tuple[dict[str, Tensor], Sequence[Sequence[Any]] | None]:
    """Tensors by name and, where known, the classes they are for."""
    categories = None
    if isinstance(content, dict):
        categories = content.get("categories")
        averaged = content.get("ema")
        candidates = [averaged.get("weights") if isinstance(averaged, dict) else None]
        candidates += [content.get(key) for key in ("weights", "model", "state_dict")] + [content]
        for candidate in candidates:
            if isinstance(candidate, Mapping) and candidate:
                tensors = {str(k): v for k, v in candidate.items() if isinstance(v, Tensor)}
                if tensors:
                    return tensors, categories
    raise CheckpointError(f"{path}: holds no weights")


def _merge_classes(new: Tensor, old: Tensor, old_names: Sequence[str], names: Sequence[str]) -> Tensor | None:
    """The new tensor with the old rows of classes of the same name; None where rows are not classes."""
    extra = new.shape[0] - len(names)
    if old.shape[1:] != new.shape[1:] or old.shape[0] - len(old_names) != extra or extra < 0:
        return None
    merged = new.clone()
    if extra:  # rows after the classes, such as an embedding of "no class"
        merged[len(names) :] = old[len(old_names) :]
    rows = torch.tensor([[i, old_names.index(n)] for i, n in enumerate(names) if n in old_names], dtype=torch.long)
    if len(rows):
        merged[rows[:, 0]] = old[rows[:, 1]].to(merged.dtype)
    return merged
