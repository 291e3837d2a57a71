"""The page of worst images by kind of error, and what is needed to draw on images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.error_types import ERRORS, ImageErrors
from analysis.matching import Floats, ImageObjects, Integers
from analysis.report import Report
from analysis.style import COLOURS, COLUMN, FONT, drawing

Pixels = NDArray[np.uint8]
"""[h, w, 3] RGB."""

PANELS = 4
"""Images in a row of the page, which is as wide as two columns of a paper."""
MOST_BOXES = 6
"""Errors drawn in an image."""
_TEXT_HEIGHT = 0.09
"""Of the labels of boxes, as a share of the width of an image on the page."""


class Picture(NamedTuple):
    """An image to draw on."""

    pixels: Pixels
    size: tuple[int, int]
    """(height, width) in which boxes are given; that of the annotations, of which the file may be a resized copy."""


def errors_of_kind(image: ImageErrors, kind: int) -> Integers:
    """Indices of the detections with an error of this kind, best first, or of the missed objects (the last kind)."""
    if ERRORS[kind] == "missed":
        result: Integers = np.flatnonzero(image.missed)
        return result
    found: Integers = np.flatnonzero(image.kind == kind + 1)
    return found


def worst_images(images: Sequence[ImageErrors], kind: int) -> list[int]:
    """Indices of the images with such errors, those with the largest sum of their scores first (missed: with the most).

    Args:
        images: with their errors.
        kind: index into ``ERRORS``.
    """
    weights = []
    for image in images:
        found = errors_of_kind(image, kind)
        is_missed = ERRORS[kind] == "missed"
        weights.append(float(len(found)) if is_missed else float(image.detections.scores[found].sum()))
    order = np.argsort(-np.array(weights), kind="stable")
    return [int(i) for i in order if len(errors_of_kind(images[i], kind))]


def draw_worst(
    path: Path,
    reports: Sequence[Report],
    objects: Sequence[ImageObjects],
    picture: Callable[[int], Picture],
    count: int | None = None,
) -> None:
    """One row for each kind of error that occurs, ``count`` images for each report; only errors of the row are drawn.

    Args:
        path: PNG file to write.
        reports: on the same images.
        objects: of each image.
        picture: gives an image by its index.
        count: images of each kind and report; None for as many as fit a page.
    """
    count = count or max(1, PANELS // len(reports))
    worst = [[worst_images(report.image_errors, kind) for report in reports] for kind in range(len(ERRORS))]
    kinds = [kind for kind in range(len(ERRORS)) if any(worst[kind])]
    width, height = 2 * COLUMN * max(1, count * len(reports) / PANELS), 1.62 * max(len(kinds), 1) + 0.35
    with drawing(path, max(len(kinds), 1), count * len(reports), width, height) as (figure, axes):
        for axis in axes.ravel():
            bare(axis)
        for row, kind in enumerate(kinds):
            axes[row][0].set_ylabel(ERRORS[kind])
            for r, report in enumerate(reports):
                indices = worst[kind][r]
                shown = f"{min(count, len(indices))} of {len(indices)} images" if indices else "none"
                panels = axes[row][r * count : (r + 1) * count]
                title = f"{report.label}: {shown}" if row == 0 else shown
                panels[0].set_title(title, loc="left", fontsize=FONT, fontweight="bold" if row == 0 else "normal")
                for axis, index in zip(panels, indices, strict=False):
                    _draw_errors(axis, report, kind, index, objects[index], picture(index))
        absent = [ERRORS[kind] for kind in range(len(ERRORS)) if kind not in kinds]
        threshold = f"Detections with a score of at least {reports[0].errors.threshold:g}."
        note = f"{threshold} No errors of these kinds: {', '.join(absent)}." if absent else threshold
        figure.supxlabel(f"{note} Dashed: annotated objects.", fontsize=FONT)


def _draw_errors(axis: Any, report: Report, kind: int, index: int, objects: ImageObjects, picture: Picture) -> None:
    """An image with its objects (dashed) and the errors of one kind."""
    errors = report.image_errors[index]
    show(axis, picture)
    for box in objects.boxes_xyxy[~objects.crowd]:
        draw_box(axis, box, "white", halo="black", dashed=True, width=0.7)
    found = errors_of_kind(errors, kind)
    for i in reversed(found[:MOST_BOXES]):  # the best on top
        if ERRORS[kind] == "missed":
            place = errors.object_index[i]
            box, text = objects.boxes_xyxy[place], report.categories[objects.labels[place]]
        else:
            box = errors.detections.boxes_xyxy[i]
            text = f"{report.categories[errors.detections.labels[i]]} {errors.detections.scores[i]:.2f}"
        draw_box(axis, box, COLOURS[1], halo="white")
        _label(axis, box, text, picture.size)
    number = f"{len(found)} error{'s' if len(found) > 1 else ''}"
    axis.set_xlabel(f"{MOST_BOXES} of {number} drawn" if len(found) > MOST_BOXES else number, labelpad=2)


def bare(axis: Any) -> None:
    """Without ticks and frame, but with room for a label, which hiding the whole axis would take away."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def show(axis: Any, picture: Picture, alpha: float = 1.0) -> None:
    """The image, in the coordinates of its annotations."""
    height, width = picture.size
    axis.imshow(picture.pixels, extent=(0, width, height, 0), alpha=alpha)
    axis.set(xlim=(0, width), ylim=(height, 0))


def draw_box(axis: Any, box: Floats, colour: str, *, halo: str, dashed: bool = False, width: float = 1.2) -> None:
    """A frame that can be seen on any image, thanks to a wider one of another colour below it."""
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = (float(value) for value in box)
    for edge, line, style in ((halo, width + 0.8, "-"), (colour, width, (0, (3, 2)) if dashed else "-")):
        axis.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=line, linestyle=style)
        )


def _label(axis: Any, box: Floats, text: str, size: tuple[int, int]) -> None:
    """Above the box, or inside it at the image's upper border; towards the middle of the image."""
    x0, y0, x1, _ = (float(value) for value in box)
    right = (x0 + x1) / 2 > size[1] / 2
    axis.text(
        min(x1, size[1]) if right else max(x0, 0), max(y0, 0), text, fontsize=FONT - 2, color="white",
        ha="right" if right else "left", va="bottom" if y0 > _TEXT_HEIGHT * size[1] else "top",
        bbox={"facecolor": COLOURS[1], "edgecolor": "none", "pad": 0.6, "alpha": 0.9},
    )  # fmt: skip
