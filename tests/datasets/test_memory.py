"""Host memory does not grow with the number of workers: 236,000 images (COCO has half as many), four workers."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets import Category, CleaningReport, CocoDataset
from datasets.annotations import PackedAnnotations, pack_annotations
from datasets.coco import SampleKey
from ops.coco_file import from_content

IMAGES, BOXES_PER_IMAGE, WORKERS = 236_000, 7, 4
MEBIBYTE = 2**20


def private_memory(pid: int | str) -> float:
    """Mebibytes that belong to this process alone; what it shares with its parent does not count."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


class Walk(CocoDataset):
    """Item i reads annotations from all over the file and reports this worker's own memory before and after."""

    def __getitem__(self, key):
        before = private_memory("self")
        boxes = 0
        # Every 16th image: each page of memory is touched, as it holds the boxes of 36 images or the names of 256.
        for index in range(0, len(self), 16):
            own, labels = self.annotations.targets(index)
            boxes += len(labels)
            assert own.shape == (len(labels), 4)
            assert self.annotations.file_name(index).endswith(".jpg")
            assert self.annotations.sizes[index].tolist() == [480, 480]
        return torch.tensor([before, private_memory("self"), boxes])


def packed_annotations(images: int) -> PackedAnnotations:
    boxes = images * BOXES_PER_IMAGE
    names = b"".join(b"%012d.jpg" % index for index in range(images))
    return PackedAnnotations(
        image_ids=torch.arange(images),
        sizes=torch.full((images, 2), 480, dtype=torch.int32),
        name_bytes=torch.frombuffer(bytearray(names), dtype=torch.uint8),
        name_ends=torch.arange(1, images + 1) * 16,
        box_ends=torch.arange(1, images + 1) * BOXES_PER_IMAGE,
        boxes=torch.rand(boxes, 4),
        labels=torch.zeros(boxes, dtype=torch.int64),
    )


def walk(dataset: CocoDataset, workers: int) -> torch.Tensor:
    """[workers, 3]: private memory before and after, and boxes seen."""
    loader = DataLoader(
        dataset,
        sampler=[SampleKey(index, 0) for index in range(workers)],
        batch_size=1,
        num_workers=workers,
        multiprocessing_context=multiprocessing.get_context("fork"),
    )
    return torch.cat(list(loader))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_reading_all_annotations_costs_forked_workers_no_memory():
    dataset = Walk("", packed_annotations(IMAGES), (Category(1, "a"),), CleaningReport(), (), training=True)
    size = sum(tensor.nbytes for tensor in dataset.annotations) / MEBIBYTE
    measured = walk(dataset, WORKERS)
    assert (measured[:, 2] == IMAGES // 16 * BOXES_PER_IMAGE).all()
    growth = (measured[:, 1] - measured[:, 0]).tolist()
    # Pages of the interpreter that workers write to on their way are a few mebibytes.
    assert size > 20
    assert max(growth) < 0.4 * size, f"{growth} MiB for annotations of {size:.0f} MiB"


def test_packing_takes_little_more_than_the_boxes():
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(2000)]
    boxes = rng.uniform(1, 200, (14_000, 4)).round(2).tolist()
    annotations = [{"id": i, "image_id": i // 7, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
    packed, report = pack_annotations(
        from_content({"images": images, "annotations": annotations}), "f", (Category(1, "a"),)
    )
    assert not report
    assert len(packed.labels) == 14_000
    assert sum(tensor.nbytes for tensor in packed) < 250 * len(images)
