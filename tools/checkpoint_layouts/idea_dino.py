"""Checkpoints of IDEA-Research/DINO, the code of the paper: class rows are category ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tools.checkpoint_layouts.backbones import swin, torchvision_resnet
from tools.checkpoint_layouts.conversion import (
    Conventions,
    Rule,
    deformable_attention,
    parameters,
    self_attention,
)

NAME = "IDEA-Research/DINO"
ROWS_ARE_IDS = True

# What args may say, where only one value is the model that this project has.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "decoder_sa_type": ("sa",),
    "decoder_module_seq": (["sa", "ca", "ffn"], None),
    "transformer_activation": ("relu",),
    "two_stage_type": ("standard",),
    "position_embedding": ("sine", "v2"),
    "pre_norm": (False,),
    "dilation": (False,),
    "embed_init_tgt": (True,),
    "add_channel_attention": (False,),
    "num_patterns": (0,),
    "dec_layer_number": (None,),
    "nms_iou_threshold": (-1,),
}


def recognises(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are entries of this layout."""
    return "transformer.level_embed" in weights and "transformer.decoder.ref_point_head.layers.0.weight" in weights


def conventions(content: Mapping[str, Any]) -> Conventions:
    """How this implementation computes, as far as the file says it in ``args``, else as its published models do.

    Raises:
        ValueError: ``args`` asks for something that this project does not have.
    """
    args = vars(content["args"]) if hasattr(content.get("args"), "__dict__") else {}
    for key, supported in _REQUIRED.items():
        if key in args and args[key] not in supported:
            raise ValueError(f"was trained with {key}={args[key]!r}, which is not supported")
    if args.get("pe_temperatureH", 20) != args.get("pe_temperatureW", 20):
        raise ValueError("was trained with different pe_temperatureH and pe_temperatureW, which is not supported")
    return Conventions(
        temperature=float(args.get("pe_temperatureH", 20)),
        offset=0.0,
        num_heads=int(args.get("nheads", 8)),
        top_k=int(args.get("num_select", 300)),
        denoising={
            "queries": int(args.get("dn_number") or 100),
            "label_noise": float(args.get("dn_label_noise_ratio", 0.5)),
            "box_noise": float(args.get("dn_box_noise_scale", 0.4)),
        },
    )


def rules(weights: Mapping[str, Tensor]) -> list[Rule]:
    """Rules for all entries of the layout."""
    projections = {
        name: weights[name].shape[-1] for name in weights if re.fullmatch(r"input_proj\.\d+\.0\.weight", name)
    }
    num_lateral = sum(kernel == 1 for kernel in projections.values())
    encoder, decoder = r"transformer\.encoder\.layers\.(\d+)", r"transformer\.decoder\.layers\.(\d+)"
    own_encoder, own_decoder = r"encoder.layers.\1", r"decoder.layers.\1"
    return [
        *swin(r"backbone\.0\.", 4 - num_lateral),
        *torchvision_resnet(r"backbone\.0\.body\."),
        *(parameters(rf"input_proj\.{i}\.(\d)", rf"neck.lateral.{i}.\1") for i in range(num_lateral)),
        *(
            parameters(rf"input_proj\.{i}\.(\d)", rf"neck.extra.{i - num_lateral}.\1")
            for i in range(num_lateral, len(projections))
        ),
        Rule(r"transformer\.level_embed", "level_embedding"),
        *deformable_attention(rf"{encoder}\.self_attn", f"{own_encoder}.attention"),
        parameters(rf"{encoder}\.norm1", f"{own_encoder}.norm"),
        parameters(rf"{encoder}\.linear1", f"{own_encoder}.feed_forward.expand"),
        parameters(rf"{encoder}\.linear2", f"{own_encoder}.feed_forward.contract"),
        parameters(rf"{encoder}\.norm2", f"{own_encoder}.feed_forward.norm"),
        parameters(r"transformer\.enc_output", "query_selection.projection"),
        parameters(r"transformer\.enc_output_norm", "query_selection.norm"),
        parameters(r"transformer\.enc_out_class_embed", "query_selection.heads.class_head"),
        parameters(r"transformer\.enc_out_bbox_embed\.layers\.(\d+)", r"query_selection.heads.box_head.layers.\1"),
        Rule(r"transformer\.tgt_embed\.weight", "query_content.weight"),
        Rule(r"label_enc\.weight", "denoising.label_embedding.weight"),
        *self_attention(rf"{decoder}\.self_attn", f"{own_decoder}.self_attention"),
        *deformable_attention(rf"{decoder}\.cross_attn", f"{own_decoder}.cross_attention"),
        parameters(rf"{decoder}\.norm1", f"{own_decoder}.cross_norm"),
        parameters(rf"{decoder}\.norm2", f"{own_decoder}.self_norm"),
        parameters(rf"{decoder}\.linear1", f"{own_decoder}.feed_forward.expand"),
        parameters(rf"{decoder}\.linear2", f"{own_decoder}.feed_forward.contract"),
        parameters(rf"{decoder}\.norm3", f"{own_decoder}.feed_forward.norm"),
        parameters(r"transformer\.decoder\.norm", "decoder.norm"),
        parameters(r"transformer\.decoder\.ref_point_head\.layers\.(\d+)", r"decoder.position_head.layers.\1"),
        parameters(r"(?:transformer\.decoder\.)?class_embed\.(\d+)", r"heads.\1.class_head"),
        parameters(r"(?:transformer\.decoder\.)?bbox_embed\.(\d+)\.layers\.(\d+)", r"heads.\1.box_head.layers.\2"),
    ]
