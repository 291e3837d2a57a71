"""Measure what a checkpoint gets wrong, and whether its scores tell how well its boxes fit.

    python -m tools.analyze --resume A.pth [B.pth …] --out analysis/NAME

This writes analysis.json and figures. The file has the recall of best-regressed samples, the misalignment of score and
IoU and what it costs in AP, error types, AP of each class, and precision-recall curves. Figures show the same, and
where the detector looks. Several checkpoints stand side by side in every figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import config
from analysis.detections_file import ImageInfo, annotated_images
from analysis.figures import draw_all
from analysis.looking import (
    ChosenTarget,
    LookingQuery,
    LookingRow,
    chosen_targets,
    draw_sampling,
    looking_query,
    recorded,
)
from analysis.matching import Floats, ImageDetections
from analysis.report import Observation, as_json, headline, make_report, observe
from analysis.style import COLOURS, Picture
from datasets import CocoDataset
from datasets.images import UnreadableImageError
from engine import checkpoint, distributed
from engine.evaluator import Evaluator
from engine.lettering import lettered
from engine.step import DTYPES, configure_device
from models import Detector
from ops.boxes import cxcywh_to_xyxy
from ops.ms_deform_attn import set_default_backend
from structures import Batch, DetectorOutputs, Looking
from tools import console
from tools.predictor import load_model

PROGRESS_SECONDS = 20.0


class Subject(NamedTuple):
    """A checkpoint ready to be looked at."""

    label: str
    cfg: config.Config
    model: Detector
    dataset: CocoDataset
    device: torch.device


class Observed(NamedTuple):
    """What a checkpoint makes of its validation set."""

    observations: list[Observation]
    """Observations of all annotated images, in their order."""
    metrics: dict[str, Any]
    """Metrics of the evaluator."""
    looking: dict[ChosenTarget, LookingQuery]
    """Query of each chosen target whose image could be read."""


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("analyze", __doc__)
    parser.add_argument("--resume", nargs="+", type=Path, required=True, metavar="CHECKPOINT", help="what to analyse")
    parser.add_argument("--labels", nargs="+", help="names of the checkpoints (default: their run directories)")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the configurations")
    parser.add_argument("--threshold", type=float, default=0.3, help="score of a confident detection (%(default)s)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--images",
        nargs="+",
        type=int,
        metavar="ID",
        help="show the sampling points for the largest, the median and the smallest target of these images "
        "(default: of the first image with three targets)",
    )
    chosen.add_argument(
        "--targets",
        nargs="+",
        metavar="ID:N",
        help="show the sampling points for these targets: image id, and place among its annotations from 0 on",
    )
    return parser


def load_subject(path: Path, label: str, overrides: Sequence[str]) -> Subject:
    """Load the model with the weights that are evaluated (the averaged ones, where there are), and its validation set.

    Raises:
        ValueError: the checkpoint or its data cannot be used.
    """
    model, cfg, categories = load_model(path, overrides)
    device = distributed.choose_device(cfg.trainer.device)
    configure_device(device, tf32=cfg.trainer.tf32, deterministic=cfg.trainer.deterministic)
    set_default_backend(cfg.op_backend)
    dataset = cfg.data.val.build(split="val", categories=categories)
    return Subject(label, cfg, model.to(device), dataset, device)


def tell_remarks(datasets: Iterable[CocoDataset]) -> None:
    """Say what was cleaned away from the annotations, as training and evaluation do."""
    for line in dict.fromkeys(line for dataset in datasets for line in dataset.report.lines()):
        print(f"validation annotations: {line}", file=sys.stderr)


def observe_subject(subject: Subject, images: Sequence[ImageInfo], chosen: Sequence[ChosenTarget] = ()) -> Observed:
    """Run the detector over the validation set.

    Args:
        subject: the checkpoint.
        images: that are annotated.
        chosen: targets for which sampling points are wanted.
    """
    dataset = subject.dataset
    evaluator = Evaluator(subject.cfg.data.val.annotations, dataset.categories)
    info = {image.image_id: image for image in images}
    observed: dict[int, Observation] = {}
    looking: dict[ChosenTarget, LookingQuery] = {}
    loader = subject.cfg.data.build_val_loader(dataset)
    reported = time.monotonic()
    for batch in loader:
        places = {image_id: i for i, image_id in enumerate(batch.image_ids.tolist())}
        wanted = [target for target in chosen if target.image_id in places]
        outputs, detections, looked = _forward(subject, batch, bool(wanted))
        evaluator.update(batch.image_ids, detections)
        scores = subject.model.scores(outputs.result.logits).cpu().numpy().astype(np.float64)
        boxes = _pixels(outputs.result.boxes.float().cpu(), batch.original_sizes)
        for image_id, i in places.items():
            found = ImageDetections(*(part.cpu().numpy() for part in detections[i]))
            found = ImageDetections(found.scores.astype(np.float64), found.labels, found.boxes_xyxy.astype(np.float64))
            observed[image_id] = observe(image_id, info[image_id].objects, found, scores[i], boxes[i])
        for target in wanted:
            assert looked is not None
            i, objects = places[target.image_id], info[target.image_id].objects
            height, width = batch.original_sizes[i].tolist()
            looking[target] = looking_query(target.place, objects, scores[i], boxes[i], looked, i, (height, width))
        if time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            print(f"{subject.label}: {len(observed)} of {len(dataset)} images", flush=True)
    classes = len(dataset.categories)
    observations = [observed.get(image.image_id) or _unread(image, classes) for image in images]
    return Observed(observations, evaluator.compute(), looking)


def _forward(subject: Subject, batch: Batch, with_looking: bool) -> tuple[DetectorOutputs, list[Any], Looking | None]:
    """Outputs, detections, and where the queries of the last decoder layer look, if it is wanted."""
    moved = batch.to(subject.device)
    model = subject.model
    dtype = DTYPES.get(subject.cfg.trainer.precision)
    with torch.inference_mode(), torch.autocast(subject.device.type, dtype=dtype, enabled=dtype is not None):
        if not with_looking:
            outputs = model(moved.images)
            return outputs, model.postprocess(outputs, moved.original_sizes), None
        with recorded(model.last_cross_attention) as found:
            outputs = model(moved.images)
        return outputs, model.postprocess(outputs, moved.original_sizes), found[-1]


def _pixels(boxes: Tensor, sizes: Tensor) -> Floats:
    """cxcywh boxes [B, Q, 4] relative to their images as xyxy in pixels, clipped to the images."""
    scale = sizes.cpu().flip(-1).repeat(1, 2)[:, None].double()
    result: Floats = (cxcywh_to_xyxy(boxes.double()).clamp(0, 1) * scale).numpy()
    return result


def _unread(image: ImageInfo, num_classes: int) -> Observation:
    """Observe an image that could not be read: nothing is detected, and its only query is empty."""
    nothing = ImageDetections(np.empty(0), np.empty(0, dtype=np.int64), np.empty((0, 4)))
    return observe(image.image_id, image.objects, nothing, np.zeros((1, num_classes)), np.zeros((1, 4)))


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Make short names: the run directories, with the file where that does not tell them apart."""
    names = [path.resolve().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}/{path.stem.removeprefix('checkpoint_')}" for name, path in zip(names, paths, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{chr(ord('A') + i)}: {name}" for i, name in enumerate(names)]
    return names


def check_labels(given: Sequence[str] | None, paths: Sequence[Path]) -> list[str]:
    """Find a different label for each checkpoint.

    Raises:
        ValueError: that cannot be, or there are more checkpoints than colours that can be told apart.
    """
    if len(paths) > len(COLOURS):
        raise ValueError(f"{len(paths)} checkpoints: figures can tell at most {len(COLOURS)} apart")
    labels = labels_of(paths) if given is None else list(given)
    if len(labels) != len(paths):
        raise ValueError(f"{len(labels)} labels for {len(paths)} checkpoints")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"label {twice[0]!r} is given to several checkpoints")
    return labels


def check_same_task(datasets: Sequence[CocoDataset], paths: Sequence[Path]) -> None:
    """Raise ValueError where the detections of checkpoints, given their validation sets, cannot be compared."""
    first = datasets[0]
    for dataset, path in zip(datasets[1:], paths[1:], strict=True):
        current = [list(category) for category in first.categories]
        checkpoint.check_categories([list(category) for category in dataset.categories], current, path)
        if dataset.ids != first.ids:
            raise ValueError(f"{path}: its validation images are not those of {paths[0]}: set data.val.* with --set")


def run(args: argparse.Namespace) -> None:
    """Analyse and write everything; raises ValueError or OSError for what a user can mend."""
    labels = check_labels(args.labels, args.resume)
    subjects = [load_subject(path, label, args.set) for path, label in zip(args.resume, labels, strict=True)]
    check_same_task([subject.dataset for subject in subjects], args.resume)
    tell_remarks(subject.dataset for subject in subjects)
    truth = Evaluator(subjects[0].cfg.data.val.annotations, subjects[0].dataset.categories).ground_truth
    images = annotated_images(truth, [category.id for category in subjects[0].dataset.categories])
    chosen = chosen_targets(images, args.images, args.targets)
    args.out.mkdir(parents=True, exist_ok=True)
    results = [observe_subject(subject, images, chosen) for subject in subjects]
    names = [category.name for category in subjects[0].dataset.categories]
    reports = [
        make_report(subject.label, result.observations, names, result.metrics, args.threshold)
        for subject, result in zip(subjects, results, strict=True)
    ]
    content = {
        "checkpoints": [{"path": str(p.resolve()), **as_json(r)} for p, r in zip(args.resume, reports, strict=True)],
        "threshold": args.threshold,
    }
    (args.out / "analysis.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    figures = draw_all(args.out, reports)
    if chosen:
        figures.append(args.out / "sampling_points.png")
        _draw_sampling(figures[-1], subjects[0].dataset, images, labels, results, chosen)
    for report in reports:
        print(f"{report.label}: " + ", ".join(f"{name} {value:.3g}" for name, value in headline(report).items()))
    print(f"wrote analysis.json and {len(figures)} figures to {args.out}")


def _draw_sampling(
    path: Path,
    dataset: CocoDataset,
    images: Sequence[ImageInfo],
    labels: Sequence[str],
    results: Sequence[Observed],
    chosen: Sequence[ChosenTarget],
) -> None:
    """Draw where each checkpoint looks for the chosen targets."""
    objects = {image.image_id: image.objects for image in images}
    rows = []
    for target in chosen:
        found, index = objects[target.image_id], dataset.ids.index(target.image_id)
        try:
            pixels, _, _, size = dataset.load(index)
            picture = Picture(pixels.permute(1, 2, 0).numpy(), size)
        except UnreadableImageError:
            height, width = (side or 1 for side in dataset.stated_size(index))
            picture = Picture(np.full((height, width, 3), 128, dtype=np.uint8), (height, width))
        name = lettered([category.name for category in dataset.categories])[found.labels[target.place]].text
        queries = [result.looking.get(target) for result in results]
        rows.append(LookingRow(f"{name} ({target})", picture, found.boxes_xyxy[target.place], queries))
    draw_sampling(path, labels, rows)


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    run(_parser().parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
