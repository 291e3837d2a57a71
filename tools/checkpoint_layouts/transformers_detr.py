"""Checkpoints of the package transformers, DETR and Deformable DETR: class rows are category ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tools.checkpoint_layouts.backbones import torchvision_resnet
from tools.checkpoint_layouts.conversion import (
    Conventions,
    Rule,
    count,
    deformable_attention,
    heads_of_layers,
    parameters,
)
from tools.checkpoint_layouts.official_parts import neck

NAME = "transformers (DETR or Deformable DETR)"
ROWS_ARE_IDS = True

_ENCODER, _DECODER = r"model\.encoder\.layers\.(\d+)", r"model\.decoder\.layers\.(\d+)"


def recognises(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are entries of this layout."""
    return "model.encoder.layers.0.self_attn_layer_norm.weight" in weights and any(
        name in weights for name in ("class_labels_classifier.weight", "model.level_embed")
    )


def conventions(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Conventions:
    """How this implementation computes; its files say nothing of it, so this is what its published models do."""
    return Conventions(temperature=10000.0, offset=-0.5 if "model.level_embed" in weights else 0.0, top_k=100)


def rules(weights: Mapping[str, Tensor]) -> list[Rule]:
    """Rules for all entries of the layout."""
    num_layers = count(weights, r"model\.decoder\.layers\.(\d+)\..+")
    encoder, decoder = r"encoder.layers.\1", r"decoder.layers.\1"
    return [
        *torchvision_resnet(r"model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?"),
        *neck(weights, r"model\.input_proj"),
        parameters(r"model\.input_projection", "input_projection"),
        Rule(r"model\.level_embed", "level_embedding"),
        *_attention(rf"{_ENCODER}\.self_attn", f"{encoder}.attention", ("query_projection", "key_projection")),
        *deformable_attention(rf"{_ENCODER}\.self_attn", f"{encoder}.attention"),
        parameters(rf"{_ENCODER}\.self_attn_layer_norm", f"{encoder}.norm"),
        *_feed_forward(_ENCODER, encoder),
        *_attention(
            rf"{_DECODER}\.self_attn",
            f"{decoder}.self_attention",
            ("query_key_projection#0", "query_key_projection#1"),
        ),
        parameters(rf"{_DECODER}\.self_attn_layer_norm", f"{decoder}.self_norm"),
        *_attention(rf"{_DECODER}\.encoder_attn", f"{decoder}.cross_attention", ("query_projection", "key_projection")),
        *deformable_attention(rf"{_DECODER}\.encoder_attn", f"{decoder}.cross_attention"),
        parameters(rf"{_DECODER}\.encoder_attn_layer_norm", f"{decoder}.cross_norm"),
        *_feed_forward(_DECODER, decoder),
        parameters(r"model\.decoder\.layernorm", "decoder.norm"),
        Rule(
            r"model\.query_position_embeddings\.weight",
            "query_position_content" if "model.level_embed" in weights else "query_position.weight",
        ),
        parameters(r"model\.reference_points", "point_head"),
        parameters(r"model\.enc_output", "query_selection.projection"),
        parameters(r"model\.enc_output_norm", "query_selection.norm"),
        parameters(r"model\.pos_trans", "query_from_box.projection"),
        parameters(r"model\.pos_trans_norm", "query_from_box.norm"),
        parameters(r"class_labels_classifier", "heads.class_head"),
        parameters(r"bbox_predictor\.layers\.(\d+)", r"heads.box_head.layers.\1"),
        *heads_of_layers(num_layers, r"(?:model\.decoder\.)?"),
    ]


def _attention(source: str, own: str, queries_and_keys: tuple[str, str]) -> list[Rule]:
    targets = (*queries_and_keys, "value_projection", "output_projection")
    sources = ("q_proj", "k_proj", "v_proj", "(?:out|o)_proj")
    return [parameters(rf"{source}\.{name}", f"{own}.{target}") for name, target in zip(sources, targets, strict=True)]


def _feed_forward(prefix: str, own: str) -> list[Rule]:
    return [
        parameters(rf"{prefix}\.(?:mlp\.)?fc1", f"{own}.feed_forward.expand"),
        parameters(rf"{prefix}\.(?:mlp\.)?fc2", f"{own}.feed_forward.contract"),
        parameters(rf"{prefix}\.final_layer_norm", f"{own}.feed_forward.norm"),
    ]
