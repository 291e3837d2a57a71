"""Pages of images: the worst by kind of error, and where queries look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.error_types import ERRORS, ImageErrors
from analysis.matching import Floats, ImageObjects, Integers
from analysis.report import Report
from analysis.style import COLOURS, FONT, MARKERS, drawing

Pixels = NDArray[np.uint8]
"""[h, w, 3] RGB."""


class Picture(NamedTuple):
    """An image to draw on."""

    pixels: Pixels
    size: tuple[int, int]
    """(height, width) in which boxes are given; that of the annotations, of which the file may be a resized copy."""


def errors_of_kind(image: ImageErrors, kind: int, threshold: float) -> Integers:
    """Indices of the confident detections with an error of this kind, or of the missed objects (the last kind)."""
    if ERRORS[kind] == "missed":
        result: Integers = np.flatnonzero(image.missed)
        return result
    found: Integers = np.flatnonzero((image.kind == kind + 1) & (image.detections.scores >= threshold))
    return found


def worst_images(images: Sequence[ImageErrors], kind: int, count: int, threshold: float) -> list[int]:
    """Indices of the images with the largest sum of scores of such errors (missed objects: with the most), worst first.

    Args:
        images: with their errors.
        kind: index into ``ERRORS``.
        count: at most so many.
        threshold: least score of an error that counts.
    """
    weights = []
    for image in images:
        found = errors_of_kind(image, kind, threshold)
        is_missed = ERRORS[kind] == "missed"
        weights.append(float(len(found)) if is_missed else float(image.detections.scores[found].sum()))
    order = np.argsort(-np.array(weights), kind="stable")[:count]
    return [int(i) for i in order if weights[i] > 0]


def draw_worst(
    path: Path,
    reports: Sequence[Report],
    objects: Sequence[ImageObjects],
    picture: Callable[[int], Picture],
    threshold: float,
    count: int = 3,
) -> None:
    """One row for each kind of error, ``count`` images for each report; only the errors of the row are drawn.

    Args:
        path: PNG file to write.
        reports: on the same images.
        objects: of each image.
        picture: gives an image by its index.
        threshold: least score of an error that is shown.
        count: images of each kind and report.
    """
    size = 1.55
    with drawing(path, len(ERRORS), count * len(reports), size * count * len(reports) + 0.3, size * len(ERRORS)) as (
        _,
        axes,
    ):
        for row, name in enumerate(ERRORS):
            for r, report in enumerate(reports):
                chosen = worst_images(report.image_errors, row, count, threshold)
                for c in range(count):
                    axis = axes[row][r * count + c]
                    _bare(axis)
                    if c < len(chosen):
                        _draw_errors(axis, report, row, chosen[c], objects[chosen[c]], picture(chosen[c]), threshold)
                    elif c == 0:
                        axis.text(0.5, 0.5, "none", ha="center", va="center", transform=axis.transAxes, color="0.5")
            axes[row][0].set_ylabel(name, fontsize=FONT + 0.5)
        for r, report in enumerate(reports):
            axes[0][r * count].set_title(report.label, loc="left", fontweight="bold")


def _draw_errors(
    axis: Any, report: Report, kind: int, index: int, objects: ImageObjects, picture: Picture, threshold: float
) -> None:
    """An image with its objects (dashed) and the errors of one kind."""
    errors = report.image_errors[index]
    _show(axis, picture)
    for box in objects.boxes_xyxy[~objects.crowd]:
        _box(axis, box, "white", dashed=True, width=0.7)
    found = errors_of_kind(errors, kind, threshold)
    if ERRORS[kind] == "missed":
        for i in errors.object_index[found]:
            _box(axis, objects.boxes_xyxy[i], COLOURS[1], text=report.categories[objects.labels[i]])
        return
    for i in reversed(found[:6]):  # the best on top
        name = report.categories[errors.detections.labels[i]]
        _box(axis, errors.detections.boxes_xyxy[i], COLOURS[1], text=f"{name} {errors.detections.scores[i]:.2f}")


class LookingQuery(NamedTuple):
    """A query and where it looks; boxes and points in pixels of its image."""

    text: str
    box_xyxy: Floats
    """[4] predicted."""
    reference_xyxy: Floats
    """[4] around which the points lie: the prediction of the layer before."""
    points: Floats
    """[H, L, P, 2] (x, y)."""
    weights: Floats
    """[H, L, P], summing to 1 over levels and points of a head."""


def draw_sampling(path: Path, rows: Sequence[tuple[str, Picture, Sequence[LookingQuery]]]) -> None:
    """One row for each image and checkpoint, one panel for each query; area is weight, colour the feature level.

    Args:
        path: PNG file to write.
        rows: title, image and queries of each; at least one with one query.
    """
    columns = max(len(queries) for _, _, queries in rows)
    size = 1.9
    with drawing(path, len(rows), columns, size * columns + 0.3, size * len(rows) + 0.4) as (figure, axes):
        levels = 1
        for row, (title, picture, queries) in enumerate(rows):
            for c in range(columns):
                _bare(axes[row][c])
                if c < len(queries):
                    levels = max(levels, queries[c].points.shape[1])
                    _draw_query(axes[row][c], picture, queries[c])
            axes[row][0].set_ylabel(title)
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], linestyle="", marker=MARKERS[i], color=COLOURS[i], label=f"level {i}", markersize=4)
            for i in range(levels)
        ]
        handles.append(Line2D([], [], color="black", linewidth=1.2, label="prediction"))
        handles.append(Line2D([], [], color="black", linewidth=1.0, linestyle="--", label="reference box"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))


def _draw_query(axis: Any, picture: Picture, query: LookingQuery) -> None:
    _show(axis, picture, faded=True)
    _box(axis, query.reference_xyxy, "black", dashed=True, width=0.9)
    _box(axis, query.box_xyxy, "black", width=1.3)
    strongest = max(float(query.weights.max()), 1e-9)
    for level in range(query.points.shape[1]):
        x, y = query.points[:, level].reshape(-1, 2).T
        area = 1 + 22 * query.weights[:, level].ravel() / strongest
        axis.scatter(
            x, y, s=area, color=COLOURS[level % len(COLOURS)], marker=MARKERS[level % len(MARKERS)], alpha=0.85,
            linewidth=0.2, edgecolor="white",
        )  # fmt: skip
    axis.set_title(query.text, fontsize=FONT - 0.5, pad=2)


def _bare(axis: Any) -> None:
    """Without ticks and frame, but with room for a label, which hiding the whole axis would take away."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _show(axis: Any, picture: Picture, faded: bool = False) -> None:
    height, width = picture.size
    axis.imshow(picture.pixels, extent=(0, width, height, 0), alpha=0.55 if faded else None)
    axis.set(xlim=(0, width), ylim=(height, 0))


def _box(axis: Any, box: Floats, colour: str, *, text: str = "", dashed: bool = False, width: float = 1.2) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = (float(value) for value in box)
    style = "--" if dashed else "-"
    axis.add_patch(
        Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width, linestyle=style)
    )
    if text:
        axis.text(
            max(x0, 0), max(y0, 0), text, fontsize=FONT - 3, color="white", va="bottom" if y0 > 12 else "top",
            clip_on=True, bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
        )  # fmt: skip
