"""What files of DETR's own code and of the codes that grew out of it have in common: names and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tools.checkpoint_layouts.conversion import Rule, deformable_attention, parameters, self_attention

ENCODER, OWN_ENCODER = r"transformer\.encoder\.layers\.(\d+)", r"encoder.layers.\1"
DECODER, OWN_DECODER = r"transformer\.decoder\.layers\.(\d+)", r"decoder.layers.\1"

# What args may say, where only one value is the model that this project has.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "position_embedding": ("sine", "v2"),
    "pre_norm": (False,),
    "num_patterns": (0,),
    "query_dim": (4,),
    "query_scale_type": ("cond_elewise",),
    "bbox_embed_diff_each_layer": (False,),
}


def settings(content: Mapping[str, Any], **required: tuple[Any, ...]) -> dict[str, Any]:
    """What ``args`` of a file says; none where it has none.

    Args:
        content: of the file.
        required: further settings of which only these values are supported.

    Raises:
        ValueError: it asks for something that this project does not have.
    """
    args = vars(content["args"]) if hasattr(content.get("args"), "__dict__") else {}
    for key, supported in {**_REQUIRED, **required}.items():
        if key in args and args[key] not in supported:
            raise ValueError(f"was trained with {key}={args[key]!r}, which is not supported")
    if args.get("pe_temperatureH") != args.get("pe_temperatureW"):
        raise ValueError("was trained with different pe_temperatureH and pe_temperatureW, which is not supported")
    return args


def layers(self_norm: int, cross_norm: int) -> list[Rule]:
    """Rules for norms and feed-forward blocks of both stacks, by the numbers of the norms in a decoder layer."""
    return [
        parameters(rf"{ENCODER}\.norm1", f"{OWN_ENCODER}.norm"),
        *_feed_forward(ENCODER, 2, OWN_ENCODER),
        parameters(rf"{DECODER}\.norm{self_norm}", f"{OWN_DECODER}.self_norm"),
        parameters(rf"{DECODER}\.norm{cross_norm}", f"{OWN_DECODER}.cross_norm"),
        *_feed_forward(DECODER, 3, OWN_DECODER),
        parameters(r"transformer\.decoder\.norm", "decoder.norm"),
    ]


def multi_scale(weights: Mapping[str, Tensor]) -> list[Rule]:
    """Rules for neck, levels, both stacks and proposals of detectors with deformable attention."""
    return [
        *neck(weights, r"input_proj"),
        Rule(r"transformer\.level_embed", "level_embedding"),
        *layers(2, 1),
        *deformable_attention(rf"{ENCODER}\.self_attn", f"{OWN_ENCODER}.attention"),
        *self_attention(rf"{DECODER}\.self_attn", f"{OWN_DECODER}.self_attention"),
        *deformable_attention(rf"{DECODER}\.cross_attn", f"{OWN_DECODER}.cross_attention"),
        parameters(r"transformer\.enc_output", "query_selection.projection"),
        parameters(r"transformer\.enc_output_norm", "query_selection.norm"),
    ]


def num_lateral(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many of the neck's convolutions are 1 x 1, which those on levels of the backbone are."""
    return sum(weights[name].shape[-1] == 1 for name in weights if re.fullmatch(rf"{prefix}\.\d+\.0\.weight", name))


def neck(weights: Mapping[str, Tensor], prefix: str) -> list[Rule]:
    """Rules for a neck whose levels are counted through."""
    lateral = num_lateral(weights, prefix)
    numbers = sorted(
        {int(match[1]) for name in weights if (match := re.fullmatch(rf"{prefix}\.(\d+)\.0\.weight", name))}
    )
    own = [f"lateral.{i}" if i < lateral else f"extra.{i - lateral}" for i in numbers]
    return [parameters(rf"{prefix}\.{i}\.(\d)", rf"neck.{name}.\1") for i, name in zip(numbers, own, strict=True)]


def _feed_forward(prefix: str, norm: int, own: str) -> list[Rule]:
    return [
        parameters(rf"{prefix}\.linear1", f"{own}.feed_forward.expand"),
        parameters(rf"{prefix}\.linear2", f"{own}.feed_forward.contract"),
        parameters(rf"{prefix}\.activation", f"{own}.feed_forward.activation"),
        parameters(rf"{prefix}\.norm{norm}", f"{own}.feed_forward.norm"),
    ]
