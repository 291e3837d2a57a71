"""Checkpoints of detrex (DINO, DAB-DETR) and of Align-DETR, which is built on it: detectron2's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tools.checkpoint_layouts.backbones import detectron2_resnet, swin
from tools.checkpoint_layouts.conversion import Conventions, Rule, count, heads_of_layers, parameters, self_attention
from tools.checkpoint_layouts.mmcv_parts import decoder_layers, encoder_layers, neck

NAME = "detrex (DINO or DAB-DETR) or Align-DETR"
ROWS_ARE_IDS = False

_ENCODER, _DECODER = r"transformer\.encoder\.layers\.(\d+)", r"transformer\.decoder\.layers\.(\d+)"

# The projections of the two attentions of DAB-DETR's decoder layers; those after a number are parts of one matrix.
_PROJECTIONS = {
    r"0\.query_content": "self_attention.content_projection#0",
    r"0\.key_content": "self_attention.content_projection#1",
    r"0\.query_pos": "self_attention.position_projection#0",
    r"0\.key_pos": "self_attention.position_projection#1",
    r"0\.value": "self_attention.value_projection",
    r"0\.out": "self_attention.output_projection",
    r"1\.query_content": "cross_attention.content_projection",
    r"1\.query_pos": "cross_attention.position_projection",
    r"1\.query_pos_sine": "cross_attention.place_projection",
    r"1\.key_content": "cross_attention.key_content_projection",
    r"1\.key_pos": "cross_attention.key_place_projection",
    r"1\.value": "cross_attention.value_projection",
    r"1\.out": "cross_attention.output_projection",
}
_HEADS = {
    r"transformer\.encoder\.query_scale": "encoder.position_scale",
    r"transformer\.decoder\.query_scale": "decoder.place_scale",
    r"transformer\.decoder\.ref_point_head": "decoder.position_head",
    r"transformer\.decoder\.ref_anchor_head": "decoder.size_head",
    r"(?:transformer\.decoder\.)?bbox_embed": "heads.box_head",
}


def recognises(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are entries of this layout."""
    of_both = "transformer.decoder.ref_point_head.layers.0.weight" in weights
    return of_both and ("transformer.level_embeds" in weights or "anchor_box_embed.weight" in weights)


def conventions(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Conventions:
    """How this implementation computes; its files say nothing of it, so this is what its published models do."""
    if "anchor_box_embed.weight" in weights:
        return Conventions(temperature=20.0, offset=0.0)
    return Conventions(
        temperature=10000.0, offset=-0.5, denoising={"queries": 100, "label_noise": 0.5, "box_noise": 1.0}
    )


def rules(weights: Mapping[str, Tensor]) -> list[Rule]:
    """Rules for all entries of the layout."""
    num_lateral = count(weights, r"neck\.convs\.(\d+)\.conv\.weight")
    num_layers = count(weights, r"transformer\.decoder\.layers\.(\d+)\..+")
    return [
        Rule(r"pixel_(?:mean|std)", None, "pixel statistics are part of the configuration"),
        *detectron2_resnet(r"backbone\."),
        *swin(r"backbone\.", 4 - num_lateral),
        *neck("norm"),
        Rule(r"transformer\.level_embeds", "level_embedding"),
        *encoder_layers(_ENCODER, r"attentions\.0", r"ffns\.0"),
        *self_attention(rf"{_ENCODER}\.attentions\.0\.attn", r"encoder.layers.\1.attention"),
        parameters(r"transformer\.enc_output", "query_selection.projection"),
        parameters(r"transformer\.enc_output_norm", "query_selection.norm"),
        Rule(r"transformer\.tgt_embed\.weight", "query_content.weight"),
        Rule(r"label_enc\.weight", "denoising.label_embedding.weight"),
        *decoder_layers(_DECODER, r"attentions\.0", r"attentions\.1", r"ffns\.0"),
        parameters(r"transformer\.decoder\.(?:norm|post_norm_layer)", "decoder.norm"),
        *heads_of_layers(num_layers),
        parameters(r"input_proj", "input_projection"),
        Rule(r"anchor_box_embed\.weight", "query_boxes.weight"),
        *(
            parameters(rf"{_DECODER}\.attentions\.{source}_proj", rf"decoder.layers.\1.{target}")
            for source, target in _PROJECTIONS.items()
        ),
        *(parameters(rf"{source}\.layers\.(\d+)", rf"{target}.layers.\1") for source, target in _HEADS.items()),
        parameters(r"class_embed", "heads.class_head"),
    ]
