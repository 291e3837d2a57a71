"""Checkpoints of Deformable DETR (plain, refined, two-stage) and H-DETR by their authors: class rows are ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tools.checkpoint_layouts.backbones import swin, torchvision_resnet
from tools.checkpoint_layouts.conversion import Conventions, Rule, count, heads_of_layers, parameters
from tools.checkpoint_layouts.official_parts import multi_scale, num_lateral, settings

NAME = "Deformable DETR or H-DETR by its authors"
ROWS_ARE_IDS = True


def recognises(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are entries of this layout."""
    return "transformer.level_embed" in weights and "class_embed.0.weight" in weights


def conventions(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Conventions:
    """How these implementations compute, as far as the file says it in ``args``, else as their published models do."""
    args = settings(content, masks=(False,), dilation=(False,))
    # Proposals with learned contents are H-DETR's.
    hybrid = {"query_embed.weight", "transformer.pos_trans.weight"} <= weights.keys()
    return Conventions(
        temperature=10000.0,
        offset=-0.5,
        num_heads=int(args.get("nheads", 8)),
        top_k=int(args.get("topk", 100)),
        num_queries=int(args.get("num_queries_one2one", args.get("num_queries", 300))),
        look_forward_twice=bool(args.get("look_forward_twice", hybrid)),
    )


def rules(weights: Mapping[str, Tensor]) -> list[Rule]:
    """Rules for all entries of the layout."""
    num_layers = count(weights, r"transformer\.decoder\.layers\.(\d+)\..+")
    two_stage = "transformer.pos_trans.weight" in weights
    return [
        *torchvision_resnet(r"backbone\.0\.body\."),
        *swin(r"backbone\.0\.body\.", 4 - num_lateral(weights, "input_proj")),
        *multi_scale(weights),
        Rule(r"query_embed\.weight", "query_content.weight" if two_stage else "query_position_content"),
        parameters(r"transformer\.reference_points", "point_head"),
        parameters(r"transformer\.pos_trans", "query_from_box.projection"),
        parameters(r"transformer\.pos_trans_norm", "query_from_box.norm"),
        *heads_of_layers(num_layers),
    ]
