"""Entries of a COCO file's lists as columns of numbers, and what is odd about them; the one place that reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeGuard

import msgspec
import numpy as np
from numpy.typing import NDArray

NO_MAPPING, NO_ID, NO_IMAGE_ID, NO_CATEGORY_ID, NO_BOX, CROWD_AS_TEXT, CROWD_UNCLEAR = (1 << bit for bit in range(7))
"""What may be odd about an annotation; bits of ``AnnotationColumns.odd``."""

_FLAGS = {"": 0, "0": 0, "0.0": 0, "false": 0, "no": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1}
_SHOWN_ODDITIES = 1000


class ImageEntry(msgspec.Struct, gc=False):
    """An entry of ``images`` as the file has it; what is missing is None, and so is an entry that is no mapping."""

    id: Any = None
    file_name: Any = None
    height: Any = None
    width: Any = None
    neg_category_ids: Any = None
    not_exhaustive_category_ids: Any = None


class PlainAnnotation(msgspec.Struct, gc=False):
    """An entry of ``annotations`` with nothing odd about it, but for an id that may be missing."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int | None = None
    iscrowd: int | bool | None = 0
    area: float | None = None


class AnnotationColumns(NamedTuple):
    """``annotations`` of a file, n of them in its order."""

    ids: NDArray[np.int64]
    """[n]; 0 where ``odd`` says NO_ID, and likewise for the other ids."""
    image_ids: NDArray[np.int64]
    """[n]"""
    category_ids: NDArray[np.int64]
    """[n]"""
    crowd: NDArray[np.bool_]
    """[n]"""
    boxes_xywh: NDArray[np.float64]
    """[n, 4] in pixels, as stated: also infinite, or NaN."""
    areas: NDArray[np.float64]
    """[n] square pixels; NaN where it is missing or no number."""
    odd: NDArray[np.uint8]
    """[n] bits, see ``NO_MAPPING`` and the following."""
    shown: dict[int, str]
    """What messages call the first odd ones, by index."""


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value of JSON is a whole number that fits 64 bits."""
    return type(value) is int and -(2**63) <= value < 2**63


def whole_number(value: object) -> object:
    """7.0 as 7, which JSON does not tell apart; anything else as it is."""
    return int(value) if type(value) is float and abs(value) < 2**53 and value == int(value) else value


def image_entry(entry: object) -> ImageEntry:
    fields = entry if isinstance(entry, dict) else {}
    return ImageEntry(*(fields.get(name) for name in ImageEntry.__struct_fields__))


def image_entries(entries: list[Any]) -> list[ImageEntry]:
    return [entry if isinstance(entry, ImageEntry) else image_entry(entry) for entry in entries]


def annotation_columns(entries: Sequence[Any]) -> AnnotationColumns:
    """The columns of entries: typed ones, or Python objects."""
    count = len(entries)
    if entries and isinstance(entries[0], PlainAnnotation):
        try:
            columns = _typed_columns(entries)
        except OverflowError:  # an id of more than 64 bits
            return annotation_columns(msgspec.to_builtins(entries))
        if columns is not None:
            return columns
        entries = msgspec.to_builtins(entries)
    rows = [_row(entry) for entry in entries]
    numbers = np.array([row[:3] for row in rows], dtype=np.int64).reshape(count, 3)
    odd = np.array([row[6] for row in rows], dtype=np.uint8)
    ids, image_ids, category_ids = np.ascontiguousarray(numbers.T)
    return AnnotationColumns(
        ids,
        image_ids,
        category_ids,
        np.array([row[3] for row in rows], dtype=np.bool_),
        np.array([row[4] for row in rows], dtype=np.float64).reshape(count, 4),
        np.array([row[5] for row in rows], dtype=np.float64),
        odd,
        {int(index): _shown(entries[index]) for index in np.flatnonzero(odd)[:_SHOWN_ODDITIES]},
    )


def _shown(entry: object) -> str:
    return f"annotation {entry.get('id')!s:.40}" if isinstance(entry, dict) else f"{entry!r:.40}"


def _typed_columns(entries: Sequence[PlainAnnotation]) -> AnnotationColumns | None:
    """None if a flag is neither 0 nor 1, or an id is missing."""
    crowd = [entry.iscrowd for entry in entries]
    ids = [entry.id for entry in entries]
    if not set(crowd) <= {0, 1, None} or None in ids:
        return None
    count = len(entries)
    areas = [math.nan if entry.area is None else entry.area for entry in entries]
    return AnnotationColumns(
        np.fromiter(ids, np.int64, count),
        np.fromiter([entry.image_id for entry in entries], np.int64, count),
        np.fromiter([entry.category_id for entry in entries], np.int64, count),
        np.fromiter(map(bool, crowd), np.bool_, count),
        np.fromiter(chain.from_iterable([entry.bbox for entry in entries]), np.float64, 4 * count).reshape(count, 4),
        np.fromiter(areas, np.float64, count),
        np.zeros(count, np.uint8),
        {},
    )


def _row(entry: object) -> tuple[int, int, int, int, list[float], float, int]:
    """Ids of annotation, image and category, crowd, box, area and what is odd."""
    if not isinstance(entry, dict):
        return 0, 0, 0, 0, [math.nan] * 4, math.nan, NO_MAPPING
    ids, odd = [], 0
    for key, missing in (("id", NO_ID), ("image_id", NO_IMAGE_ID), ("category_id", NO_CATEGORY_ID)):
        number = whole_number(entry.get(key))
        ids.append(number if is_integer(number) else 0)
        odd |= 0 if is_integer(number) else missing
    box = entry.get("bbox")
    numbers = [_number(value) for value in box] if isinstance(box, list | tuple) else []
    if len(numbers) != 4 or None in numbers:
        numbers, odd = [math.nan] * 4, odd | NO_BOX
    crowd, oddity = read_flag(entry.get("iscrowd"))
    area = _number(entry.get("area"))
    return ids[0], ids[1], ids[2], crowd, numbers, math.nan if area is None else area, odd | oddity  # type: ignore[return-value]


def read_flag(value: object) -> tuple[int, int]:
    """(0 or 1, nothing, CROWD_AS_TEXT, or CROWD_UNCLEAR where it is taken for 1) of ``iscrowd``."""
    if value is None or value in (0, 1):
        return int(bool(value)), 0
    text = _FLAGS.get(value.strip().lower()) if isinstance(value, str) else None
    return (1, CROWD_UNCLEAR) if text is None else (text, CROWD_AS_TEXT)


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def join_columns(pieces: Sequence[AnnotationColumns]) -> AnnotationColumns:
    shown: dict[int, str] = {}
    start = 0
    for piece in pieces:
        if len(shown) < _SHOWN_ODDITIES:
            shown.update((start + index, entry) for index, entry in piece.shown.items())
        start += len(piece.ids)
    columns: list[Any] = [np.concatenate(column) for column in list(zip(*pieces, strict=True))[:-1]]
    return AnnotationColumns._make([*columns, shown])
