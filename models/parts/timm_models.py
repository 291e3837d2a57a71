"""What timm says of a model before it is built: its stages, its layers, its pixel statistics, the sizes it takes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import timm
import torch
from timm.models import group_parameters
from torch import nn

from models.parts.any_size import EvenConv2dSame, accept_any_size
from ops.errors import describe_error

_PROBE = (97, 161)
"""Height and width, in pixels, that no model's windows, patches or strides divide."""
_BOUNDED = ("MultiScaleVit",)
"""Their tables of relative positions end at their training images' size, which no look without storage shows."""


class Stage(NamedTuple):
    """Where a model can be cut."""

    stride: int
    """Of its map, in pixels."""
    module: str
    """Name, in the whole model, of the module that ends it."""


class Outline(NamedTuple):
    """A timm model without storage, whole and cut into stages."""

    whole: nn.Module
    stages: tuple[Stage, ...]
    options: Mapping[str, Any]
    """What to create it with so that it takes images of any size, and is dilated if that was asked for."""
    size_multiple: int
    """Images are padded to this multiple before it sees them; 1 where it needs none."""

    @property
    def is_plain(self) -> bool:
        """Whether all maps have one stride, as a vision transformer's; other levels are then a feature pyramid's."""
        return len({stage.stride for stage in self.stages}) == 1


@lru_cache(maxsize=8)
def outline(name: str, dilation: bool = False) -> Outline:
    """Look at a model without building it.

    Args:
        name: of one of timm's models.
        dilation: whether its last stage has dilated convolutions in place of a stride.

    Raises:
        ValueError: timm has no such model or no such weights of it, or it cannot be cut, dilated, or used for images
            of any size.
    """
    pixel_statistics(name)
    try:
        whole = without_storage(name)
        options = _options_for_any_size(whole) | ({"output_stride": 16} if dilation else {})
        cut: Any = without_storage(name, features_only=True, **options)
    except Exception as error:  # models refuse in many ways what they were not written for
        if dilation:
            raise ValueError(f"model.backbone.dilation: {name} has no dilated form") from error
        raise ValueError(
            f"model.backbone.model: {name} cannot be cut into stages ({describe_error(error):.160})"
        ) from error
    stages = tuple(Stage(int(stage["reduction"]), str(stage["module"])) for stage in cut.feature_info.info)
    if dilation and stages[-1].stride != 16:
        raise ValueError(f"model.backbone.dilation: {name} does not give its last stage stride 16")
    return Outline(whole, stages, options, _size_multiple(cut, name))


def without_storage(name: str, **arguments: Any) -> nn.Module:
    """A model to look at; with storage only if this version of timm computes with values while it builds it."""
    # With storage, it would draw initial weights, and those of the detector would be others.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return timm.create_model(name, pretrained=False, **arguments)
        except NotImplementedError:
            return timm.create_model(name, pretrained=False, **arguments)


Channels = tuple[float, float, float]
"""A number for red, green and blue."""


def pixel_statistics(name: str) -> tuple[Channels, Channels]:
    """Return (mean, standard deviation) that a model's training images were normalised with, for pixels in [0, 1].

    Raises:
        ValueError: timm has no such model, or no such weights of it.
    """
    if not timm.is_model(name):
        raise ValueError(f"model.backbone.model: timm has no model '{name}'")
    try:
        trained: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise ValueError(f"model.backbone.model: {name} cannot be used ({describe_error(error):.160})") from error
    mean, std = ((float(red), float(green), float(blue)) for red, green, blue in (trained.mean, trained.std))
    return mean, std


def layer_numbers(model: nn.Module, coarse: bool = False) -> dict[str, int]:
    """Return the layer of each parameter of a whole model by name, counted from 0, its stem.

    Args:
        model: one of timm's.
        coarse: whether stages count instead of blocks.
    """
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        return dict(group_parameters(model, matcher(coarse=coarse), reverse=True))
    return {name: number for number, (name, _) in enumerate(model.named_parameters())}


def names_in_whole(body: nn.Module, whole: nn.Module) -> dict[str, str]:
    """Return the name in timm's whole model of every parameter and buffer of the model that is cut into stages."""
    # A cut model has the whole one within, or names its parts with underscores where that nests them: stages_0.
    children = list(body.children())
    inside = len(children) == 1 and type(children[0]) is type(whole)
    nested = {module.replace(".", "_"): module for module, _ in whole.named_modules() if module}
    names = {}
    for name in body.state_dict():
        first, _, rest = name.partition(".")
        names[name] = rest if inside else f"{nested.get(first, first)}.{rest}"
    return names


@lru_cache(maxsize=32)
def parameters_of_maps(name: str, dilation: bool, indices: tuple[int, ...]) -> frozenset[str]:
    """Return the names, in the whole model, of the trainable parameters that some stages' maps depend on.

    Found by the gradient, without storage: what a stage consists of is said by no two families in the same way.
    """
    found = outline(name, dilation)
    cut: Any = without_storage(name, features_only=True, out_indices=indices, **found.options)
    accept_any_size(cut)
    height, width = (-(-size // found.size_multiple) * found.size_multiple for size in _PROBE)
    trained = {key: parameter for key, parameter in cut.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        maps = cut.eval()(torch.zeros(1, 3, height, width, device=next(cut.parameters()).device))
        sums = [feature.sum() for feature in maps]
        gradients = torch.autograd.grad(sums, list(trained.values()), allow_unused=True)
    names = names_in_whole(cut, found.whole)
    return frozenset(names[key] for key, gradient in zip(trained, gradients, strict=True) if gradient is not None)


def frozen_parameters(name: str, dilation: bool, stages: int | Literal["stem"]) -> frozenset[str]:
    """Return the names, in the whole model, of what a number of stages (from stride 4 on) or the stem consists of.

    Raises:
        ValueError: the model has fewer stages.
    """
    found = outline(name, dilation)
    ends = [index for index, stage in enumerate(found.stages) if stage.stride >= 4]
    if isinstance(stages, int) and stages > len(ends):
        raise ValueError(f"model.backbone.frozen_stages: {stages} is more than the model's {len(ends)} stages")
    last = ends[stages - 1] if isinstance(stages, int) else ends[0] - 1
    numbers = layer_numbers(found.whole)
    if found.stages[max(last, 0)].module not in dict(found.whole.named_modules()):
        deepest = {max(numbers[key] for key in parameters_of_maps(name, dilation, (i,))) for i in (ends[0], ends[-1])}
        if (
            len(deepest) == 1
        ):  # parallel branches: all maps come from the end, and stages are no modules but have numbers
            coarse = layer_numbers(found.whole, coarse=True)
            return frozenset(key for key, number in coarse.items() if number <= last)
    if last >= 0 and found.stages[last].module:
        return parameters_of_maps(name, dilation, (last,))
    inside = f"{found.stages[ends[0]].module}."
    first = min((number for key, number in numbers.items() if key.startswith(inside)), default=1)
    stem = {key for key, number in numbers.items() if number < first}
    # A token that only the head sees may have the number of the stem.
    return parameters_of_maps(name, dilation, (ends[0],)) & stem


def _options_for_any_size(whole: nn.Module) -> dict[str, Any]:
    """What a model's constructors offer: positions interpolated to the image, windows that shift even where the model's
    own image size is a single window. Padding to whole patches is the backbone's, in a form that can be exported."""
    known = {name for kind in type(whole).__mro__ for name in inspect.signature(kind).parameters}
    wanted = {"dynamic_img_size": True, "strict_img_size": False, "always_partition": True}
    return {name: value for name, value in wanted.items() if name in known}


def _size_multiple(cut: Any, name: str) -> int:
    """The least multiple to which images of any size must be padded: none, its stride, 32, or its training images.

    Layers that pad as TensorFlow does, by as much as a size leaves over, would look at a pixel's left neighbour or at
    itself as the size happens to be; so images are padded to the model's stride, where they always do the same.
    """
    accept_any_size(cut)
    trained: Any = timm.get_pretrained_cfg(name)
    own = int(trained.input_size[-1])
    device = next(cut.parameters()).device
    rows, columns = (1, 2) if str(getattr(cut, "output_fmt", "NCHW")).endswith("NHWC") else (2, 3)
    bounded = any(type(module).__name__ in _BOUNDED for module in cut.modules())
    stride = max(cut.feature_info.reduction())
    least = stride if any(isinstance(module, EvenConv2dSame) for module in cut.modules()) else 1
    for multiple in sorted({least, stride, 32, own} if not bounded else ()):
        height, width = (-(-size // multiple) * multiple for size in _PROBE)
        try:
            with torch.no_grad():
                cut.eval()(torch.zeros(1, 3, height, width, device=device))
                features = cut(torch.zeros(1, 3, height, width + multiple, device=device))
        except Exception:  # each model has its own way to refuse a size
            continue
        for feature, stride in zip(features, cut.feature_info.reduction(), strict=True):
            sizes = (feature.shape[rows], height), (feature.shape[columns], width + multiple)
            if any(abs(found - size / stride) > 1 for found, size in sizes):
                raise ValueError(f"model.backbone.model: {name} gives maps of other strides than it states")
        return multiple
    raise ValueError(f"model.backbone.model: {name} takes only images of {own} × {own} pixels")
