"""Feature extractors: any ``features_only`` model of timm, by name."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from models.parts.swin import accept_any_size


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A timm model that is cut into its stages."""

    model: str = "resnet50.tv_in1k"
    """Name of a timm model, with its weights' tag where they matter."""
    pretrained: bool | str = True
    """True: timm's weights for that name; false: random initialisation; else a file (.pth or .safetensors)."""
    strides: tuple[int, ...] = (8, 16, 32)
    """Strides of the levels to use, ascending."""
    norm: Literal["frozen", "batch", "group"] = "frozen"
    """BatchNorm with frozen statistics and weights (fine-tuning), trained BatchNorm, or GroupNorm in its place."""
    dilation: bool = False
    """Dilated convolutions in place of the last stage's stride (DETR's DC5); strides then name half of its own."""
    frozen_stages: int | Literal["stem"] = 1
    """Stages that are not trained, counted from the first of stride 4 or more, their stem included; "stem" freezes it
    alone and 0 trains all."""
    output_norm: bool = False
    """A LayerNorm on every level, as detectors on Swin have it; only for models that compute with channels last."""
    channels_last: bool = False
    """Memory layout of images and features; pays on GPUs with 16-bit convolutions."""

    def __post_init__(self) -> None:
        if not self.strides or list(self.strides) != sorted(set(self.strides)):
            raise ValueError(f"strides must ascend, found {list(self.strides)}")
        if isinstance(self.frozen_stages, int) and self.frozen_stages < 0:
            raise ValueError("frozen_stages must not be negative")
        if self.pretrained is False and (self.norm == "frozen" or self.frozen_stages):
            # Freezing random weights or statistics trains a detector on noise, silently.
            raise ValueError(
                "pretrained=false needs norm: batch or group and frozen_stages: 0, or random layers would stay frozen"
            )

    def build(self, load_weights: bool = True) -> Backbone:
        """Make the model and load its weights.

        Args:
            load_weights: false where a checkpoint of the whole detector follows, so that ``pretrained`` is not needed.

        Raises:
            ValueError: unknown model, unsuitable strides, or weights that cannot be had.
        """
        return Backbone(self, load_weights)


class Backbone(nn.Module):
    """Maps images to one feature map per configured stride."""

    def __init__(self, config: BackboneConfig, load_weights: bool = True) -> None:
        super().__init__()
        self.channels_last = config.channels_last
        body = _create(config, load_weights)
        self.channels: tuple[int, ...] = tuple(body.feature_info.channels())
        if tuple(body.feature_info.reduction()) != config.strides:
            raise ValueError(
                f"backbone {config.model} has no strides {list(config.strides)}: {body.feature_info.reduction()}"
            )
        accept_any_size(body)
        self.body = body
        self.features_come_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
        if config.norm == "frozen":
            self.body = freeze_batch_norm_2d(self.body)
        elif config.norm == "group":
            _batch_to_group_norm(self.body)
        _freeze_stages(self.body, config)
        if config.output_norm and not self.features_come_last:
            raise ValueError(f"model.backbone.output_norm: {config.model} computes with channels first")
        norms = (nn.LayerNorm(channels) for channels in self.channels) if config.output_norm else ()
        self.output_norms = nn.ModuleList(norms)
        if config.channels_last:
            self.to(memory_format=torch.channels_last)

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward pass, where the timm model knows how to."""
        if not hasattr(self.body, "set_grad_checkpointing"):
            return
        self.body.set_grad_checkpointing(enable)
        for module in self.body.modules():
            # What a recomputed part reads must still be there: an activation in place would have overwritten it.
            if enable and getattr(module, "inplace", False):
                module.inplace = False

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] → maps [B, channels_i, ≈H / stride_i, ≈W / stride_i], finest first."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.body(images)
        if self.features_come_last and self.output_norms:
            features = [norm(feature) for norm, feature in zip(self.output_norms, features, strict=True)]
        if self.features_come_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return list(features)


def _create(config: BackboneConfig, load_weights: bool) -> Any:
    if not timm.is_model(config.model):
        raise ValueError(f"model.backbone.model: timm has no model '{config.model}'")
    options = _options(config.model) | _dilated(config)
    try:
        reductions, _ = _probe(config)
    except RuntimeError as error:  # an unknown tag of weights, or a model that cannot be cut into stages
        raise ValueError(f"model.backbone.model: {config.model} cannot be used ({error})") from error
    missing = [stride for stride in config.strides if stride not in reductions]
    if missing:
        raise ValueError(f"model.backbone.strides: {config.model} offers {reductions}, not {missing}")
    last = {
        stride: index for index, stride in enumerate(reductions)
    }  # a dilated stage has the stride of the one before
    options["out_indices"] = tuple(last[stride] for stride in config.strides)
    if not load_weights:
        return timm.create_model(config.model, features_only=True, pretrained=False, **options)
    if isinstance(config.pretrained, str):
        body = timm.create_model(config.model, features_only=True, pretrained=False, **options)
        _load_weights(body, config.model, config.pretrained)
        return body
    try:
        return timm.create_model(config.model, features_only=True, pretrained=config.pretrained, **options)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the weights of {config.model} cannot be had ({' '.join(str(error).split())[:160]}); without network set "
            "model.backbone.pretrained to a local file, or to false (with norm: batch, frozen_stages: 0) to train "
            "from scratch"
        ) from error


def _load_weights(body: nn.Module, name: str, path: str) -> None:
    """Fill a cut model from a file for the whole model; every parameter and buffer must be in it."""
    whole = _outline(name)
    state = _read_weights(path)
    convert = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, whole)
    # Cut models name their parts with underscores where the whole model nests them: stages_0 was stages.0.
    nested = {module.replace(".", "_"): module for module, _ in whole.named_modules() if module}
    selected, missing = {}, []
    for key, value in body.state_dict().items():
        first, _, rest = key.partition(".")
        source = f"{nested.get(first, first)}.{rest}"
        if source in state and state[source].shape == value.shape:
            selected[key] = state[source]
        else:
            missing.append(source)
    if missing:
        raise ValueError(
            f"{path}: does not fit backbone {name}: {len(missing)} of {len(missing) + len(selected)} entries absent "
            f"or of another shape, the first is {missing[0]}"
        )
    body.load_state_dict(selected)


def _dilated(config: BackboneConfig) -> dict[str, Any]:
    return {"output_stride": 16} if config.dilation else {}


def _probe(config: BackboneConfig) -> tuple[list[int], list[str]]:
    """Strides that a model offers and the names of the children that end there."""
    try:
        info: Any = _outline(config.model, features_only=True, **_dilated(config)).feature_info
    except (TypeError, AssertionError, NotImplementedError) as error:
        if not config.dilation:
            raise
        raise ValueError(f"model.backbone.dilation: {config.model} has no dilated form") from error
    if config.dilation and info.reduction()[-1] != 16:
        raise ValueError(f"model.backbone.dilation: {config.model} does not give its last stage stride 16")
    return list(info.reduction()), [module.replace(".", "_") for module in info.module_name()]


def _outline(name: str, **arguments: Any) -> nn.Module:
    """A model to look at; without storage, unless this version of timm computes with values while it builds it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return timm.create_model(name, pretrained=False, **arguments, **_options(name))
        except NotImplementedError:
            return timm.create_model(name, pretrained=False, **arguments, **_options(name))


def _options(name: str) -> dict[str, Any]:
    # Window transformers otherwise insist on the image size of their pretraining, and do not shift the windows of
    # stages that are a single window at that size.
    return {"strict_img_size": False, "always_partition": True} if "swin" in name else {}


def _read_weights(path: str) -> dict[str, Tensor]:
    """A state dict of backbone weights, torchvision's or timm's, without executing anything in the file."""
    if not Path(path).is_file():
        raise ValueError(f"model.backbone.pretrained: no such file '{path}'")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has its own exceptions; all mean the same to the user
        raise ValueError(f"{path}: not a readable weight file ({' '.join(str(error).split())[:120]})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no state dict of a backbone")
    return state


def _batch_to_group_norm(module: nn.Module, num_groups: int = 32) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = num_groups if child.num_features % num_groups == 0 else 1
            norm: nn.Module = nn.GroupNorm(groups, child.num_features)
            # timm merges the activation into its BatchNorm layers.
            activation = getattr(child, "act", None)
            setattr(module, name, norm if activation is None else nn.Sequential(norm, activation))
        else:
            _batch_to_group_norm(child, num_groups)


def _freeze_stages(body: Any, config: BackboneConfig) -> None:
    """Stop gradients up to the end of the ``frozen_stages``-th stage of stride 4 or more, or before the first."""
    if not config.frozen_stages:
        return
    ends = [name for reduction, name in zip(*_probe(config), strict=True) if reduction >= 4]
    number = config.frozen_stages if isinstance(config.frozen_stages, int) else 1
    if number > len(ends):
        raise ValueError(f"frozen_stages {number}: {config.model} has {len(ends)} stages")
    last = ends[number - 1]
    for name, child in body.named_children():
        if name == last and config.frozen_stages == "stem":
            return
        child.requires_grad_(False)
        if name == last:
            return
    raise ValueError(f"model.backbone.frozen_stages: cannot find the end of stage {number} ({last})")
