"""Checkpoints in published layouts, made here: names and shapes are listed, values follow from the names.

A fixture ``<case>.json`` lists the entries of one model of a public implementation; ``<case>.npz`` beside it holds what
that implementation computed with the values that :func:`entry` gives, on the images that :func:`images` gives.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "published"
SIZES = ((160, 133), (117, 200))
"""(height, width) of the two images of every case; padded together to 160 x 200."""

_TABLES = ("tgt_embed", "query_embedding", "level_embed", "label_enc", "label_embedding", "position_bias")
_QUERIES = ("query_embed.weight", "query_position_embeddings", "refpoint_embed", "anchor_box_embed")
_SHARP = re.compile(
    r"multihead_attn\.in_proj_weight|encoder_attn\.[qk]_proj\.weight|ca_(?:qpos_sine|kpos)_proj\.weight"
    r"|attentions\.1\.(?:query_pos_sine|key_pos)_proj\.weight"
)
_CLASS = ("class_embed", "cls_branches", "class_labels_classifier")
_LAST_BOX_LAYER = re.compile(r"(?:bbox_embed|bbox_predictor)\.(\d+\.)?layers\.2|reg_branches\.\d+\.4")
# Category ids of COCO run to 90, and eleven of them are not in use.
UNUSED_IDS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def uniform(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) that depend on the key alone, on every machine and in every version."""
    count = int(np.prod(shape))
    bits = np.random.RandomState(zlib.crc32(key.encode())).bytes(2 * count)
    return (np.frombuffer(bits, "<i2").astype(np.float32) / 32768).reshape(shape)


def entry(name: str, shape: tuple[int, ...], salt: str) -> Tensor:
    """The value of one entry: spread out so that every parameter matters and activations keep their size."""
    if name.endswith(("num_batches_tracked", "relative_position_index")):
        return torch.zeros(shape, dtype=torch.int64)
    values = uniform(f"{salt}/{name}", shape)
    if any(part in name for part in _CLASS) and name.endswith("bias"):
        values = values - 2
        if shape in ((91,), (92,)):  # training drives the ids without objects far down
            values[list(UNUSED_IDS)] = -20
    elif any(part in name for part in _TABLES):
        pass
    elif any(part in name for part in _QUERIES):
        values = values * 2
    elif name.endswith("activation.weight"):  # of a PReLU
        values = (1 + values) / 4
    elif name.endswith("sampling_offsets.bias"):
        values = values * 4
    elif len(shape) > 1:
        values = values * np.float32(np.sqrt(3 / np.prod(shape[1:])))
        if _LAST_BOX_LAYER.search(name):
            values = values * 2
        elif _SHARP.search(name):  # or queries that differ in their positions alone see the same
            values = values * 3
    elif name.endswith("running_var"):
        values = 1 + values / 2
    elif name.endswith("weight"):
        values = 1 + values * np.float32(0.3)
    else:
        values = values / 5
    return torch.from_numpy(np.ascontiguousarray(values))


def images() -> tuple[Tensor, Tensor]:
    """([2, 3, 160, 200] normalised and padded with zeros, [2, 2] sizes)."""
    padded = torch.zeros(len(SIZES), 3, *(max(side) for side in zip(*SIZES, strict=True)))
    for i, (height, width) in enumerate(SIZES):
        # Coarse blotches with some grain, so that features differ from place to place.
        coarse = torch.from_numpy(uniform(f"blotches {i}", (1, 3, 9, 9)))
        blotches = torch.nn.functional.interpolate(coarse, size=(height, width), mode="nearest")[0]
        padded[i, :, :height, :width] = 1.5 * blotches + torch.from_numpy(uniform(f"grain {i}", (3, height, width)))
    return padded, torch.tensor(SIZES)


def describe(case: str) -> dict[str, Any]:
    """The fixture's JSON: ``entries`` (pattern, shape), ``aliases`` (pattern, replacement), ``salt``, ``settings``."""
    description: dict[str, Any] = json.loads((FIXTURES / f"{case}.json").read_text(encoding="utf-8"))
    return description


def names_and_shapes(description: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every entry of a described model; ``{2-4}`` in a pattern stands for 2, 3 and 4."""
    result = {}
    for pattern, shape in description["entries"]:
        pieces = re.split(r"\{(\d+)-(\d+)\}", pattern)
        ranges = [range(int(a), int(b) + 1) for a, b in zip(pieces[1::3], pieces[2::3], strict=True)]
        for numbers in itertools.product(*ranges):
            filled = itertools.zip_longest(pieces[::3], map(str, numbers), fillvalue="")
            result["".join(itertools.chain.from_iterable(filled))] = tuple(shape)
    return result


def owner(name: str, description: dict[str, Any]) -> str:
    """The entry whose parameter this one is too; itself where it has its own."""
    for pattern, replacement in description["aliases"]:
        name = re.sub(pattern, replacement, name)
    return name


def state_dict(description: dict[str, Any]) -> dict[str, Tensor]:
    """All entries with their values; entries that share a parameter share its value."""
    result: dict[str, Tensor] = {}
    for name, shape in names_and_shapes(description).items():
        source = owner(name, description)
        result[name] = result[source] if source in result else entry(source, shape, description["salt"])
    return result
