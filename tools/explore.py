"""Write a page on which every detection can be pointed at.

    python -m tools.explore RUN_OR_CHECKPOINT [SECOND …] --out explore

``explore/index.html`` opens in a browser from disk, without a server or a network. It shows the detections in the plane
of score and IoU with their pictures, the errors by kind, curves, the confusion matrix and the classes. For two
detectors it also shows what changed between them (docs/explore.md). A run directory stands for the detections of its
last evaluation. A checkpoint is run over its validation set, and then shows the best-regressed queries too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import config
from analysis import exploration
from analysis.best_regressed import BestRegressed
from analysis.detections_file import ImageInfo, annotated_images, detections_by_image, read_rows
from analysis.matching import ImageDetections
from datasets import Category, CocoDataset
from datasets.images import UnreadableImageError
from engine import checkpoint
from engine.coco_metrics import read_ground_truth
from engine.runs.run_directory import DETECTIONS
from tools import console
from tools.analyze import PROGRESS_SECONDS, check_labels, check_same_task, load_subject, observe_subject, tell_remarks

PAGE = Path(__file__).parent / "explorer"
"""The page itself: what is copied beside the data."""
QUALITY = 80
"""Of the pictures, as JPEG."""


class Opened(NamedTuple):
    """A run or checkpoint with its validation set."""

    checkpoint: Path
    saved: Path | None
    """Detections of the run's last evaluation."""
    annotations: str
    """File that the data set is from."""
    dataset: CocoDataset


class Explored(NamedTuple):
    """The detections of a run or checkpoint."""

    label: str
    source: str
    """Where they are from, for people."""
    detections: list[ImageDetections]
    """Of each annotated image."""
    best: list[BestRegressed] | None
    """Of each annotated image; None where only detections were saved."""


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("explore", __doc__)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN_OR_CHECKPOINT", help="what to explore; two are compared"
    )
    parser.add_argument("--labels", nargs="+", help="names of the detectors (default: their run directories)")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to: new, or an earlier page")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the configurations")
    parser.add_argument("--side", type=int, default=512, help="longer side of the pictures in pixels (%(default)s)")
    return parser


def opened(path: Path, overrides: Sequence[str]) -> Opened:
    """Read a run or checkpoint, and the annotations it is evaluated on.

    Raises:
        ValueError: there is no usable checkpoint, or its data cannot be used.
    """
    loaded = checkpoint.find_latest(path)[0] if path.is_dir() else checkpoint.load(path)
    if loaded is None:
        raise ValueError(f"{path}: this directory holds no checkpoint: give that of a run, or a checkpoint file")
    cfg = config.from_dict(loaded.state["config"], overrides, str(loaded.path))
    dataset = cfg.data.val.build(split="val", categories=tuple(Category(*c) for c in loaded.state["categories"]))
    saved = path / DETECTIONS
    return Opened(loaded.path, saved if saved.is_file() else None, cfg.data.val.annotations, dataset)


def explored(found: Opened, label: str, overrides: Sequence[str], images: Sequence[ImageInfo]) -> Explored:
    """The detections that a run has saved, or that a checkpoint makes on ``images``, all that are annotated."""
    if found.saved is not None:
        category_ids = [category.id for category in found.dataset.categories]
        detections = detections_by_image(read_rows(found.saved), [image.image_id for image in images], category_ids)
        return Explored(label, str(found.saved), detections, None)
    print(f"{label}: running {found.checkpoint} over its validation set", flush=True)
    observations = observe_subject(load_subject(found.checkpoint, label, overrides), images).observations
    return Explored(label, str(found.checkpoint), [o.detections for o in observations], [o.best for o in observations])


def write_pictures(out: Path, dataset: CocoDataset, indices: Sequence[int], side: int) -> list[bool]:
    """Write the images of these indices as JPEGs named by their place; say of each whether it could be read.

    Pictures are made smaller where their longer side has more than ``side`` pixels.
    """
    out.mkdir(parents=True, exist_ok=True)
    readable, reported = [], time.monotonic()
    for place, index in enumerate(indices):
        try:
            pixels = dataset.load(index)[0]
        except UnreadableImageError as error:
            print(f"{error}", file=sys.stderr)
            readable.append(False)
            continue
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        picture.thumbnail((side, side))
        picture.save(out / f"{place:06d}.jpg", quality=QUALITY)
        readable.append(True)
        if time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            print(f"{place + 1} of {len(indices)} pictures", flush=True)
    return readable


def write_page(
    out: Path,
    title: str,
    classes: Sequence[str],
    images: Sequence[ImageInfo],
    pictures: Sequence[dict[str, Any]],
    detectors: Sequence[Explored],
) -> None:
    """Write the page and its data to ``out``, which holds the pictures already.

    Args:
        out: directory.
        title: of the data set.
        classes: names by label.
        images: that are annotated.
        pictures: ``name``, ``size`` (height, width in pixels) and ``readable`` of each image.
        detectors: one or more.
    """
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    sizes = [picture["size"] for picture in pictures]
    objects = [image.objects for image in images]
    about = []
    for place, (label, source, detections, best) in enumerate(detectors):
        print(f"{label}: judging {sum(len(found.scores) for found in detections)} detections", flush=True)
        columns = exploration.detection_columns(objects, detections, sizes)
        # The page draws everything else before it reads the boxes, which are more than half of the data.
        _write_columns(data / f"boxes{place}.js", {"box": columns.pop("box")})
        _write_columns(data / f"detections{place}.js", columns)
        if best is not None:
            _write_columns(data / f"best{place}.js", exploration.best_regressed_columns(best, sizes))
        summary = exploration.precision_summary(objects, detections, len(classes))
        about.append({"label": label, "source": source, "best": best is not None, "classes": summary})
    _write_columns(data / "objects.js", exploration.object_columns(objects, sizes))
    stored = {"scale": exploration.SCALE, "edge": exploration.EDGE}
    names = {"title": title, "classes": list(classes), "images": list(pictures)}
    _write_data(data / "about.js", {**names, **stored, "detectors": about})
    shutil.copytree(PAGE, out, dirs_exist_ok=True)


def _write_columns(path: Path, columns: exploration.Columns) -> None:
    _write_data(path, exploration.encoded(columns))


def _write_data(path: Path, content: Any) -> None:
    """Write a script that hands the content to the page: browsers read no other files from disk."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    path.write_text(f"Explorer.receive({json.dumps(path.stem)}, {text});\n", encoding="utf-8")


def run(args: argparse.Namespace) -> Path:
    """Write everything and return the page; raises ValueError or OSError for what a user can mend."""
    if args.side < 64:
        raise ValueError(f"--side must be at least 64 pixels, got {args.side}")
    labels = check_labels(args.labels, [path / DETECTIONS if path.is_dir() else path for path in args.paths])
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is no directory: choose another --out")
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / "data" / "about.js").is_file():
        raise ValueError(f"{args.out} holds something else than such a page: choose another --out")
    found = [opened(path, args.set) for path in args.paths]
    check_same_task([one.dataset for one in found], args.paths)
    tell_remarks(one.dataset for one in found)
    dataset, annotations = found[0].dataset, found[0].annotations
    names = [category.name for category in dataset.categories]
    images = annotated_images(read_ground_truth(annotations), [category.id for category in dataset.categories])
    detectors = [explored(one, label, args.set, images) for one, label in zip(found, labels, strict=True)]
    place_of = {image_id: i for i, image_id in enumerate(dataset.ids)}
    indices = [place_of[image.image_id] for image in images]
    readable = write_pictures(args.out / "pictures", dataset, indices, args.side)
    pictures = [
        {"name": dataset.annotations.file_name(i), "size": dataset.stated_size(i), "readable": r}
        for i, r in zip(indices, readable, strict=True)
    ]
    write_page(args.out, Path(annotations).stem, names, images, pictures, detectors)
    return args.out / "index.html"


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    print(f"wrote {run(_parser().parse_args(arguments))}: open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
