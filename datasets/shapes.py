"""The embedded synthetic data set: textured shapes on cluttered backgrounds, in COCO layout.

It exists so that everything can be tried, tested and compared without downloading anything. It is small but not
trivial: objects of 12 to 96 pixels in any rotation, colour and texture, overlapping each other and cut off by the image
border, over a background with gradients, lines and blobs; some images hold no object. Ids in the annotation files have
gaps, as those of real data sets do. The same settings always give the same data set, whatever the number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.shape_drawing import NAMES, DrawnObject, Scene, draw_image
from datasets.workers import start_helper

CATEGORY_IDS = (3, 7, 8, 15, 21, 34)
"""Of the names in ``shape_drawing.NAMES``; with gaps on purpose."""

SPLITS = ("train", "val")
SETTINGS_FILE = "shapes.json"
"""Appears when the data set is complete."""
_UNFINISHED_FILE = "shapes.unfinished.json"
_FORMAT = 2
"""Raised whenever the drawing changes, so that an old data set is not taken for a new one."""


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

    @property
    def scene(self) -> Scene:
        """What is drawn."""
        sizes = (self.min_object_size, self.max_object_size)
        return Scene(self.image_size, self.max_objects, sizes, self.empty_share)


def _write_image(config: ShapesConfig, directory: Path, split: str, index: int) -> tuple[str, list[DrawnObject]]:
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    pixels, objects = draw_image(config.scene, rng)
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
                    "category_id": CATEGORY_IDS[item.label],
                    "bbox": list(item.box_xywh),
                    "area": item.area,
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": "synthetic shapes", "settings": asdict(config)},
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": category_id, "name": name} for category_id, name in zip(CATEGORY_IDS, NAMES, strict=True)
        ],
    }


def _is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether ``out`` holds this very data set; ValueError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    for name in (SETTINGS_FILE, _UNFINISHED_FILE):
        try:
            found = json.loads((out / name).read_text())
        except (OSError, ValueError):
            continue
        if found != settings:
            raise ValueError(f"{out} holds a shapes data set with other settings: remove it or choose another --out")
        return name == SETTINGS_FILE
    raise ValueError(f"{out} exists and is not a shapes data set: remove it or choose another --out")


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
    (out / _UNFINISHED_FILE).write_text(json.dumps(settings, indent=1))
    processes = processes or min(os.cpu_count() or 1, 8)
    for split, count in zip(SPLITS, (config.train_images, config.val_images), strict=True):
        directory = out / "images" / split
        directory.mkdir(parents=True, exist_ok=True)
        write = partial(_write_image, config, directory, split)
        if processes == 1:
            drawn = [write(index) for index in range(count)]
        else:
            with multiprocessing.Pool(processes, start_helper) as pool:
                drawn = pool.map(write, range(count), chunksize=16)
        path = out / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(_annotations(config, split, drawn)))
    (out / _UNFINISHED_FILE).replace(out / SETTINGS_FILE)
    return True
