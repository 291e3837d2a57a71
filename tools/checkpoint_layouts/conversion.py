"""What all layouts share: renaming by rules, heads, class rows and matrices that are cut or joined."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datasets import Category


class Rule(NamedTuple):
    """Entries whose whole name matches ``pattern`` become ``target``, a replacement that may use its groups.

    Targets that end with ``#0`` and ``#1`` are joined, row below row.
    """

    pattern: str
    target: str | None
    """None: the entry is left out."""
    reason: str = ""
    """Why it is left out."""
    transform: Callable[[Tensor], Tensor] | None = None
    """Applied to the value."""


def parameters(source: str, target: str) -> Rule:
    """A rule for the weight and bias of one layer; ``source`` is a pattern and may have groups."""
    name, joined, part = target.partition("#")
    return Rule(rf"{source}\.(?P<kind>weight|bias)", rf"{name}.\g<kind>{joined}{part}")


def deformable_attention(source: str, target: str) -> list[Rule]:
    """Rules for deformable attention, whose parts bear the same names in all layouts."""
    parts = ("value_proj", "value_projection"), ("output_proj", "output_projection")
    same = ("sampling_offsets", "sampling_offsets"), ("attention_weights", "attention_weights")
    return [parameters(rf"{source}\.{a}", f"{target}.{b}") for a, b in (*parts, *same)]


def self_attention(source: str, target: str) -> list[Rule]:
    """Rules for PyTorch's multi-head attention, whose joint matrix :func:`cut_and_join` cuts later."""
    joint = Rule(rf"{source}\.in_proj_(?P<kind>weight|bias)", rf"{target}.in_projection.\g<kind>")
    return [joint, parameters(rf"{source}\.out_proj", f"{target}.output_projection")]


def heads_of_layers(num_layers: int, prefix: str = r"(?:transformer\.decoder\.)?") -> list[Rule]:
    """Rules for heads that are counted through; those after the decoder layers' are the encoder's."""
    heads = [(i, f"heads.{i}") for i in range(num_layers)] + [(num_layers, "query_selection.heads")]
    return [
        *(parameters(rf"{prefix}class_embed\.{index}", f"{own}.class_head") for index, own in heads),
        *(
            parameters(rf"{prefix}bbox_embed\.{index}\.layers\.(\d+)", rf"{own}.box_head.layers.\1")
            for index, own in heads
        ),
    ]


def count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the first group of ``pattern`` takes among the names that match as a whole."""
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What cannot be read off the weights: how the implementation computes with them."""

    temperature: float
    """Of the encoder's position encoding."""
    offset: float
    """Of the encoder's position encoding."""
    prediction_eps: float = 1e-3
    """Where logits of boxes are clamped to predict from them."""
    num_heads: int = 8
    """Attention heads."""
    top_k: int = 300
    """Detections per image."""
    denoising: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the denoising configuration."""
    num_queries: int = 300
    """Queries of the decoder, where the weights do not tell."""
    look_forward_twice: bool = False
    """Whether the boxes of Deformable DETR's layers were refined with the gradient of the layer before."""
    dilation: bool = False
    """Whether the last stage of the backbone is dilated (DC5)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Pixel statistics, RGB in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Likewise."""
    class_names: tuple[str, ...] | None = None
    """Classes in the order of their rows, where the file says them."""


class Renamed(NamedTuple):
    """Entries under this project's names."""

    tensors: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    """Names in the file of each entry."""
    left_out: dict[str, str]
    """Reason for each entry of the file that is not used."""


def rename(weights: Mapping[str, Tensor], rules: Sequence[Rule], ignore: Sequence[str] = ()) -> Renamed:
    """Apply the first matching rule to each entry.

    Args:
        weights: of the file.
        rules: of its layout.
        ignore: patterns of entries that the user wants left out.

    Raises:
        ValueError: an entry matches no rule, or two different entries have one target.
    """
    result = Renamed({}, {}, {})
    compiled = [Rule(pattern, None, "left out on request") for pattern in ignore] + list(rules)
    unknown = []
    for name, value in weights.items():
        rule = next((rule for rule in compiled if re.fullmatch(rule.pattern, name)), None)
        if rule is None:
            unknown.append(name)
            continue
        if rule.target is None:
            result.left_out[name] = rule.reason
            continue
        target = re.sub(rule.pattern, rule.target, name)
        value = value if rule.transform is None else rule.transform(value)
        if target not in result.tensors:
            result.tensors[target], result.sources[target] = value, (name,)
        elif torch.equal(result.tensors[target], value):
            result.left_out[name] = f"the same as {result.sources[target][0]}"
        else:
            raise ValueError(f"{name} and {result.sources[target][0]} should be the same, but differ")
    if unknown:
        raise ValueError(
            f"{len(unknown)} entries are unknown to this layout ({', '.join(unknown[:4])}"
            f"{', …' if unknown[4:] else ''}): without them the model would compute something else; --leave-out "
            "PATTERN if they are known not to matter"
        )
    return result


def share_heads(renamed: Renamed) -> bool:
    """Drop the heads of all decoder layers but the first where they are all the same; returns whether they were."""
    by_layer: dict[int, dict[str, Tensor]] = {}
    for name, value in renamed.tensors.items():
        match = re.fullmatch(r"heads\.(\d+)\.(.+)", name)
        if match:
            by_layer.setdefault(int(match[1]), {})[match[2]] = value
    if not by_layer:
        return True
    first, *others = (by_layer[layer] for layer in sorted(by_layer))
    if not all(
        other.keys() == first.keys() and all(torch.equal(other[k], first[k]) for k in first) for other in others
    ):
        return False
    for layer in sorted(by_layer)[1:]:
        for part in by_layer[layer]:
            name = f"heads.{layer}.{part}"
            (source,) = renamed.sources.pop(name)
            renamed.left_out[source] = f"the same as {renamed.sources[f'heads.0.{part}'][0]}"
            del renamed.tensors[name]
    return True


def cut_and_join(renamed: Renamed) -> list[str]:
    """Make matrices as this project has them; returns a line for each entry of which only a part is used."""
    lines = []
    for name in list(renamed.tensors):
        pieces = _pieces(name, renamed.tensors[name], is_class_agnostic(renamed.tensors))
        if pieces:
            source, value = renamed.sources.pop(name), renamed.tensors.pop(name)
            if sum(piece.numel() for piece in pieces.values()) < value.numel():
                lines.append(f"{source[0]}: only the first row tells objects from background")
            renamed.tensors.update(pieces)
            renamed.sources.update(dict.fromkeys(pieces, source))
    for first in [name for name in renamed.tensors if name.endswith("#0")]:
        target = first.removesuffix("#0")
        names = [name for name in (first, f"{target}#1") if name in renamed.tensors]
        renamed.tensors[target] = torch.cat([renamed.tensors.pop(name) for name in names])
        renamed.sources[target] = tuple(source for name in names for source in renamed.sources.pop(name))
    return lines


def is_class_agnostic(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the encoder's proposals are about objects of any class, as those of Deformable DETR are."""
    return "query_from_box.projection.weight" in tensors


def _pieces(name: str, value: Tensor, class_agnostic: bool) -> dict[str, Tensor]:
    """What an entry is cut into, by name; nothing where it stays whole."""
    before, joint, kind = name.partition(".in_projection.")
    if joint and before.endswith(".self_attention"):
        third = value.shape[0] // 3
        pieces = {"query_key": value[: 2 * third], "value": value[2 * third :]}
        return {f"{before}.{part}_projection.{kind}": rows for part, rows in pieces.items()}
    if joint:
        parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
        return {f"{before}.{part}_projection.{kind}": rows for part, rows in parts}
    if name == "query_position_content":
        return dict(zip(("query_position.weight", "query_content.weight"), value.chunk(2, dim=1), strict=True))
    if name == "denoising.labels.weight":
        return {"denoising.label_embedding.weight": value[:-1], "denoising.no_label": value[-1]}
    if class_agnostic and name.startswith("query_selection.heads.class_head."):
        return {name: value[:1]}
    return {}


def select_class_rows(renamed: Renamed, rows: Sequence[int], no_object: bool) -> list[str]:
    """Keep the rows of these classes, in this order, of everything that has one per class.

    Args:
        renamed: entries, which are changed.
        rows: of the classes.
        no_object: whether the class head's last row, for "no object", is kept behind them.

    Returns:
        A line for each entry that is cut.
    """
    lines = []
    for name, value in renamed.tensors.items():
        if "class_head" not in name.split(".") and name != "denoising.label_embedding.weight":
            continue
        if name.startswith("query_selection.") and is_class_agnostic(renamed.tensors):
            continue
        source = renamed.sources[name][0]
        if max(rows) >= value.shape[0]:
            raise ValueError(f"{source} has {value.shape[0]} rows, the categories need {max(rows) + 1}")
        kept = [*rows, value.shape[0] - 1] if no_object else list(rows)
        if kept != list(range(value.shape[0])):
            renamed.tensors[name] = value[torch.tensor(kept)]
            spare = value.shape[0] - len(kept)
            lines.append(f"{source}: {len(kept)} rows taken, {spare} of no category left out")
    return lines


def fill_biases(renamed: Renamed) -> dict[str, str]:
    """Zero biases for the neck's convolutions where the layout has none; {entry: reason} of those filled."""
    filled = {}
    for name in list(renamed.tensors):
        match = re.fullmatch(r"(neck\.(?:lateral|extra)\.\d+\.0\.)weight", name)
        if match and f"{match[1]}bias" not in renamed.tensors:
            renamed.tensors[f"{match[1]}bias"] = torch.zeros(renamed.tensors[name].shape[0])
            filled[f"{match[1]}bias"] = "zero: the layout has no bias there"
    return filled


def class_rows(
    num_rows: int, by_id: bool, categories: Sequence[Category], names: Sequence[str] | None, given: bool
) -> list[int]:
    """The row of each category in class heads of ``num_rows`` rows.

    Args:
        num_rows: rows of the class heads.
        by_id: rows are category ids; else they follow the order of the ids, or of ``names``.
        categories: in the order of their ids.
        names: classes in the order of the rows, where the file says them.
        given: whether the user named the categories, for the message.

    Raises:
        ValueError: the categories are not those of the checkpoint.
    """
    hint = "" if given else "; give the annotation file it was trained with: --categories FILE.json"
    if by_id:
        highest = max(category.id for category in categories)
        if highest >= num_rows or (not given and highest + 1 != num_rows):
            raise ValueError(f"the checkpoint has {num_rows} class rows, but category ids go up to {highest}{hint}")
        return [category.id for category in categories]
    if names is not None and len(names) == num_rows and set(names) == {category.name for category in categories}:
        return [list(names).index(category.name) for category in categories]
    if num_rows != len(categories):
        raise ValueError(f"the checkpoint has {num_rows} classes, the annotations have {len(categories)}{hint}")
    return list(range(num_rows))
