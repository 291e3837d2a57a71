"""The ``model`` section of a configuration, inferred from entries that have this project's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tools.checkpoint_layouts.conversion import Conventions, count, is_class_agnostic


def infer_name(tensors: Mapping[str, Tensor]) -> str:
    """The name of the detector that has these entries."""
    if is_class_agnostic(tensors):
        return "h_detr" if "query_content.weight" in tensors else "deformable_detr"
    if "level_embedding" in tensors:
        return "deformable_detr" if "query_position.weight" in tensors else "dino"
    if "query_boxes.weight" in tensors:
        return "dn_detr" if "denoising.no_label" in tensors else "dab_detr"
    return "conditional_detr" if "point_head.layers.0.weight" in tensors else "detr"


def infer_model(tensors: Mapping[str, Tensor], conventions: Conventions, shared_heads: bool) -> dict[str, Any]:
    """The ``model`` section of a configuration whose model has these entries (the backbone's part aside)."""
    name, num_heads = infer_name(tensors), conventions.num_heads
    queries = ("query_content.weight", "query_position.weight", "query_boxes.weight")
    found = [] if name == "h_detr" else [tensors[table].shape[0] for table in queries if table in tensors]
    model: dict[str, Any] = {
        "name": name,
        "embed_dim": tensors["encoder.layers.0.norm.weight"].shape[0],
        "num_heads": num_heads,
        "encoder_layers": count(tensors, r"encoder\.layers\.(\d+)\..+"),
        "decoder_layers": count(tensors, r"decoder\.layers\.(\d+)\..+"),
        "ffn_dim": tensors["encoder.layers.0.feed_forward.expand.weight"].shape[0],
        "num_queries": found[0] if found else conventions.num_queries,
        "position_encoding": {"temperature": conventions.temperature, "offset": conventions.offset},
        "detections_per_image": conventions.top_k,
    }
    if "level_embedding" in tensors:
        model["num_levels"] = num_levels = tensors["level_embedding"].shape[0]
        weights = tensors["encoder.layers.0.attention.attention_weights.weight"]
        model["num_points"] = weights.shape[0] // (num_heads * num_levels)
    if "query_selection.projection.weight" in tensors:
        model["published"] = {"suppress_invalid_proposals": False}
    if name == "dino":
        model["published"] |= {"padded_query_positions": True, "prediction_eps": conventions.prediction_eps}
        model["shared_heads"] = shared_heads
        has_labels = "denoising.label_embedding.weight" in tensors
        model["denoising"] = dict(conventions.denoising) if has_labels else None
    elif name == "dn_detr":
        model["denoising"] = dict(conventions.denoising)
    elif "level_embedding" in tensors:
        model["box_refinement"], model["two_stage"] = not shared_heads, is_class_agnostic(tensors)
        model["look_forward_twice"] = conventions.look_forward_twice
    if name == "h_detr":
        model["one_to_many_queries"] = tensors["query_content.weight"].shape[0] - conventions.num_queries
    return model
