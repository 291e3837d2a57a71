"""Small COCO data sets, written to disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


class CocoFolder:
    """A directory ``images`` and a file ``annotations`` beside it; ``content`` may be changed and written again."""

    def __init__(self, root: Path, sizes: list[tuple[int, int]], boxes_per_image: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.images = root / "images"
        self.annotations = root / "instances.json"
        self.images.mkdir(parents=True)
        self.content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}, {"id": 20, "name": "emu"}],
        }
        for index, (height, width) in enumerate(sizes):
            image_id, name = 10 + 3 * index, f"{index:03d}.png"
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images / name, compress_level=1)
            self.content["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
            for _ in range(boxes_per_image):
                x, y = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
                w, h = rng.uniform(2, width / 2), rng.uniform(2, height / 2)
                self.add(image_id, [x, y, w, h], int(rng.choice([4, 9, 20])))
        self.write()

    def add(self, image_id: int, box: Any, category_id: Any = 4, **fields: Any) -> dict[str, Any]:
        annotation = {
            "id": 100 + 2 * len(self.content["annotations"]),
            "image_id": image_id,
            "bbox": box,
            "category_id": category_id,
            "iscrowd": 0,
            **fields,
        }
        self.content["annotations"].append(annotation)
        return annotation

    def write(self) -> None:
        self.annotations.write_text(json.dumps(self.content))

    def paths(self) -> dict[str, str]:
        return {"images": str(self.images), "annotations": str(self.annotations)}


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., CocoFolder]:
    count = 0

    def make(sizes: list[tuple[int, int]] | None = None, boxes_per_image: int = 2, seed: int = 0) -> CocoFolder:
        nonlocal count
        count += 1
        return CocoFolder(tmp_path / str(count), sizes or [(40, 60), (50, 50), (60, 40)], boxes_per_image, seed)

    return make
