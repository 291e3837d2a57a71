"""Checkpoints of mmdetection 3 (DINO): clamps predicted boxes at 1e-5, keeps its settings as text in ``meta``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tools.checkpoint_layouts.backbones import torchvision_resnet
from tools.checkpoint_layouts.conversion import Conventions, Rule, count, parameters
from tools.checkpoint_layouts.mmcv_parts import decoder_layers, encoder_layers, neck

NAME = "mmdetection 3 (DINO)"
ROWS_ARE_IDS = False


def recognises(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are entries of this layout."""
    return "memory_trans_fc.weight" in weights and "bbox_head.cls_branches.0.weight" in weights


def conventions(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Conventions:
    """How this implementation computes: its published DINO, with what ``meta`` says otherwise."""
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    text = meta.get("cfg")
    text = text if isinstance(text, str) else ""
    dataset = meta.get("dataset_meta")
    names = next((v for k, v in dataset.items() if str(k).lower() == "classes"), None) if dataset else None
    if "bgr_to_rgb=False" in text:
        raise ValueError("was trained on images with blue first (bgr_to_rgb=False), which is not supported")
    encoding = _first(r"positional_encoding=dict\(([^)]*)\)", text, "")
    return Conventions(
        temperature=float(_first(r"\btemperature=([\d.]+)", encoding, "20")),
        offset=float(_first(r"\boffset=(-?[\d.]+)", encoding, "0")),
        prediction_eps=1e-5,
        top_k=int(_first(r"\bmax_per_img=(\d+)", text, "300")),
        denoising={
            "queries": int(_first(r"\bnum_dn_queries=(\d+)", text, "100")),
            "label_noise": float(_first(r"\blabel_noise_scale=([\d.]+)", text, "0.5")),
            "box_noise": float(_first(r"\bbox_noise_scale=([\d.]+)", text, "1.0")),
        },
        mean=_channels("mean", text, (123.675, 116.28, 103.53)),
        std=_channels("std", text, (58.395, 57.12, 57.375)),
        class_names=tuple(map(str, names)) if isinstance(names, (list, tuple)) else None,
    )


def rules(weights: Mapping[str, Tensor]) -> list[Rule]:
    """Rules for all entries of the layout."""
    num_layers = count(weights, r"decoder\.layers\.(\d+)\..+")
    # The branch after those of the decoder's layers is the encoder's.
    heads = [(f"{i}", f"heads.{i}") for i in range(num_layers)] + [(f"{num_layers}", "query_selection.heads")]
    return [
        Rule(r"data_preprocessor\..+", None, "pixel statistics are part of the configuration"),
        *torchvision_resnet(r"backbone\."),
        *neck("gn"),
        Rule(r"level_embed", "level_embedding"),
        *encoder_layers(r"encoder\.layers\.(\d+)", "self_attn", "ffn"),
        parameters(r"memory_trans_fc", "query_selection.projection"),
        parameters(r"memory_trans_norm", "query_selection.norm"),
        Rule(r"query_embedding\.weight", "query_content.weight"),
        Rule(r"dn_query_generator\.label_embedding\.weight", "denoising.label_embedding.weight"),
        *decoder_layers(r"decoder\.layers\.(\d+)", "self_attn", "cross_attn", "ffn"),
        parameters(r"decoder\.norm", "decoder.norm"),
        parameters(r"decoder\.ref_point_head\.layers\.(\d+)", r"decoder.position_head.layers.\1"),
        *(parameters(rf"bbox_head\.cls_branches\.{index}", f"{own}.class_head") for index, own in heads),
        *(
            parameters(rf"bbox_head\.reg_branches\.{index}\.{2 * layer}", f"{own}.box_head.layers.{layer}")
            for index, own in heads
            for layer in range(3)
        ),
    ]


def _first(pattern: str, text: str, default: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else default


def _channels(key: str, text: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    """Pixel statistics, which the settings give for pixels up to 255."""
    match = re.search(rf"\b{key}=\[\s*([\d.]+),\s*([\d.]+),\s*([\d.]+)", text)
    red, green, blue = map(float, match.groups()) if match else default
    return red / 255, green / 255, blue / 255
