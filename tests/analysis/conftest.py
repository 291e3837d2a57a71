"""Random data sets in COCO format with detections around their objects."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.coco_metrics import GroundTruth, read_ground_truth

CATEGORY_IDS = (5, 7, 9)


@pytest.fixture(scope="session")
def random_dataset() -> Callable[..., tuple[GroundTruth, NDArray[np.float64]]]:
    """Annotations, and detections [n, 7] as the evaluator has them; scores repeat, some objects are crowds."""

    def make(seed: int, images: int = 12, crowds: bool = True) -> tuple[GroundTruth, NDArray[np.float64]]:
        rng = np.random.default_rng(seed)
        entries = [{"id": 10 + 3 * i, "width": 100, "height": 100} for i in range(images)]
        annotations, rows = [], []
        for entry in entries:
            for _ in range(rng.integers(0, 6)):
                box = np.concatenate([rng.uniform(0, 60, 2), rng.uniform(8, 40, 2)])
                category = int(rng.choice(CATEGORY_IDS))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": entry["id"],
                        "category_id": category,
                        "bbox": box.tolist(),
                        "area": float(box[2] * box[3]),
                        "iscrowd": int(crowds and rng.random() < 0.15),
                    }
                )
                for _ in range(rng.integers(0, 4)):
                    moved = np.maximum(box + rng.normal(0, 2.5, 4), 1)
                    found = category if rng.random() < 0.8 else int(rng.choice(CATEGORY_IDS))
                    rows.append([entry["id"], *moved, round(rng.random(), 1), found])
            for _ in range(rng.integers(0, 4)):
                box = np.concatenate([rng.uniform(0, 60, 2), rng.uniform(8, 40, 2)])
                rows.append([entry["id"], *box, rng.random(), int(rng.choice(CATEGORY_IDS))])
        content = {
            "images": entries,
            "annotations": annotations,
            "categories": [{"id": c, "name": str(c)} for c in CATEGORY_IDS],
        }
        return read_ground_truth(content), np.array(rows)

    return make
