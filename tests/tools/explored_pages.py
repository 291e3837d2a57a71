"""A small data set with two detectors, as tools.explore writes it, and a browser to open it in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from analysis.best_regressed import BestRegressed, best_regressed
from analysis.detections_file import ImageInfo
from analysis.matching import Floats, ImageDetections, ImageObjects
from tools.explore import Explored, write_page

CLASSES = ("ant", "bee", "cat <b>")
SIZES = [(120, 200), (200, 150)] * 6
LONELY = 3
"""The image with a very confident detection of the background, which is the only one there."""


def random_boxes(count: int, size: tuple[int, int], rng: np.random.Generator) -> Floats:
    corners = rng.uniform(0, 0.7, (count, 2))
    relative = np.concatenate([corners, corners + rng.uniform(0.05, 0.3, (count, 2))], axis=1)
    return relative * np.array(size[::-1] * 2)


def made_objects() -> list[ImageObjects]:
    rng = np.random.default_rng(5)
    objects = []
    for place, size in enumerate(SIZES):
        count = int(rng.integers(1, 6))
        boxes = random_boxes(count, size, rng)
        crowd = np.zeros(count, dtype=bool)
        if place == 5:
            crowd[0] = True
        objects.append(ImageObjects(rng.integers(3, size=count), boxes, (boxes[:, 2:] - boxes[:, :2]).prod(1), crowd))
    none = np.empty(0, dtype=np.int64)
    objects[LONELY] = ImageObjects(none, np.empty((0, 4)), np.empty(0), np.empty(0, dtype=bool))
    return objects


def made_detections(objects: list[ImageObjects], seed: int) -> list[ImageDetections]:
    """Near the objects and elsewhere, with scores of multiples of 1/1000 below 0.8."""
    rng = np.random.default_rng(seed)
    found = []
    for truth, size in zip(objects, SIZES, strict=True):
        boxes, labels = [random_boxes(6, size, rng)], [rng.integers(3, size=6)]
        for scale in (2.0, 12.0, 25.0):
            kept = rng.random(len(truth.labels)) < 0.8
            boxes.append(truth.boxes_xyxy[kept] + rng.normal(0, scale, (int(kept.sum()), 4)))
            labels.append(np.where(rng.random(int(kept.sum())) < 0.75, truth.labels[kept], rng.integers(3)))
        joined = np.sort(np.concatenate(boxes).reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        clipped = joined.clip(0, np.array(size[::-1] * 2))
        found.append(ImageDetections(rng.integers(800, size=len(clipped)) / 1000, np.concatenate(labels), clipped))
    alone = np.array([[10.0, 20.0, 90.0, 60.0]])
    found[LONELY] = ImageDetections(np.array([0.93]), np.array([1]), alone)
    return found


def made_best(objects: list[ImageObjects], seed: int) -> list[BestRegressed]:
    rng = np.random.default_rng(seed)
    return [
        best_regressed(rng.random((20, 3)), random_boxes(20, size, rng), truth)
        for truth, size in zip(objects, SIZES, strict=True)
    ]


def write_small(out: Path, detectors: int = 2) -> list[Explored]:
    """Write the page of the data set; returns its detectors, the first of which has best-regressed queries."""
    objects = made_objects()
    images = [ImageInfo(10 + i, truth) for i, truth in enumerate(objects)]
    pictures: list[dict[str, Any]] = []
    (out / "pictures").mkdir(parents=True)
    for i, (height, width) in enumerate(SIZES):
        pictures.append({"name": f"folder/photo{i:02d}.jpg", "size": (height, width), "readable": i != 7})
        if i != 7:
            Image.new("RGB", (width, height), (90, 110 + i, 130)).save(out / "pictures" / f"{i:06d}.jpg")
    made = [
        Explored(f"model {i}", "made up", made_detections(objects, i), made_best(objects, i) if i == 0 else None)
        for i in range(detectors)
    ]
    write_page(out, "small set", CLASSES, images, pictures, made)
    return made


def browser_program() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
