"""The embedded synthetic data set: textured shapes on cluttered backgrounds, in COCO layout.

It exists so that everything can be tried, tested and compared without downloading anything. It is small but not
trivial: objects of 12 to 96 pixels in any rotation, colour and texture, overlapping each other and cut off by the image
border, over a background with gradients, lines and blobs; some images hold no object. Ids in the annotation files have
gaps, as those of real data sets do. The same settings always give the same data set, whatever the number of processes.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

CATEGORIES = ((3, "disc"), (7, "square"), (8, "triangle"), (15, "star"), (21, "cross"), (34, "ring"))
"""(category id, name); the ids have gaps on purpose."""

SPLITS = ("train", "val")
SETTINGS_FILE = "shapes.json"
_FORMAT = 1
"""Raised whenever the drawing changes, so that an old data set is not taken for a new one."""
_SUPERSAMPLING = 4
_MIN_VISIBLE = 0.4
"""An object is placed only if this share of it, and of every object below it, stays in sight."""
_PLACEMENT_TRIES = 12

Pixels = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Settings of the synthetic data set; equal settings give equal files."""

    train_images: int = 2000
    """Images in the train split."""
    val_images: int = 300
    """Images in the val split."""
    image_size: int = 192
    """Height and width of every image in pixels."""
    max_objects: int = 8
    """Most objects in an image."""
    min_object_size: int = 12
    """Longer side of the smallest object's box, in pixels."""
    max_object_size: int = 96
    """Longer side of the largest object's box, in pixels."""
    empty_share: float = 0.03
    """Share of images without any object."""
    seed: int = 0
    """Everything is drawn from it."""

    def __post_init__(self) -> None:
        if min(self.train_images, self.val_images, self.max_objects) < 1:
            raise ValueError("shapes: train_images, val_images and max_objects must be at least 1")
        if not 4 <= self.min_object_size <= self.max_object_size <= self.image_size:
            raise ValueError(
                "shapes: need 4 <= min_object_size <= max_object_size <= image_size, got "
                f"{self.min_object_size}, {self.max_object_size}, {self.image_size}"
            )
        if not 0.0 <= self.empty_share < 1.0:
            raise ValueError(f"shapes: empty_share must be in [0, 1), got {self.empty_share}")
        if self.seed < 0:
            raise ValueError(f"shapes: seed must not be negative, got {self.seed}")


class DrawnObject(NamedTuple):
    """One object as it is annotated."""

    label: int
    """Index into CATEGORIES."""
    box_xywh: tuple[float, float, float, float]
    """Tight around what the image border leaves of the shape, in pixels; what other objects hide is included."""
    area: float
    """Pixels of the shape inside the image, hidden or not."""


class _Placed(NamedTuple):
    alpha: Pixels
    """[h, w] coverage in [0, 1] of the part inside the image."""
    top: int
    left: int
    drawn: DrawnObject


def _regular(corners: int, phase: float = 0.0) -> NDArray[np.float64]:
    angles = phase + np.arange(corners) * (2 * math.pi / corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> NDArray[np.float64]:
    points = _regular(10)
    points[1::2] *= 0.42
    return points


def _cross() -> NDArray[np.float64]:
    half = 0.34
    quarters = [np.array([(half, half), (half, 1.0), (-half, 1.0)])]
    for _ in range(3):
        x, y = quarters[-1].T
        quarters.append(np.stack([-y, x], axis=1))
    return np.concatenate(quarters)


_OUTLINES: dict[str, Callable[[], NDArray[np.float64]]] = {
    "disc": partial(_regular, 64),
    "square": partial(_regular, 4),
    "triangle": partial(_regular, 3),
    "star": _star,
    "cross": _cross,
    "ring": partial(_regular, 64),
}
_RING_HOLE = 0.55


def _outline(
    name: str, size: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Corners [n, 2] around the origin, turned at random, whose longer extent is ``size``; and those of the hole."""
    angle = rng.uniform(0, 2 * math.pi)
    stretch = rng.uniform(0.8, 1.0)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points = (_OUTLINES[name]() * (1.0, stretch)) @ rotation.T
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) * (size / (high - low).max())
    return points, points * _RING_HOLE if name == "ring" else None


def _place(label: int, size: float, canvas: int, rng: np.random.Generator) -> _Placed | None:
    """Rasterises one shape at a random place, possibly across the border; None where too little of it is in sight."""
    points, hole = _outline(CATEGORIES[label][1], size, rng)
    centre = rng.uniform(0.15 * size, canvas - 0.15 * size, 2)
    points = points + centre
    origin = np.floor(points.min(axis=0)).astype(int) - 1
    width, height = np.ceil(points.max(axis=0)).astype(int) + 2 - origin
    mask = Image.new("L", (int(width) * _SUPERSAMPLING, int(height) * _SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    # ImageDraw addresses pixels by their centres.
    draw.polygon([tuple(p) for p in (points - origin) * _SUPERSAMPLING - 0.5], fill=255)
    if hole is not None:
        draw.polygon([tuple(p) for p in (hole + centre - origin) * _SUPERSAMPLING - 0.5], fill=0)

    fine = np.asarray(mask) > 0
    left, top = np.maximum(origin, 0)
    right, bottom = np.minimum(origin + np.array([width, height]), canvas)
    inside = fine[
        (top - origin[1]) * _SUPERSAMPLING : (bottom - origin[1]) * _SUPERSAMPLING,
        (left - origin[0]) * _SUPERSAMPLING : (right - origin[0]) * _SUPERSAMPLING,
    ]
    visible = inside.sum() / max(fine.sum(), 1)
    if visible < _MIN_VISIBLE:
        return None
    columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
    x0, x1 = columns[0] / _SUPERSAMPLING, (columns[-1] + 1) / _SUPERSAMPLING
    y0, y1 = rows[0] / _SUPERSAMPLING, (rows[-1] + 1) / _SUPERSAMPLING
    coverage = inside.reshape(bottom - top, _SUPERSAMPLING, right - left, _SUPERSAMPLING).mean(
        axis=(1, 3), dtype=np.float32
    )
    box = (float(left + x0), float(top + y0), float(x1 - x0), float(y1 - y0))
    return _Placed(coverage, int(top), int(left), DrawnObject(label, box, round(float(coverage.sum()), 2)))


def _layout(config: ShapesConfig, rng: np.random.Generator) -> list[_Placed]:
    """Chooses and places the objects of one image, bottom-most first."""
    if rng.random() < config.empty_share:
        return []
    wanted = int(rng.integers(1, config.max_objects + 1))
    owner = np.full((config.image_size, config.image_size), -1, dtype=np.int16)
    full: list[int] = []
    placed: list[_Placed] = []
    for _ in range(wanted):
        label = int(rng.integers(len(CATEGORIES)))
        # Half a pixel inside the limits, which rasterising could otherwise step over.
        size = float(
            rng.uniform(config.min_object_size + 0.5, max(config.max_object_size - 0.5, config.min_object_size + 0.5))
        )
        for _ in range(_PLACEMENT_TRIES):
            candidate = _place(label, size, config.image_size, rng)
            if candidate is None or max(candidate.drawn.box_xywh[2:]) < config.min_object_size:
                continue
            solid = candidate.alpha > 0.5
            height, width = solid.shape
            region = (slice(candidate.top, candidate.top + height), slice(candidate.left, candidate.left + width))
            trial = owner.copy()
            trial[region][solid] = len(placed)
            in_sight = np.bincount(trial.ravel() + 1, minlength=len(placed) + 2)[1:]
            if all(seen >= _MIN_VISIBLE * whole for seen, whole in zip(in_sight, full, strict=False)):
                owner = trial
                full.append(int(solid.sum()))
                placed.append(candidate)
                break
    return placed


def _colour(rng: np.random.Generator) -> Pixels:
    return rng.uniform(20, 235, 3).astype(np.float32)


def _smooth_noise(size: int, cells: int, spread: float, rng: np.random.Generator) -> Pixels:
    """[size, size, 3] noise that varies over size / cells pixels."""
    coarse = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
    fine = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return (fine - 127.5) * spread


def _background(size: int, rng: np.random.Generator) -> Pixels:
    """[size, size, 3] float32: smooth colour, lines, arcs and soft blobs, none of which is an object."""
    colour = np.clip(
        _colour(rng)
        + _smooth_noise(size, int(rng.integers(3, 6)), 0.5, rng)
        + _smooth_noise(size, int(rng.integers(12, 32)), 0.25, rng),
        0,
        255,
    )
    picture = Image.fromarray(colour.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 6))):
        x, y = rng.uniform(0, size, 2)
        radius = rng.uniform(3, size / 6)
        draw.ellipse((x - radius, y - 0.6 * radius, x + radius, y + 0.6 * radius), fill=_int_colour(rng))
    picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(2.5, 4.0))))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(2, 14))):
        ends = rng.uniform(-0.1 * size, 1.1 * size, 4)
        draw.line(tuple(ends), fill=_int_colour(rng), width=int(rng.integers(1, 3)))
    for _ in range(int(rng.integers(0, 5))):
        x, y = rng.uniform(0, size, 2)
        radius = rng.uniform(4, size / 5)
        start = rng.uniform(0, 360)
        draw.arc(
            (x - radius, y - radius, x + radius, y + radius), start, start + rng.uniform(40, 160), fill=_int_colour(rng)
        )
    return np.asarray(picture, dtype=np.float32)


def _int_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _texture(height: int, width: int, base: Pixels, rng: np.random.Generator) -> Pixels:
    """[height, width, 3] surface of an object: plain, shaded, striped, chequered or dotted around ``base``."""
    other = np.clip(base + rng.choice([-1.0, 1.0]) * rng.uniform(30, 80, 3), 0, 255)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = -x * math.sin(angle) + y * math.cos(angle)
    period = rng.uniform(4, 14)
    kind = int(rng.integers(5))
    if kind == 0:
        mix = np.zeros_like(x)
    elif kind == 1:
        mix = (along - along.min()) / max(float(np.ptp(along)), 1.0)
    elif kind == 2:
        mix = ((along / period) % 1 < 0.5).astype(np.float32)
    elif kind == 3:
        mix = (((along / period) % 1 < 0.5) ^ ((across / period) % 1 < 0.5)).astype(np.float32)
    else:
        mix = (((along / period) % 1 - 0.5) ** 2 + ((across / period) % 1 - 0.5) ** 2 < 0.08).astype(np.float32)
    return (base + mix[..., None] * (other - base)).astype(np.float32)


def _surface_colour(background: Pixels, alpha: Pixels, rng: np.random.Generator) -> Pixels:
    """A colour that stands out from what lies below (an object nobody can see teaches nothing)."""
    below = (background * alpha[..., None]).sum(axis=(0, 1)) / alpha.sum()
    colour = _colour(rng)
    for _ in range(20):
        if np.abs(colour - below).max() > 60:
            break
        colour = _colour(rng)
    return colour


def draw_image(config: ShapesConfig, split: str, index: int) -> tuple[NDArray[np.uint8], list[DrawnObject]]:
    """One image, [size, size, 3] uint8 RGB, and its objects; depends on nothing but the arguments."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    placed = _layout(config, rng)
    picture = _background(config.image_size, rng)
    for item in placed:
        height, width = item.alpha.shape
        region = picture[item.top : item.top + height, item.left : item.left + width]
        surface = _texture(height, width, _surface_colour(region, item.alpha, rng), rng)
        region += item.alpha[..., None] * (surface - region)
    picture = picture * rng.uniform(0.8, 1.15) + rng.uniform(-12, 12)
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * rng.uniform(2, 9)
    return np.clip(picture, 0, 255).astype(np.uint8), [item.drawn for item in placed]


def _write_image(config: ShapesConfig, directory: Path, split: str, index: int) -> tuple[str, list[DrawnObject]]:
    pixels, objects = draw_image(config, split, index)
    name = f"{index:06d}.jpg"
    Image.fromarray(pixels).save(directory / name, quality=92, subsampling=0)
    return name, objects


def _annotations(config: ShapesConfig, split: str, drawn: list[tuple[str, list[DrawnObject]]]) -> dict[str, Any]:
    """The COCO dictionary of one split, with gaps in all ids."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), 2**31])
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    image_id, annotation_id = 100, 1000
    for name, objects in drawn:
        image_id += int(rng.integers(1, 7))
        images.append({"id": image_id, "file_name": name, "width": config.image_size, "height": config.image_size})
        for item in objects:
            annotation_id += int(rng.integers(1, 4))
            annotations.append(
                {
                    "id": annotation_id,
                    "image_id": image_id,
                    "category_id": CATEGORIES[item.label][0],
                    "bbox": list(item.box_xywh),
                    "area": item.area,
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": "synthetic shapes", "settings": asdict(config)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in CATEGORIES],
    }


def _is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether ``out`` holds this very data set; ValueError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or "settings" not in found:
        raise ValueError(f"{out} exists and is not a shapes data set: choose another directory or remove it")
    if found["settings"] != settings:
        raise ValueError(f"{out} holds a shapes data set with other settings: choose another directory or remove it")
    return bool(found.get("complete"))


def generate(out: Path | str, config: ShapesConfig | None = None, processes: int | None = None) -> bool:
    """Writes the data set to ``out``: images/{train,val} and annotations/instances_{train,val}.json.

    An interrupted run is started over, a finished one with the same settings is left alone.

    Returns:
        False if there was nothing to do.

    Raises:
        ValueError: ``out`` holds something else.
    """
    config = config or ShapesConfig()
    out = Path(out)
    settings = {"format": _FORMAT, **asdict(config)}
    if _is_complete(out, settings):
        return False
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    (out / SETTINGS_FILE).write_text(json.dumps({"settings": settings, "complete": False}))
    processes = processes or min(os.cpu_count() or 1, 8)
    for split, count in zip(SPLITS, (config.train_images, config.val_images), strict=True):
        directory = out / "images" / split
        directory.mkdir(parents=True, exist_ok=True)
        write = partial(_write_image, config, directory, split)
        if processes == 1:
            drawn = [write(index) for index in range(count)]
        else:
            with multiprocessing.Pool(processes) as pool:
                drawn = pool.map(write, range(count), chunksize=16)
        path = out / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(_annotations(config, split, drawn)))
    (out / SETTINGS_FILE).write_text(json.dumps({"settings": settings, "complete": True}, indent=1))
    return True
