"""Layouts of published checkpoints. To add one: a file like the others, and its name in ``LAYOUTS``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from datasets import Category
from tools.checkpoint_layouts import (
    detrex,
    idea_dino,
    mmdetection,
    official_deformable_detr,
    official_detr,
    transformers_detr,
)
from tools.checkpoint_layouts.backbones import infer_backbone
from tools.checkpoint_layouts.coco_categories import COCO
from tools.checkpoint_layouts.conversion import (
    Conventions,
    Rule,
    class_rows,
    cut_and_join,
    fill_biases,
    rename,
    select_class_rows,
    share_heads,
)
from tools.checkpoint_layouts.inference import infer_model, infer_name

__all__ = ["COCO", "LAYOUTS", "Conversion", "Layout", "convert", "recognise"]


class Layout(Protocol):
    """What a layout's module has."""

    NAME: str
    ROWS_ARE_IDS: bool

    def recognises(self, weights: Mapping[str, Tensor]) -> bool: ...

    def conventions(self, content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Conventions: ...

    def rules(self, weights: Mapping[str, Tensor]) -> list[Rule]: ...


LAYOUTS: tuple[Layout, ...] = (
    *(idea_dino, detrex, mmdetection),
    *(official_detr, official_deformable_detr, transformers_detr),
)


class Conversion(NamedTuple):
    """A checkpoint in this project's terms, and what became of every entry of the file."""

    layout: str
    tensors: dict[str, Tensor]
    categories: tuple[Category, ...]
    model: dict[str, Any]
    """The ``model`` section of the configuration."""
    data: dict[str, Any]
    """Keys of the ``data`` section that the weights depend on."""
    sources: dict[str, tuple[str, ...]]
    """Names in the file of each entry of ``tensors`` that comes from there."""
    left_out: dict[str, str]
    """Reason for each entry of the file that is not used."""
    filled: dict[str, str]
    """Reason for each entry of ``tensors`` that is not in the file."""
    cut: list[str]
    """A line for each entry of which only some rows are used."""


def recognise(weights: Mapping[str, Tensor]) -> Layout:
    """The layout of a detector's entries.

    Raises:
        ValueError: it is none of the known ones; says what it is where that can be told.
    """
    for layout in LAYOUTS:
        if layout.recognises(weights):
            return layout
    if any(name.startswith("bbox_head.transformer.") for name in weights):
        raise ValueError("this is a checkpoint of mmdetection 2; mmdetection 3 renames its entries when it loads them")
    if any(name in weights for name in ("layer1.0.conv1.weight", "patch_embed.proj.weight", "stem.0.weight")):
        raise ValueError(
            "these are weights of a backbone alone, which need no import: train with model.backbone.pretrained=FILE"
        )
    known = ", ".join(layout.NAME for layout in LAYOUTS)
    raise ValueError(f"no known layout (known: {known}); the first entries are {', '.join(list(weights)[:3])}")


def convert(
    content: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    categories: Sequence[Category] | None = None,
    ignore: Sequence[str] = (),
) -> Conversion:
    """Rename, cut and check.

    Args:
        content: of the whole file, for the settings beside the weights.
        weights: the chosen entries.
        categories: of the annotations that the model was trained on, in the order of their ids; None: COCO's, or what
            the file says.
        ignore: patterns of entries to leave out although they are unknown.

    Raises:
        ValueError: the layout is unknown, an entry is, or the categories do not fit.
    """
    layout = recognise(weights)
    conventions = layout.conventions(content, weights)
    renamed = rename(weights, layout.rules(weights), ignore)
    shared = share_heads(renamed)
    cut = cut_and_join(renamed)
    found = renamed.tensors
    heads = found.get("heads.class_head.weight", found.get("heads.0.class_head.weight"))
    needed = ("encoder.layers.0.norm.weight", "encoder.layers.0.feed_forward.expand.weight")
    if heads is None or any(name not in found for name in needed):
        raise ValueError(f"{layout.NAME}: entries of class heads or of the encoder are missing")
    no_object = infer_name(found) == "detr"
    num_rows = heads.shape[0] - no_object
    chosen = _categories(categories, conventions.class_names, num_rows, layout.ROWS_ARE_IDS)
    rows = class_rows(num_rows, layout.ROWS_ARE_IDS, chosen, conventions.class_names, categories is not None)
    cut += select_class_rows(renamed, rows, no_object)
    filled = fill_biases(renamed)
    model = infer_model(found, conventions, shared)
    model["backbone"] = infer_backbone(found, conventions.dilation)
    data = {"mean": list(conventions.mean), "std": list(conventions.std)}
    return Conversion(layout.NAME, found, chosen, model, data, renamed.sources, renamed.left_out, filled, cut)


def _categories(
    given: Sequence[Category] | None, names: Sequence[str] | None, num_rows: int, by_id: bool
) -> tuple[Category, ...]:
    """The user's, or COCO's where the class heads have their size, or those of the file under ids from 1 on."""
    if given is not None:
        return tuple(given)
    coco_names = {category.name for category in COCO}
    if names is not None and not by_id and len(names) == num_rows and set(names) != coco_names:
        return tuple(Category(i + 1, name) for i, name in enumerate(names))
    return COCO
