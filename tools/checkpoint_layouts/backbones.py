"""Backbone entries of the layouts, and the timm model that has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tools.checkpoint_layouts.conversion import Rule, count

BODY = "backbone.body."
_COUNTER = "counts batches, which frozen statistics do not need"

_RESNETS = {(3, 4, 6, 3): "resnet50.tv_in1k", (3, 4, 23, 3): "resnet101.tv_in1k", (3, 8, 36, 3): "resnet152.tv_in1k"}
_SWINS = {
    (96, 6, 7): "swin_tiny_patch4_window7_224",
    (96, 18, 7): "swin_small_patch4_window7_224",
    (128, 18, 7): "swin_base_patch4_window7_224",
    (128, 18, 12): "swin_base_patch4_window12_384",
    (192, 18, 7): "swin_large_patch4_window7_224",
    (192, 18, 12): "swin_large_patch4_window12_384",
}
"""(first width, blocks of the third stage, window): timm model."""


def torchvision_resnet(prefix: str) -> list[Rule]:
    """Rules for a ResNet under torchvision's names (timm's are the same)."""
    return [
        Rule(rf"{prefix}(?:.+\.)?num_batches_tracked", None, _COUNTER),
        Rule(rf"{prefix}fc\.(?:weight|bias)", None, "classifies whole images"),
        Rule(rf"{prefix}((?:conv1|bn1|layer[1-4]\.\d+)\..+)", rf"{BODY}\1"),
    ]


def detectron2_resnet(prefix: str) -> list[Rule]:
    """Rules for a ResNet under detectron2's names: res2 to res5 are torchvision's layer1 to layer4."""
    rules = [
        Rule(rf"{prefix}(?:.+\.)?num_batches_tracked", None, _COUNTER),
        Rule(rf"{prefix}stem\.fc\.(?:weight|bias)", None, "classifies whole images"),
        Rule(rf"{prefix}stem\.conv1\.weight", f"{BODY}conv1.weight"),
        Rule(rf"{prefix}stem\.conv1\.norm\.(\w+)", rf"{BODY}bn1.\1"),
    ]
    for stage in range(2, 6):
        source, target = rf"{prefix}res{stage}\.(\d+)\.", rf"{BODY}layer{stage - 1}.\1."
        rules += [
            Rule(rf"{source}shortcut\.weight", rf"{target}downsample.0.weight"),
            Rule(rf"{source}shortcut\.norm\.(\w+)", rf"{target}downsample.1.\2"),
            Rule(rf"{source}conv(\d)\.weight", rf"{target}conv\2.weight"),
            Rule(rf"{source}conv(\d)\.norm\.(\w+)", rf"{target}bn\2.\3"),
        ]
    return rules


def swin(prefix: str, first_level: int) -> list[Rule]:
    """Rules for a Swin transformer under the names of its own detection code.

    Args:
        prefix: pattern before the backbone's own names.
        first_level: stage of the finest level in use; timm merges patches at the start of a stage, not at its end.
    """
    rules = [
        Rule(rf"{prefix}.+\.relative_position_index", None, "follows from the window size"),
        Rule(rf"{prefix}(patch_embed\.(?:proj|norm)\.\w+)", rf"{BODY}\1"),
        Rule(rf"{prefix}layers\.(\d+)\.blocks\.(.+)", rf"{BODY}layers_\1.blocks.\2"),
    ]
    for stage in range(3):
        merging = rf"{prefix}layers\.{stage}\.downsample\.(.+)"
        rules.append(Rule(merging, rf"{BODY}layers_{stage + 1}.downsample.\1"))
    for stage in range(first_level, 4):
        rules.append(Rule(rf"{prefix}norm{stage}\.(\w+)", rf"backbone.output_norms.{stage - first_level}.\1"))
    return rules


def infer_backbone(tensors: Mapping[str, Tensor], dilation: bool) -> dict[str, Any]:
    """The ``model.backbone`` section of a configuration that has these (renamed) entries.

    Args:
        tensors: of the whole detector.
        dilation: whether the last stage is dilated, which does not show.

    Raises:
        ValueError: it is of a kind or size that is not supported.
    """
    levels = max(1, count(tensors, r"neck\.lateral\.(\d+)\.0\.weight"))
    strides = [(16 if dilation else 32) >> i for i in reversed(range(levels))]
    if f"{BODY}conv1.weight" in tensors:
        depths = tuple(count(tensors, rf"{re.escape(BODY)}layer{stage}\.(\d+)\..+") for stage in range(1, 5))
        if depths not in _RESNETS:
            raise ValueError(f"a ResNet with {depths} blocks is not supported; known: 50, 101 and 152 layers")
        frozen = {"norm": "frozen", "frozen_stages": 1}
        return {"model": _RESNETS[depths], "strides": strides, "dilation": dilation, **frozen}
    width = tensors[f"{BODY}patch_embed.proj.weight"].shape[0]
    blocks = count(tensors, rf"{re.escape(BODY)}layers_2\.blocks\.(\d+)\..+")
    table = tensors[f"{BODY}layers_0.blocks.0.attn.relative_position_bias_table"].shape[0]
    window = (round(table**0.5) + 1) // 2
    if (width, blocks, window) not in _SWINS:
        raise ValueError(f"a Swin transformer of width {width}, {blocks} blocks and window {window} is not supported")
    model = _SWINS[width, blocks, window]
    return {"model": model, "strides": strides, "norm": "batch", "frozen_stages": 0, "output_norm": True}
