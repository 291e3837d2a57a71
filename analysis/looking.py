"""Where detectors look for chosen targets: the best-regressed query of each, its sampling points or its attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from analysis.best_regressed import best_regressed
from analysis.detections_file import ImageInfo
from analysis.matching import Floats, ImageObjects
from analysis.style import COLOURS, COLUMN, FONT, MARKERS, Picture, bare, draw_box, drawing, show
from ops.boxes import cxcywh_to_xyxy
from structures import Looking, map_tensors

CROP = 2.6
"""Side of what is shown of an image, in longer sides of the target; more where points lie beyond it."""
SHOWN_POINTS = 0.9
"""Least share of the sampling points of each query within what is shown."""
_AREA = 120.0
"""Of a point with all the attention, in square points; those without any have ``_LEAST_AREA``."""
_LEAST_AREA = 3.5
_TARGET, _PREDICTION, _HEAT = "#F0E442", "black", "#D55E00"


@contextmanager
def recorded(attention: nn.Module) -> Iterator[list[Looking]]:
    """While it is open, every call of ``attention`` adds to the list where the queries look; tensors on the host."""
    found: list[Looking] = []

    def hook(module: Any, arguments: tuple[Any, ...]) -> None:
        with torch.no_grad():
            looking = module.looking(*arguments)
        found.append(map_tensors(looking, torch.Tensor.cpu))

    handle = attention.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


class ChosenTarget(NamedTuple):
    """An object whose best-regressed query is to be shown."""

    image_id: int
    place: int
    """Among the objects of its image."""

    def __str__(self) -> str:
        return f"{self.image_id}:{self.place}"


def chosen_targets(
    images: Sequence[ImageInfo], image_ids: Sequence[int] | None, targets: Sequence[str] | None
) -> list[ChosenTarget]:
    """Those given, or those of the given images, or those of the first image with three or, if there is none, any.

    Raises:
        ValueError: there is no such image or target.
    """
    objects = {image.image_id: image.objects for image in images}
    if targets is not None:
        return [_target(text, objects) for text in targets]
    if image_ids is None:
        counts = {image_id: int((~found.crowd).sum()) for image_id, found in objects.items()}
        image_ids = [image_id for least in (3, 1) for image_id, count in counts.items() if count >= least][:1]
    if unknown := [image_id for image_id in image_ids if image_id not in objects]:
        raise ValueError(f"image {unknown[0]} is not in the validation set")
    return [target for image_id in image_ids for target in _of_image(image_id, objects[image_id])]


def _target(text: str, objects: Mapping[int, ImageObjects]) -> ChosenTarget:
    try:
        image_id, place = (int(part) for part in text.split(":"))
    except ValueError:
        raise ValueError(f"--targets {text}: an image id and a number are needed, such as 12:0") from None
    if image_id not in objects:
        raise ValueError(f"--targets {text}: image {image_id} is not in the validation set")
    count = len(objects[image_id].labels)
    if not 0 <= place < count:
        raise ValueError(f"--targets {text}: image {image_id} has {count} annotations, numbered from 0")
    if objects[image_id].crowd[place]:
        raise ValueError(f"--targets {text}: a crowd is no target")
    return ChosenTarget(image_id, place)


def _of_image(image_id: int, objects: ImageObjects) -> list[ChosenTarget]:
    """The largest, the median and the smallest object of an image, or all it has; crowds are none."""
    order = np.flatnonzero(~objects.crowd)
    order = order[np.argsort(-objects.areas[order], kind="stable")]
    if not len(order):
        return []
    places = sorted({0, (len(order) - 1) // 2, len(order) - 1})
    return [ChosenTarget(image_id, int(order[place])) for place in places]


class LookingQuery(NamedTuple):
    """A query and where it looks; boxes and points in pixels of its image."""

    query: int
    score: float
    """For the class of the target."""
    iou: float
    """With the target."""
    box_xyxy: Floats
    """[4] predicted."""
    reference_xyxy: Floats
    """[4] around which the points lie: the prediction of the layer before, or its centre; NaN if there is none."""
    points: Floats
    """[H, L, P, 2] (x, y)."""
    weights: Floats
    """[H, L, P], summing to 1 over levels and points of a head."""

    @property
    def is_dense(self) -> bool:
        """Whether it looks at all pixels of one level, row by row, and not around a reference."""
        return bool(np.isnan(self.reference_xyxy).all())


def looking_query(
    target: int,
    objects: ImageObjects,
    scores: Floats,
    boxes_xyxy: Floats,
    looking: Looking,
    place: int,
    size: tuple[int, int],
) -> LookingQuery:
    """The best-regressed query of a target.

    Args:
        target: index among the objects.
        objects: of the image.
        scores: [Q, C] in [0, 1] of all queries.
        boxes_xyxy: [Q, 4] in pixels.
        looking: of the batch.
        place: of the image in the batch.
        size: (height, width) of the image in pixels.
    """
    only = slice(target, target + 1)
    single = ImageObjects(objects.labels[only], objects.boxes_xyxy[only], objects.areas[only], objects.crowd[only])
    best = best_regressed(scores, boxes_xyxy, single)
    query = int(best.query[0])
    scale = np.array([size[1], size[0]], dtype=np.float64)
    return LookingQuery(
        query,
        float(best.score[0]),
        float(best.iou[0]),
        boxes_xyxy[query],
        _corners(looking, place, query) * np.tile(scale, 2),
        looking.locations[place, query].double().numpy() * scale,
        looking.weights[place, query].double().numpy(),
    )


def _corners(looking: Looking, place: int, query: int) -> Floats:
    """[4] xyxy of the reference of a query: a box, or a point as an empty one; NaN without reference."""
    if looking.reference is None:
        return np.full(4, np.nan)
    reference = torch.nn.functional.pad(looking.reference[place, query], (0, 4 - looking.reference.shape[-1]))
    corners: Floats = cxcywh_to_xyxy(reference).double().numpy()
    return corners


class LookingRow(NamedTuple):
    """One target and the query of each checkpoint."""

    title: str
    picture: Picture
    target_xyxy: Floats
    """[4] in pixels."""
    queries: Sequence[LookingQuery | None]
    """Of each checkpoint; None where it could not read the image."""


def draw_sampling(path: Path, labels: Sequence[str], rows: Sequence[LookingRow]) -> None:
    """One row for each target, one column for each checkpoint; area is weight, colour and shape the feature level.

    Dense attention is a heat map, the mean of the heads: the deeper a pixel's colour, the more it is looked at.

    Args:
        path: PNG file to write.
        labels: of the checkpoints.
        rows: at least one.
    """
    size = COLUMN / 2 if len(labels) > 1 else 0.75 * COLUMN
    with drawing(path, len(rows), len(labels), max(COLUMN, size * len(labels)), (size + 0.1) * len(rows) + 0.9) as (
        figure,
        axes,
    ):
        shown = [query for row in rows for query in row.queries if query is not None]
        for row, (title, picture, target, queries) in enumerate(rows):
            window = crop_window(target, [query for query in queries if query is not None], picture.size)
            for c, query in enumerate(queries):
                axis = axes[row][c]
                bare(axis)
                show(axis, picture, alpha=0.6)
                axis.set_facecolor("0.9")  # beyond the image's borders
                draw_box(axis, target, _TARGET, halo="black", width=2.6)
                if query is not None:
                    _draw_query(axis, query)
                x0, y0, x1, y1 = window
                axis.set(xlim=(x0, x1), ylim=(y1, y0))
                text = "not read" if query is None else f"score {query.score:.2f}, IoU {query.iou:.2f}"
                axis.set_title(f"{labels[c]}\n{text}" if row == 0 else text, fontsize=FONT, pad=2)
            axes[row][0].set_ylabel(title, fontsize=FONT)
        figure.legend(handles=_legend(shown), loc="outside lower center", ncols=3, columnspacing=1.2)


def crop_window(target_xyxy: Floats, queries: Sequence[LookingQuery], size: tuple[int, int]) -> Floats:
    """[4] xyxy of a square with the target and the boxes and most of the points of its queries, in the image if it can.

    Args:
        target_xyxy: [4].
        queries: of this target.
        size: (height, width) of the image: more than twice its longer side is never shown.
    """
    centre = (target_xyxy[:2] + target_xyxy[2:]) / 2
    side = float((target_xyxy[2:] - target_xyxy[:2]).max())
    needed = max(0.5 * side, 1.0)
    for query in queries:
        corners = np.nan_to_num(np.stack([query.box_xyxy, query.reference_xyxy]), nan=float(query.box_xyxy[0])).reshape(
            -1, 2
        )
        distance = np.abs(query.points.reshape(-1, 2) - centre).max(axis=1)
        needed = max(needed, float(np.abs(corners - centre).max()), float(np.quantile(distance, SHOWN_POINTS)))
    needed = 1.05 * min(needed, max(size))
    half = max(0.5 * CROP * side, needed)
    image = np.array([size[1], size[0]], dtype=np.float64)
    inside = np.where(image > 2 * half, centre.clip(half, np.maximum(image - half, half)), image / 2)
    centre = centre + (inside - centre).clip(needed - half, half - needed)
    result: Floats = np.concatenate([centre - half, centre + half])
    return result


def _draw_query(axis: Any, query: LookingQuery) -> None:
    draw_box(axis, query.reference_xyxy, _PREDICTION, halo="white", dashed=True, width=0.8)
    # Thin: where prediction and target coincide, both are seen.
    draw_box(axis, query.box_xyxy, _PREDICTION, halo="white", width=0.9)
    if query.is_dense:
        _draw_heat(axis, query)
        return
    for level in range(query.points.shape[1]):
        weights = query.weights[:, level].ravel()
        order = np.argsort(-weights, kind="stable")  # the heaviest first, so that they do not hide the others
        x, y = query.points[:, level].reshape(-1, 2)[order].T
        axis.scatter(
            x, y, s=_area(weights[order]), color=COLOURS[level % len(COLOURS)], marker=MARKERS[level % len(MARKERS)],
            alpha=0.85, linewidth=0.3, edgecolor="white", zorder=3,
        )  # fmt: skip


def _draw_heat(axis: Any, query: LookingQuery) -> None:
    from matplotlib.colors import to_rgb

    x, y = (np.unique(coordinates) for coordinates in query.points[0, 0].T)
    heat = query.weights.mean(axis=0).reshape(len(y), len(x))
    colours = np.empty((*heat.shape, 4))
    colours[..., :3], colours[..., 3] = to_rgb(_HEAT), 0.9 * heat / heat.max()
    # The coordinates are those of centres, the extent is that of the outermost pixels' borders.
    extent = (0, x[0] + x[-1], y[0] + y[-1], 0)
    axis.imshow(colours, extent=extent, interpolation="nearest", zorder=1.5)


def _area(weight: Any) -> Any:
    return _LEAST_AREA + _AREA * weight


def _legend(queries: Sequence[LookingQuery]) -> list[Any]:
    from matplotlib.lines import Line2D

    levels = max((query.points.shape[1] for query in queries if not query.is_dense), default=0)

    def point(marker: str, colour: str, weight: float, label: str) -> Any:
        # Lines give the diameter of a marker where scatter gives its area.
        size = _area(weight) ** 0.5
        return Line2D([], [], linestyle="", marker=marker, color=colour, markersize=size, label=label)

    handles = [point(MARKERS[i % len(MARKERS)], COLOURS[i % len(COLOURS)], 0.2, f"level {i}") for i in range(levels)]
    handles += [point("o", "0.5", weight, f"weight {weight:g}") for weight in (0.05, 0.2, 0.5) if levels]
    if any(query.is_dense for query in queries):
        handles.append(point("s", _HEAT, 0.2, "attention, mean of heads"))
    handles += [
        Line2D([], [], color=_TARGET, linewidth=2.6, label="target"),
        Line2D([], [], color=_PREDICTION, linewidth=0.9, label="prediction"),
    ]
    if levels:
        handles.append(Line2D([], [], color=_PREDICTION, linewidth=0.9, linestyle="--", label="reference"))
    return handles
