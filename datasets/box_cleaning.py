"""Which boxes of a COCO file can be used, and what is doubtful about them; the one place that decides it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ops.coco_columns import NO_BOX, NO_CATEGORY_ID, NO_IMAGE_ID, NO_MAPPING, AnnotationColumns

USABLE, CLIPPED = 0, 1
FINDINGS = {
    CLIPPED: "box reaching beyond the image, clipped",
    2: "annotation that is not a mapping, dropped",
    3: "annotation whose image_id is no whole number, dropped",
    4: "annotation of an unknown image, dropped",
    5: "box whose category_id is no whole number, dropped",
    6: "box of an unknown category, dropped",
    7: "crowd, dropped",
    8: "box missing or not four numbers, dropped",
    9: "box with NaN or infinity, dropped",
    10: "box of zero or negative size, dropped",
    11: "box outside the image, dropped",
    12: "box given twice, kept once",
}
"""By code; the first that fits from 2 on is the one that counts."""
_TWICE = 12
_BLOCK = 2**20
"""Boxes that are looked at together, so that intermediate results stay small."""


class CleanBoxes(NamedTuple):
    """The boxes of a file, n of them in its order, the unusable ones included."""

    findings: NDArray[np.uint8]
    """[n] code of ``FINDINGS``; those above CLIPPED are unusable."""
    images: NDArray[np.int32]
    """[n] index of the image; meaningless where unusable, as the following are."""
    labels: NDArray[np.int32]
    """[n] index of the category."""
    boxes_xyxy: NDArray[np.float32]
    """[n, 4] in pixels, inside the image."""
    keys: NDArray[np.uint64]
    """[n] equal for equal boxes of a label in an image."""
    fractions: NDArray[np.bool_]
    """[n] whether it ends within the first pixel."""
    corners: NDArray[np.bool_]
    """[n] whether its four numbers could be two corners."""
    flat: NDArray[np.bool_]
    """[n] whether the area stated is zero or less."""


def clean_boxes(
    columns: AnnotationColumns,
    image_ids: NDArray[np.int64],
    sizes: NDArray[np.int64],
    category_ids: NDArray[np.int64],
    path: Path | str,
) -> tuple[CleanBoxes, dict[str, NDArray[np.bool_]]]:
    """Decides about every box: (boxes, masks [n] of what is doubtful about usable ones).

    Args:
        columns: of the file.
        image_ids: [N] ascending.
        sizes: [N, 2] (height, width), 0 where unknown.
        category_ids: [C], by label.
        path: of the file, for messages.

    Raises:
        ValueError: every single box is given in fractions of the image's size.
    """
    starts = range(0, max(len(columns.ids), 1), _BLOCK)
    blocks = [_clean(columns, slice(start, start + _BLOCK), image_ids, sizes, category_ids) for start in starts]
    whole = CleanBoxes(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))
    findings = whole.findings
    findings[_repetitions(whole, np.flatnonzero(findings <= CLIPPED))] = _TWICE
    usable = findings <= CLIPPED
    count = int(usable.sum())
    if count and whole.fractions[usable].all():
        raise ValueError(
            f"{path}: all {count} boxes end within the first pixel of their image, so they seem to be fractions of its "
            "size; a 'bbox' must be x, y, width and height in pixels"
        )
    doubts = {
        "box that ends within the first pixel (a fraction of the image's size?), kept": whole.fractions & usable,
        "area of zero or less, that of the box is used": whole.flat & usable,
    }
    beyond = findings == CLIPPED
    if 4 * int(beyond.sum()) >= count > 0 and whole.corners[usable].all():
        kind = "box reaching beyond the image, clipped; as x1, y1, x2, y2 it would fit, but COCO means width and height"
        doubts[kind] = beyond.copy()
        findings[beyond] = USABLE
    return whole, doubts


def _clean(
    columns: AnnotationColumns,
    part: slice,
    image_ids: NDArray[np.int64],
    sizes: NDArray[np.int64],
    category_ids: NDArray[np.int64],
) -> CleanBoxes:
    odd, stated = columns.odd[part], columns.boxes_xywh[part]
    images, image_known = _places(image_ids, columns.image_ids[part])
    order = np.argsort(category_ids, kind="stable")
    places, category_known = _places(category_ids[order], columns.category_ids[part])
    labels = order[places] if len(order) else places
    x, y, width, height = stated.T
    limit_y, limit_x = np.where(sizes[images] > 0, sizes[images], np.inf).T
    with np.errstate(all="ignore"):
        x1, y1 = x + width, y + height
        # Adding 0.0 makes -0.0 the same as 0.0.
        inside = (
            np.stack([np.maximum(x, 0.0), np.maximum(y, 0.0), np.minimum(x1, limit_x), np.minimum(y1, limit_y)], axis=1)
            + 0.0
        )
        # In float32, as it is stored: a sliver may have no width there.
        boxes = inside.astype(np.float32)
        # Annotation tools round: only what is off by more than a pixel is worth a word.
        overhang = np.maximum.reduce([-x, -y, x1 - limit_x, y1 - limit_y])
        findings = np.select(
            [
                odd & NO_MAPPING > 0,
                odd & NO_IMAGE_ID > 0,
                ~image_known,
                odd & NO_CATEGORY_ID > 0,
                ~category_known,
                columns.crowd[part],
                odd & NO_BOX > 0,
                ~np.isfinite(x + y + width + height),
                (width <= 0) | (height <= 0),
                ~((boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])),
                overhang > 1.0,
            ],
            [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, CLIPPED],
            USABLE,
        ).astype(np.uint8)
        corners = (x >= 0) & (y >= 0) & (width > x) & (height > y) & (width <= limit_x + 1) & (height <= limit_y + 1)
        fractions = (x1 <= 1) & (y1 <= 1) & (limit_x > 1) & (limit_y > 1)
        flat = columns.areas[part] <= 0
    return CleanBoxes(
        findings,
        images.astype(np.int32),
        labels.astype(np.int32),
        boxes,
        _keys(images, labels, inside),
        fractions,
        corners,
        flat,
    )


def _places(known: NDArray[np.int64], wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(index in ``known``, which ascends, or 0; whether it is there at all) of each number."""
    if not len(known):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    places = np.searchsorted(known, wanted)
    places[places == len(known)] = 0
    found = known[places] == wanted
    return np.where(found, places, 0), found


def _keys(images: NDArray[np.int64], labels: NDArray[np.int64], boxes: NDArray[np.float64]) -> NDArray[np.uint64]:
    key = images.astype(np.uint64)
    for part in (labels.astype(np.uint64), *np.ascontiguousarray(boxes.T).view(np.uint64)):
        key = (key ^ part) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def _repetitions(block: CleanBoxes, usable: NDArray[np.int64]) -> list[int]:
    """Those of the usable boxes that stand in the same image with the same label a second time or more often."""
    keys = block.keys[usable]
    ascending = np.sort(keys)  # several times as fast as argsort, and most files repeat nothing
    suspects = np.flatnonzero(np.isin(keys, ascending[1:][ascending[1:] == ascending[:-1]]))
    seen: set[tuple[float, ...]] = set()
    again = []
    for place in usable[suspects].tolist():
        entry = (int(block.images[place]), int(block.labels[place]), *block.boxes_xyxy[place].tolist())
        if entry in seen:
            again.append(place)
        seen.add(entry)
    return again
