"""Checkpoints of DETR, Conditional DETR, DAB-DETR and DN-DETR by their authors: class rows are category ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tools.checkpoint_layouts.backbones import torchvision_resnet
from tools.checkpoint_layouts.conversion import Conventions, Rule, parameters, self_attention
from tools.checkpoint_layouts.official_parts import DECODER, ENCODER, OWN_DECODER, OWN_ENCODER, layers, settings

NAME = "DETR, Conditional DETR, DAB-DETR or DN-DETR by its authors"
ROWS_ARE_IDS = True

# The projections of the queries' content and place; those after a number are parts of one matrix.
_CONDITIONAL = {
    "sa_qcontent_proj": "self_attention.content_projection#0",
    "sa_kcontent_proj": "self_attention.content_projection#1",
    "sa_qpos_proj": "self_attention.position_projection#0",
    "sa_kpos_proj": "self_attention.position_projection#1",
    "sa_v_proj": "self_attention.value_projection",
    "ca_qcontent_proj": "cross_attention.content_projection",
    "ca_qpos_proj": "cross_attention.position_projection",
    "ca_qpos_sine_proj": "cross_attention.place_projection",
    "ca_kcontent_proj": "cross_attention.key_content_projection",
    "ca_kpos_proj": "cross_attention.key_place_projection",
    "ca_v_proj": "cross_attention.value_projection",
    r"cross_attn\.out_proj": "cross_attention.output_projection",
}


def recognises(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are entries of this layout."""
    return "input_proj.weight" in weights and "transformer.encoder.layers.0.linear1.weight" in weights


def conventions(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Conventions:
    """How these implementations compute, as far as the file says it in ``args``, else as their published models do."""
    args = settings(content, masks=(False,))
    boxes = "refpoint_embed.weight" in weights
    return Conventions(
        temperature=float(args.get("pe_temperatureH", 20)) if boxes else 10000.0,
        offset=0.0,
        num_heads=int(args.get("nheads", 8)),
        top_k=int(args.get("num_select", 300)) if boxes else 100,
        denoising={
            "groups": int(args.get("scalar", 5)),
            "label_noise": float(args.get("label_noise_scale", 0.2)),
            "box_noise": float(args.get("box_noise_scale", 0.4)),
        },
        dilation=bool(args.get("dilation", False)),
    )


def rules(weights: Mapping[str, Tensor]) -> list[Rule]:
    """Rules for all entries of the layout."""
    boxes = "refpoint_embed.weight" in weights
    own = r"decoder." if boxes else ""
    return [
        *torchvision_resnet(r"backbone\.0\.body\."),
        parameters(r"input_proj", "input_projection"),
        *layers(1, 2),
        *self_attention(rf"{ENCODER}\.self_attn", f"{OWN_ENCODER}.attention"),
        *self_attention(rf"{DECODER}\.self_attn", f"{OWN_DECODER}.self_attention"),
        *self_attention(rf"{DECODER}\.multihead_attn", f"{OWN_DECODER}.cross_attention"),
        *(parameters(rf"{DECODER}\.{name}", f"{OWN_DECODER}.{target}") for name, target in _CONDITIONAL.items()),
        Rule(r"query_embed\.weight", "query_position.weight"),
        Rule(r"refpoint_embed\.weight", "query_boxes.weight"),
        Rule(r"label_enc\.weight", "denoising.labels.weight"),
        parameters(r"transformer\.encoder\.query_scale\.layers\.(\d+)", r"encoder.position_scale.layers.\1"),
        parameters(r"transformer\.decoder\.query_scale\.layers\.(\d+)", rf"{own}place_scale.layers.\1"),
        parameters(
            r"transformer\.decoder\.ref_point_head\.layers\.(\d+)",
            r"decoder.position_head.layers.\1" if boxes else r"point_head.layers.\1",
        ),
        parameters(r"transformer\.decoder\.ref_anchor_head\.layers\.(\d+)", r"decoder.size_head.layers.\1"),
        parameters(r"class_embed", "heads.class_head"),
        parameters(r"(?:transformer\.decoder\.)?bbox_embed\.layers\.(\d+)", r"heads.box_head.layers.\1"),
    ]
