"""Weights of a backbone from a local file, whoever named its entries."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.parts.timm_models import names_in_whole
from ops.errors import describe_error

_IN_DETECTOR = "backbone.body."


def read(path: str) -> dict[str, Tensor]:
    """Read a weight file, without executing anything in it; of a checkpoint of this program the averaged weights.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    if not Path(path).is_file():
        raise ValueError(f"model.backbone.pretrained: no such file '{path}'")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has its own exceptions; all mean the same to the user
        raise ValueError(f"{path}: not a readable weight file ({describe_error(error):.160})") from error
    if isinstance(state, dict) and isinstance(state.get("ema"), dict):
        state = state["ema"]
    for key in ("weights", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no state dict of a backbone")
    return state


def are_of_detector(state: Mapping[str, Tensor]) -> bool:
    """Whether they are the weights of a whole detector of this program."""
    return any(name.startswith(_IN_DETECTOR) for name in state)


def load_of_detector(body: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Give the backbone, as the detector has it, the weights of that of another detector, which may have more stages.

    Raises:
        ValueError: an entry is absent or of another shape.
    """
    expected = body.state_dict()
    given = {name: state[_IN_DETECTOR + name] for name in expected if _IN_DETECTOR + name in state}
    unfit = [name for name, value in expected.items() if name not in given or given[name].shape != value.shape]
    if unfit:
        raise ValueError(
            f"{path}: the backbone of this detector is another one: {len(unfit)} of {len(expected)} entries absent or "
            f"of another shape, the first is {unfit[0]}; set model.backbone.model and norm as they are there"
        )
    body.load_state_dict(given)


def select_weights(
    body: nn.Module, whole: nn.Module, state: Mapping[str, Tensor], path: str, model: str, used: frozenset[str]
) -> dict[str, Tensor]:
    """Return what the cut model needs of the whole one's weights, under its own names.

    Args:
        body: the model cut into stages; may be without storage.
        whole: the same model uncut; may be without storage.
        state: in timm's or torchvision's names, or with the same layers in the same order under others.
        path: the file that they are from, for messages.
        model: its name, for messages.
        used: names, in the whole model, of the parameters that the maps depend on; others may be absent.

    Raises:
        ValueError: an entry is absent or of another shape.
    """
    state = _in_order(state, whole)
    convert = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, whole)
        except Exception as error:  # it was written for files of its own family, and says so in its own way
            raise ValueError(f"{path}: does not fit backbone {model} ({describe_error(error):.160})") from error
    names, expected = names_in_whole(body, whole), body.state_dict()
    idle = {name for name, parameter in whole.named_parameters() if parameter.requires_grad} - used
    names = {key: name for key, name in names.items() if name not in idle}
    fits = {key: source in state and state[source].shape == expected[key].shape for key, source in names.items()}
    missing = [names[key] for key, fitting in fits.items() if not fitting]
    if missing:
        raise ValueError(
            f"{path}: does not fit backbone {model}: {len(missing)} of {len(names)} entries absent or of another "
            f"shape, the first is {missing[0]}"
        )
    return expected | {key: state[source] for key, source in names.items()}


def _in_order(state: Mapping[str, Tensor], whole: nn.Module) -> dict[str, Tensor]:
    """The entries under the model's names, if they are another implementation's: not one name in common, but kind
    (weight, bias, running_mean, …) and shape of all entries, one after the other."""
    expected = whole.state_dict()

    def outlines(entries: Mapping[str, Tensor]) -> list[tuple[str, torch.Size]]:
        return [(name.rpartition(".")[2], value.shape) for name, value in entries.items()]

    if expected.keys() & state.keys() or outlines(state) != outlines(expected):
        return dict(state)
    return dict(zip(expected, state.values(), strict=True))
