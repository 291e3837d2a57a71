"""Data loading beside torchvision's own data set and transforms, COCO evaluation by each library, and start-up.

    python -m benchmarks.data [--images 32] [--repeats 5] [--eval-images 300] [--annotated 10000] [--save NAME]

Loading is measured in one process with one thread, in processor time, with DETR's augmentation at its published sizes;
evaluation in wall-clock time on random detections, 100 an image over 80 classes; start-up, which is reading annotations
with polygons, in processor time and memory beyond what the imported libraries take, each in a process of its own.
``--annotated 118287`` is COCO's size.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from benchmarks import frame
from datasets import CocoConfig, DataConfig
from datasets.shapes import ShapesConfig, generate
from datasets.transforms import DETRMultiScale, RandomFlip
from engine.coco_metrics import box_metrics, choose_backend, read_ground_truth

BATCH = 2
CLASSES, OBJECTS, DETECTIONS = 80, 7, 100


def torchvision_pipeline(root: Path) -> Callable[[], object]:
    """The same augmentation from torchvision's ready-made parts, batched in pairs and padded."""
    scales = DETRMultiScale()
    short, crop_short = list(scales.short_sides), list(scales.crop_short_sides)
    cropped = [
        v2.RandomShortestSize(crop_short),
        v2.RandomCrop((512, 512), pad_if_needed=True),
        v2.RandomShortestSize(short, max_size=scales.max_long_side),
    ]
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(),
            v2.RandomChoice(
                [v2.RandomShortestSize(short, max_size=scales.max_long_side), v2.Compose(cropped)], p=[0.5, 0.5]
            ),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            v2.SanitizeBoundingBoxes(labels_getter=lambda sample: sample[1]["labels"]),
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        plain = CocoDetection(
            str(root / "images/train"), str(root / "annotations/instances_train.json"), transforms=transform
        )
    dataset = wrap_dataset_for_transforms_v2(plain, target_keys=("boxes", "labels"))

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, len(dataset), BATCH):
            images = [dataset[index][0] for index in range(start, min(start + BATCH, len(dataset)))]
            height, width = (max(int(image.shape[axis]) for image in images) for axis in (1, 2))
            yield torch.stack(
                [v2.functional.pad(image, [0, 0, width - image.shape[2], height - image.shape[1]]) for image in images]
            )

    return lambda: [batch.shape for batch in batches()]


def measure_loading(images: int, repeats: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "shapes"
        generate(
            root, ShapesConfig(train_images=images, val_images=1, image_size=640, max_object_size=320, empty_share=0.0)
        )
        split = CocoConfig(
            images=str(root / "images/train"),
            annotations=str(root / "annotations/instances_train.json"),
            transforms=(RandomFlip(), DETRMultiScale()),
        )
        val = CocoConfig(images=split.images, annotations=split.annotations)
        half = (0.5, 0.5, 0.5)
        config = DataConfig(train=split, val=val, batch_size=BATCH, num_workers=0, mean=half, std=half)
        loader = config.build_train_loader(split.build(split="train"), seed=0)
        epoch = iter(range(1_000_000))
        runs: dict[str, Callable[[], object]] = {
            "ours": lambda: [step[0].images.pixels.shape for step in loader.iterate(next(epoch))],
            "torchvision": torchvision_pipeline(root),
        }
        times = frame.times_in_turn(runs, repeats)
    return {f"{name}_images_per_core_second": images / t.processor for name, t in times.items()}


def measure_evaluation(images: int, repeats: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    objects = np.concatenate(
        [rng.uniform(0, 400, (images * OBJECTS, 2)), rng.uniform(5, 200, (images * OBJECTS, 2))], 1
    )
    classes = rng.integers(1, CLASSES + 1, len(objects))
    content = {
        "images": [{"id": index} for index in range(images)],
        "annotations": [
            {"id": index, "image_id": index // OBJECTS, "category_id": int(label), "bbox": box}
            for index, (box, label) in enumerate(zip(objects.tolist(), classes, strict=True))
        ],
        "categories": [{"id": index, "name": str(index)} for index in range(1, CLASSES + 1)],
    }
    source = (np.arange(images)[:, None] * OBJECTS + rng.integers(0, OBJECTS, (images, DETECTIONS))).ravel()
    boxes = objects[source] + rng.normal(size=(len(source), 4)) * 0.1 * objects[source][:, [2, 3, 2, 3]]
    rows = np.column_stack(
        [source // OBJECTS, boxes[:, :2], np.abs(boxes[:, 2:]), rng.random(len(source)), classes[source]]
    )
    truth = read_ground_truth(content)
    runs: dict[str, Callable[[], object]] = {"pycocotools": lambda: box_metrics(truth, rows, "pycocotools")}
    if choose_backend("auto") == "hotcoco":
        runs["hotcoco"] = lambda: box_metrics(truth, rows, "hotcoco")
    return {f"{name}_seconds": t.elapsed for name, t in frame.times_in_turn(runs, repeats).items()}


READERS = {
    "ours": "from datasets.coco_files import _read; read = lambda: _read(path, None)",
    "ours, kept by another process": "from datasets.coco_files import _read; read = lambda: _read(path, None)",
    "our ground truth": "from engine.coco_metrics import read_ground_truth; read = lambda: read_ground_truth(path)",
    "hotcoco": "import hotcoco; read = lambda: hotcoco.COCO(path)",
    "pycocotools": "from pycocotools.coco import COCO; read = lambda: COCO(path)",
}
_READING = """
import contextlib, io, json, re, sys, time, torch, torchvision
path = sys.argv[1]
def memory(kind):  # a child's ru_maxrss begins with that of its parent
    return int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**20
{}
before, start, wall = memory("VmRSS"), time.process_time(), time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    kept = read()
print(json.dumps([time.process_time() - start, time.perf_counter() - wall, memory("VmHWM") - before]))
"""


def write_annotations(path: Path, images: int, boxes: int) -> None:
    """A file like COCO's: boxes with polygons of 6 to 39 points."""
    rng = np.random.default_rng(0)
    polygons = [
        json.dumps([rng.uniform(0, 480, 2 * points).round(2).tolist()]) for points in rng.integers(6, 40, 500).tolist()
    ]
    with path.open("w") as file:
        file.write('{"info": {}, "images": [')
        for number in range(1, images + 1):
            name = f"{number:012d}.jpg"
            entry = {"license": 3, "file_name": name, "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                     "height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", "id": number}  # fmt: skip
            file.write((", " if number > 1 else "") + json.dumps(entry))
        file.write('], "annotations": [')
        for start in range(0, boxes, 100_000):
            count = min(100_000, boxes - start)
            places = (
                np.column_stack([rng.uniform(0, 300, (count, 2)), rng.uniform(1, 180, (count, 2))]).round(2).tolist()
            )
            owners, labels = rng.integers(1, images + 1, count).tolist(), rng.integers(1, CLASSES + 1, count).tolist()
            rows = [
                f'{{"segmentation": {polygons[row % 500]}, '
                f'"area": {box[2] * box[3]:.4f}, "iscrowd": {int(row % 85 == 0)}, "image_id": {owner}, "bbox": {box}, '
                f'"category_id": {label}, "id": {start + row + 1}}}'
                for row, (box, owner, label) in enumerate(zip(places, owners, labels, strict=True))
            ]
            file.write((", " if start else "") + ", ".join(rows))
        categories = [{"id": number, "name": str(number)} for number in range(1, CLASSES + 1)]
        file.write('], "categories": ' + json.dumps(categories) + "}")


def measure_startup(images: int) -> dict[str, dict[str, float]]:
    """Processor seconds, seconds and GiB of each reader."""
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "instances.json"
        write_annotations(path, images, round(7.27 * images))
        time.sleep(2.5)  # what has just been written is not kept
        for name, reader in READERS.items():
            environment = {**os.environ, "ALIGN_DETR_CACHE": f"{directory}/cache", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", _READING.format(reader), str(path)]
            output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            figures[name] = dict(zip(("processor_seconds", "seconds", "gibibytes"), json.loads(output), strict=True))
            ratio = figures[name]["processor_seconds"] / figures["ours"]["processor_seconds"]
            print(
                f"  {name}: {', '.join(f'{v:.2f} {k}' for k, v in figures[name].items())}, ratio {ratio:.2f}x",
                flush=True,
            )
    return figures


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--images", type=int, default=32, help="images to load (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default 5)")
    parser.add_argument("--eval-images", type=int, default=300, help="images to evaluate (default 300)")
    parser.add_argument("--annotated", type=int, default=10_000, help="images in the file that is read (default 10000)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    loading = measure_loading(arguments.images, arguments.repeats)
    ours, theirs = loading.values()
    print("loading 640 x 640 JPEG with DETR's augmentation, images a second and core")
    print(f"  ours {ours:.1f}, torchvision {theirs:.1f}, ratio {ours / theirs:.2f}x", flush=True)
    evaluation = measure_evaluation(arguments.eval_images, max(arguments.repeats // 2, 1))
    slow, fast = evaluation["pycocotools_seconds"], evaluation.get("hotcoco_seconds")
    compared = "hotcoco is not installed" if fast is None else f"hotcoco {fast:.2f} s, ratio {slow / fast:.0f}x"
    print(f"evaluating {arguments.eval_images} images with {DETECTIONS} detections each")
    print(f"  pycocotools {slow:.2f} s, {compared}")
    print(f"reading annotations of {arguments.annotated} images, memory beyond imported libraries")
    startup = measure_startup(arguments.annotated)
    frame.save(arguments.save, {**frame.machine(), "loading": loading, "evaluation": evaluation, "startup": startup})


if __name__ == "__main__":
    main()
