"""Draws the images of the synthetic ``shapes`` data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

NAMES = ("disc", "square", "triangle", "star", "cross", "ring")
"""Kinds of shapes; a label is an index into them."""

_SUPERSAMPLING = 4
_MIN_VISIBLE = 0.5
"""An object is placed only if this share of it, and of every object below it, stays in sight."""
_PLACEMENT_TRIES = 12

Pixels = NDArray[np.float32]


class Scene(NamedTuple):
    """What an image may hold."""

    size: int
    """Height and width of the image in pixels."""
    max_objects: int
    """Most objects."""
    object_sizes: tuple[int, int]
    """Longer side of the smallest and of the largest box, in pixels."""
    empty_share: float
    """Probability that there is no object."""


class DrawnObject(NamedTuple):
    """One object as it is annotated."""

    label: int
    """Index into NAMES."""
    box_xywh: tuple[float, float, float, float]
    """Tight around what the image border leaves of the shape, in pixels; what other objects hide is included."""
    area: float
    """Pixels of the shape inside the image, hidden or not."""


class PlacedObject(NamedTuple):
    """An object, rasterised."""

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


def _place(label: int, size: float, canvas: int, rng: np.random.Generator) -> PlacedObject | None:
    """Rasterises one shape at a random place, possibly across the border; None where too little of it is in sight."""
    points, hole = _outline(NAMES[label], size, rng)
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
    return PlacedObject(coverage, int(top), int(left), DrawnObject(label, box, round(float(coverage.sum()), 2)))


def place_objects(scene: Scene, rng: np.random.Generator) -> list[PlacedObject]:
    """Chooses and places the objects of one image, bottom-most first."""
    if rng.random() < scene.empty_share:
        return []
    smallest, largest = scene.object_sizes
    wanted = int(rng.integers(1, scene.max_objects + 1))
    owner = np.full((scene.size, scene.size), -1, dtype=np.int16)
    full: list[int] = []
    placed: list[PlacedObject] = []
    for _ in range(wanted):
        label = int(rng.integers(len(NAMES)))
        # Half a pixel inside the limits, which rasterising could otherwise step over.
        size = float(rng.uniform(smallest + 0.5, max(largest - 0.5, smallest + 0.5)))
        for _ in range(_PLACEMENT_TRIES):
            candidate = _place(label, size, scene.size, rng)
            if candidate is None or max(candidate.drawn.box_xywh[2:]) < smallest:
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
        + _smooth_noise(size, int(rng.integers(3, 6)), 0.3, rng)
        + _smooth_noise(size, int(rng.integers(12, 32)), 0.12, rng),
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
    for _ in range(int(rng.integers(1, 8))):
        ends = rng.uniform(-0.1 * size, 1.1 * size, 4)
        draw.line(tuple(ends), fill=_int_colour(rng), width=int(rng.integers(1, 3)))
    for _ in range(int(rng.integers(0, 4))):
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
    other = np.clip(base + rng.choice([-1.0, 1.0]) * rng.uniform(25, 60, 3), 0, 255)
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
    for _ in range(40):
        if np.abs(colour - below).max() > 90:
            break
        colour = _colour(rng)
    return colour


def draw_image(scene: Scene, rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[DrawnObject]]:
    """One image, [size, size, 3] uint8 RGB, and its objects, bottom-most first."""
    placed = place_objects(scene, rng)
    picture = _background(scene.size, rng)
    for item in placed:
        height, width = item.alpha.shape
        region = picture[item.top : item.top + height, item.left : item.left + width]
        surface = _texture(height, width, _surface_colour(region, item.alpha, rng), rng)
        region += item.alpha[..., None] * (surface - region)
    picture = picture * rng.uniform(0.8, 1.15) + rng.uniform(-12, 12)
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * rng.uniform(1, 6)
    return np.clip(picture, 0, 255).astype(np.uint8), [item.drawn for item in placed]
