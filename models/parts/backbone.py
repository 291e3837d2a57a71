"""Feature extractors: any model of timm that can be cut into stages, and plain vision transformers, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.parts import backbone_weights, timm_models
from models.parts.any_size import accept_any_size
from models.parts.feature_pyramid import SimpleFeaturePyramid
from models.parts.frozen_norms import fold_all, freeze_norms
from models.parts.timm_models import Channels, Outline, names_in_whole, outline, parameters_of_maps
from ops.errors import describe_error


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A timm model that is cut into its stages."""

    model: str = "resnet50.tv_in1k"
    """Name of a timm model, with its weights' tag where they matter."""
    pretrained: bool | str = True
    """True: timm's weights for that name; false: random initialisation; else a file (.pth or .safetensors) in timm's or
    torchvision's names, or with the same layers in the same order, or of a detector that was trained here, whose
    backbone is taken."""
    strides: tuple[int, ...] = (8, 16, 32)
    """Strides of the levels to use, ascending; a plain vision transformer of patch size p offers p/4, p/2, p and 2p."""
    norm: Literal["frozen", "batch", "group"] = "frozen"
    """BatchNorm with frozen statistics and weights (fine-tuning), trained BatchNorm, or GroupNorm in its place."""
    dilation: bool = False
    """Dilated convolutions in place of the last stage's stride (DETR's DC5); strides then name half of its own."""
    frozen_stages: int | Literal["stem"] = 1
    """Stages that are not trained, counted from the first of stride 4 or more, their stem included; "stem" freezes it
    alone and 0 trains all. A plain vision transformer's stages are its blocks."""
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

    @property
    def pixel_statistics(self) -> tuple[Channels, Channels]:
        """(mean, standard deviation) that the model's weights expect images to be normalised with; pixels in [0, 1]."""
        return timm_models.pixel_statistics(self.model)

    def check(self, load_weights: bool = True) -> None:
        """Find out in a moment what :meth:`build` would refuse, except for weights that timm has to fetch.

        Raises:
            ValueError: as of :meth:`build`.
        """
        found = outline(self.model, self.dilation)
        indices = _indices(self, found)
        if self.frozen_stages:
            timm_models.frozen_parameters(self.model, self.dilation, self.frozen_stages)
        if load_weights and isinstance(self.pretrained, str):
            state = backbone_weights.read(self.pretrained)
            if backbone_weights.are_of_detector(state):
                with torch.random.fork_rng(devices=[]):
                    self.build()
                return
            body = timm_models.without_storage(self.model, features_only=True, out_indices=indices, **found.options)
            used = parameters_of_maps(self.model, self.dilation, indices)
            backbone_weights.select_weights(body, found.whole, state, self.pretrained, self.model, used)

    def build(self, load_weights: bool = True) -> Backbone:
        """Make the model and load its weights.

        Args:
            load_weights: false where a checkpoint of the whole detector follows, so that ``pretrained`` is not needed.

        Raises:
            ValueError: unknown model, unsuitable strides or stages, or weights that cannot be had or do not fit.
        """
        return Backbone(self, load_weights)


class Backbone(nn.Module):
    """Maps images to one feature map per configured stride."""

    def __init__(self, config: BackboneConfig, load_weights: bool = True) -> None:
        super().__init__()
        self.channels_last = self._recomputes = False
        found = outline(config.model, config.dilation)
        self.size_multiple, self.strides = found.size_multiple, config.strides
        state = None
        if load_weights and isinstance(config.pretrained, str):
            state = backbone_weights.read(config.pretrained)
        body = _create(config, found, load_weights, state)
        accept_any_size(body)
        self.channels: tuple[int, ...] = tuple(body.feature_info.channels())
        self.features_come_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
        if config.output_norm and not self.features_come_last:
            raise ValueError(f"model.backbone.output_norm: {config.model} computes with channels first")
        names, layers = names_in_whole(body, found.whole), timm_models.layer_numbers(found.whole)
        # What only later stages need stays in the model, but would wait for a gradient for ever.
        used = parameters_of_maps(config.model, config.dilation, _indices(config, found))
        idle = {name for name, _ in body.named_parameters() if names[name] not in used}
        if config.frozen_stages:
            used -= timm_models.frozen_parameters(config.model, config.dilation, config.frozen_stages)
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(names[name] in used)
        self._layers = {f"body.{name}": layers[names[name]] for name, _ in body.named_parameters()}
        self._normed: list[Any] = []
        if config.norm == "frozen":
            least = found.size_multiple * -(-64 // found.size_multiple)
            body, self._normed = freeze_norms(body, (least, least))
        elif config.norm == "group":
            _batch_to_group_norm(body)
            for name, parameter in body.named_parameters():
                if _replaced(name) in idle:
                    parameter.requires_grad_(False)
        if state is not None and backbone_weights.are_of_detector(state):
            backbone_weights.load_of_detector(body, state, str(config.pretrained))
        self.body = body
        norms = (nn.LayerNorm(channels) for channels in self.channels) if config.output_norm else ()
        self.output_norms = nn.ModuleList(norms)
        self.pyramid = None
        if found.is_plain:
            self.pyramid = SimpleFeaturePyramid(self.channels[0], found.stages[0].stride, config.strides)
            self.channels = self.pyramid.channels
        if config.channels_last:
            self.set_channels_last()

    def set_channels_last(self) -> None:
        """Lay out weights and images with their channels last, which many convolutions compute faster."""
        self.channels_last = True
        self.to(memory_format=torch.channels_last)

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward pass of training, where the timm model knows how to."""
        self._recomputes = enable
        for module in self.body.modules():
            # What a recomputed part reads must still be there: an activation in place would have overwritten it.
            if enable and getattr(module, "inplace", False):
                module.inplace = False
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        """Set training or evaluation mode; only training recomputes, so that evaluation can be exported."""
        for module in self.body.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = mode and self._recomputes
        return super().train(mode)

    def layer_depths(self) -> dict[str, int]:
        """Return by parameter name how many layers, as timm counts them, lie between it and what follows the model.

        The last layer has depth 1, and what is not timm's (the norms of the levels, the feature pyramid) has 0.
        """
        end = 1 + max(self._layers.values())
        depths = {}
        for name, _ in self.named_parameters():
            depths[name] = end - self._layers.get(name, self._layers.get(_replaced(name), end))
        return depths

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] → maps [B, channels_i, ≈H / stride_i, ≈W / stride_i], finest first."""
        height, width = images.shape[-2:]
        if self.size_multiple > 1:
            # Rounded up with positive numbers: ONNX divides towards zero.
            multiple = self.size_multiple
            images = _fit(images, *((side + multiple - 1) // multiple * multiple for side in (height, width)))
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        # At once, unless parts are recomputed, or exported: there each convolution does it by itself.
        at_once = not (self._recomputes or torch.compiler.is_compiling())
        if at_once and self._normed:
            fold_all(self._normed)
        try:
            features = list(self.body(images))
        finally:
            for convolution in self._normed:
                convolution.now = None
        if self.features_come_last and self.output_norms:
            features = [norm(feature) for norm, feature in zip(self.output_norms, features, strict=True)]
        if self.features_come_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        if self.pyramid is not None:
            features = self.pyramid(features[0])
        if self.size_multiple > 1 or self.pyramid is not None:  # what was padded is cut off
            sizes = [((height + stride - 1) // stride, (width + stride - 1) // stride) for stride in self.strides]
            features = [_fit(feature, *size) for feature, size in zip(features, sizes, strict=True)]
        return features


def _fit(maps: Tensor, height: int, width: int) -> Tensor:
    """[B, C, h, w] → [B, C, height, width], cut off or continued with zeros on the right and at the bottom."""
    if not torch.compiler.is_exporting():
        return F.pad(maps, (0, width - maps.shape[-1], 0, height - maps.shape[-2]))
    # By index: padding and slicing compare sizes, and torch.export takes what it finds in the example for a rule.
    rows, columns = (torch.arange(side, device=maps.device) for side in (height, width))
    inside = (rows < maps.shape[-2])[:, None] & (columns < maps.shape[-1])
    rows, columns = rows.clamp(max=maps.shape[-2] - 1), columns.clamp(max=maps.shape[-1] - 1)
    return maps.index_select(-2, rows).index_select(-1, columns) * inside


def _indices(config: BackboneConfig, found: Outline) -> tuple[int, ...]:
    """Which of the model's stages give the levels; of a plain model, the last."""
    own = found.stages[0].stride
    offered = [stage.stride for stage in found.stages]
    if found.is_plain:
        offered = [int(own * scale) for scale in SimpleFeaturePyramid.SCALES if own * scale == int(own * scale)]
    missing = [stride for stride in config.strides if stride not in offered]
    if missing:
        raise ValueError(f"model.backbone.strides: {config.model} offers {offered}, not {missing}")
    if found.is_plain:
        return (len(found.stages) - 1,)
    last = {stride: index for index, stride in enumerate(offered)}  # a dilated stage repeats the stride before it
    return tuple(last[stride] for stride in config.strides)


def _create(config: BackboneConfig, found: Outline, load_weights: bool, state: dict[str, Tensor] | None) -> Any:
    indices = _indices(config, found)
    options = {"features_only": True, "out_indices": indices, **found.options}
    if not load_weights or isinstance(config.pretrained, str):
        body = timm.create_model(config.model, pretrained=False, **options)
        if state is not None and not backbone_weights.are_of_detector(state):
            used, path = parameters_of_maps(config.model, config.dilation, indices), str(config.pretrained)
            fitting = backbone_weights.select_weights(body, found.whole, state, path, config.model, used)
            body.load_state_dict(fitting)
        return body
    try:
        return timm.create_model(config.model, pretrained=config.pretrained, **options)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the weights of {config.model} cannot be had ({describe_error(error):.160}); without network set "
            "model.backbone.pretrained to a local file, or to false (with norm: batch, frozen_stages: 0) to train "
            "from scratch"
        ) from error


def _replaced(name: str) -> str:
    """The name that a GroupNorm's parameter had as a BatchNorm's; others keep theirs."""
    module, _, kind = name.rpartition(".")
    return f"{module.removesuffix('.0')}.{kind}"  # with timm's activation behind it


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
