"""Checkpoints of IDEA-Research/DINO, the code of the paper: class rows are category ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tools.checkpoint_layouts.backbones import swin, torchvision_resnet
from tools.checkpoint_layouts.conversion import Conventions, Rule, parameters
from tools.checkpoint_layouts.official_parts import multi_scale, num_lateral, settings

NAME = "IDEA-Research/DINO"
ROWS_ARE_IDS = True

_REQUIRED: dict[str, tuple[Any, ...]] = {
    "decoder_sa_type": ("sa",),
    "decoder_module_seq": (["sa", "ca", "ffn"], None),
    "transformer_activation": ("relu",),
    "two_stage_type": ("standard",),
    "dilation": (False,),
    "embed_init_tgt": (True,),
    "add_channel_attention": (False,),
    "dec_layer_number": (None,),
    "nms_iou_threshold": (-1,),
}


def recognises(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are entries of this layout."""
    return "transformer.level_embed" in weights and "transformer.decoder.ref_point_head.layers.0.weight" in weights


def conventions(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Conventions:
    """How this implementation computes, as far as the file says it in ``args``, else as its published models do."""
    args = settings(content, **_REQUIRED)
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
    return [
        *swin(r"backbone\.0\.", 4 - num_lateral(weights, "input_proj")),
        *torchvision_resnet(r"backbone\.0\.body\."),
        *multi_scale(weights),
        parameters(r"transformer\.enc_out_class_embed", "query_selection.heads.class_head"),
        parameters(r"transformer\.enc_out_bbox_embed\.layers\.(\d+)", r"query_selection.heads.box_head.layers.\1"),
        Rule(r"transformer\.tgt_embed\.weight", "query_content.weight"),
        Rule(r"label_enc\.weight", "denoising.label_embedding.weight"),
        parameters(r"transformer\.decoder\.ref_point_head\.layers\.(\d+)", r"decoder.position_head.layers.\1"),
        parameters(r"(?:transformer\.decoder\.)?class_embed\.(\d+)", r"heads.\1.class_head"),
        parameters(r"(?:transformer\.decoder\.)?bbox_embed\.(\d+)\.layers\.(\d+)", r"heads.\1.box_head.layers.\2"),
    ]
