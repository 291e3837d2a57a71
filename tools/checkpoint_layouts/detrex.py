"""Checkpoints of detrex (DINO) and of Align-DETR, which is built on it: detectron2's names, heads per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tools.checkpoint_layouts.backbones import detectron2_resnet, swin
from tools.checkpoint_layouts.conversion import Conventions, Rule, count, heads_of_layers, parameters
from tools.checkpoint_layouts.mmcv_parts import decoder_layers, encoder_layers, neck

NAME = "detrex (DINO or Align-DETR)"
ROWS_ARE_IDS = False


def recognises(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are entries of this layout."""
    return "transformer.level_embeds" in weights and "transformer.decoder.ref_point_head.layers.0.weight" in weights


def conventions(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Conventions:
    """How this implementation computes; its files say nothing of it, so this is what its DINO models do."""
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
        *encoder_layers(r"transformer\.encoder\.layers\.(\d+)", r"attentions\.0", r"ffns\.0"),
        parameters(r"transformer\.enc_output", "query_selection.projection"),
        parameters(r"transformer\.enc_output_norm", "query_selection.norm"),
        Rule(r"transformer\.tgt_embed\.weight", "query_content.weight"),
        Rule(r"label_enc\.weight", "denoising.label_embedding.weight"),
        *decoder_layers(r"transformer\.decoder\.layers\.(\d+)", r"attentions\.0", r"attentions\.1", r"ffns\.0"),
        parameters(r"transformer\.decoder\.norm", "decoder.norm"),
        parameters(r"transformer\.decoder\.ref_point_head\.layers\.(\d+)", r"decoder.position_head.layers.\1"),
        *heads_of_layers(num_layers),
    ]
