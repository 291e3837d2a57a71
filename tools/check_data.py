"""Find what is wrong with a data set, and draw a page of samples as training sees them.

python -m tools.check_data --cfg configs/align_dino.yaml [key.path=value ...]
python -m tools.check_data --images DIR --annotations FILE.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import config
from datasets import CleaningReport, CocoConfig, CocoDataset
from datasets.coco import Sample, SampleKey
from datasets.images import UnreadableImageError, read_header
from datasets.workers import start_helper
from engine.evaluator import Evaluator
from engine.lettering import lettered
from engine.whole_files import replacing
from ops.boxes import cxcywh_to_xyxy
from ops.errors import describe_error
from tools import console

COLUMNS, CELL, MARGIN = 4, 300, 4
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")
USUAL_MODES = ("RGB", "L")
UNREADABLE = "unreadable image"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser("check_data", __doc__)
    parser.add_argument("--cfg", type=Path, help="configuration whose training and validation data are checked")
    parser.add_argument("--images", type=Path, help="directory of images, instead of --cfg")
    parser.add_argument("--annotations", type=Path, help="COCO annotation file, instead of --cfg")
    parser.add_argument("--page", type=Path, default=Path("check_data.png"), help="picture to write (%(default)s)")
    parser.add_argument("--samples", type=int, default=12, help="images of each split on the page (%(default)s)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="processes to decode with (%(default)s)"
    )
    parser.add_argument("--no-decode", action="store_true", help="read the annotations only and draw no page")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of the configuration")
    options = parser.parse_intermixed_args(arguments)
    if (options.cfg is None) == (options.images is None) or (options.images is None) != (options.annotations is None):
        parser.error("give either --cfg, or both --images and --annotations")
    return options


def build_datasets(options: argparse.Namespace) -> tuple[dict[str, CocoDataset], list[str]]:
    """The data sets by the name of their split, and why training would refuse them all the same."""
    if options.cfg is None:
        files = CocoConfig(images=str(options.images), annotations=str(options.annotations))
        return {"train": files.build(split="train")}, []
    cfg = config.load(options.cfg, options.overrides)
    train, val = cfg.data.build_datasets()
    refusals = []
    try:
        cfg.data.build_train_loader(train, seed=cfg.seed, accumulation_steps=cfg.trainer.accumulation_steps)
    except ValueError as error:
        refusals.append(describe_error(error))
    try:
        Evaluator(cfg.data.val.annotations, val.categories)
    except ValueError as error:
        refusals.append(describe_error(error))
    return {"train": train, "val": val}, refusals


def describe(split: str, dataset: CocoDataset) -> list[str]:
    """What is in it."""
    labels, boxes = dataset.annotations.labels, dataset.annotations.boxes
    counts = dataset.annotations.counts()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    small, large = int((areas < 32**2).sum()), int((areas >= 96**2).sum())
    lines = [
        f"{split}: {len(dataset)} images in {dataset.root}, {len(labels)} boxes of {len(dataset.categories)} classes",
        f"  boxes per image: {float(counts.float().mean()):.1f} on average, at most {int(counts.max())}; "
        f"{int((counts == 0).sum())} images without any",
        f"  box areas: {small} below 32 x 32 pixels, {len(areas) - small - large} between, {large} from 96 x 96",
    ]
    per_class = torch.bincount(labels, minlength=len(dataset.categories)).tolist()
    names = [" ".join(category.name.split()) for category in dataset.categories]
    named = [f"{name} {count}" for name, count in zip(names, per_class, strict=True)]
    return [*lines, f"  boxes of each class: {', '.join(named)}"]


def inspect_image(dataset: CocoDataset, index: int) -> list[tuple[str, str]]:
    """(finding, where) of one image file."""
    name = dataset.annotations.file_name(index)
    try:
        image, _, _, annotated = dataset.load(index)
        header = read_header(dataset.image_path(index))
    except UnreadableImageError as error:
        consequence = "skipped" if dataset.training else "its objects count as missed"
        return [(f"{UNREADABLE}, {consequence}", str(error))]
    findings = []
    if header.mode not in USUAL_MODES:
        findings.append((f"image in mode {header.mode}, converted to RGB", name))
    if header.frames > 1:
        findings.append(("animation, its first frame is used", name))
    if doubt := header.about_orientation(dataset.stated_size(index)):
        findings.append((doubt, name))
    if index in dataset.damaged:
        findings.append(
            ("image whose file ends too early, used as far as it goes", f"{name}: {dataset.damaged[index]}")
        )
    if tuple(image.shape[1:]) != annotated:
        findings.append(("image of another size than annotated, boxes scaled", name))
    return findings


def inspect_images(dataset: CocoDataset, processes: int) -> tuple[CleaningReport, bool]:
    """Decodes every image; what was found, and whether any can be read at all."""
    report = CleaningReport()
    inspect = partial(inspect_image, dataset)
    if processes > 1:
        with multiprocessing.Pool(processes, initializer=start_helper) as pool:
            results = pool.map(inspect, range(len(dataset)), chunksize=32)
    else:
        results = [inspect(index) for index in range(len(dataset))]
    for findings in results:
        for finding, where in findings:
            report.add(finding, where)
    readable = any(not findings or not findings[0][0].startswith(UNREADABLE) for findings in results)
    return report, readable


def draw_sample(sample: Sample, names: Sequence[str]) -> Image.Image:
    """A square cell: the image as the model gets it, its boxes and their classes."""
    picture = Image.fromarray(sample.image.permute(1, 2, 0).contiguous().numpy())
    scale = (CELL - MARGIN) / max(picture.size)
    picture = picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)))
    draw = ImageDraw.Draw(picture)
    size = torch.tensor([picture.width, picture.height] * 2)
    written = lettered(names)
    for box, label in zip((cxcywh_to_xyxy(sample.boxes) * size).tolist(), sample.labels.tolist(), strict=True):
        colour = PALETTE[label % len(PALETTE)]
        draw.rectangle(box, outline=colour)
        text, file = written[label]
        font = ImageFont.truetype(file, 11) if file else ImageFont.load_default()
        draw.text((box[0] + 2, box[1] + 1), text, font=font, fill=colour, stroke_width=1, stroke_fill="black")
    cell = Image.new("RGB", (CELL, CELL), "#303030")
    cell.paste(picture, (MARGIN // 2, MARGIN // 2))
    ImageDraw.Draw(cell).text((MARGIN, CELL - 16), f"image {sample.image_id}", fill="white")
    return cell


def draw_page(path: Path, datasets: dict[str, CocoDataset], samples: int) -> None:
    """Images from all over each split, augmented as configured, split after split."""
    cells = []
    for dataset in datasets.values():
        names = [category.name for category in dataset.categories]
        chosen = torch.linspace(0, len(dataset) - 1, min(samples, len(dataset))).round().int().tolist()
        loaded = [dataset[SampleKey(index, seed)].sample for seed, index in enumerate(chosen)]
        cells += [draw_sample(sample, names) for sample in loaded if sample is not None]
        cells += [Image.new("RGB", (CELL, CELL), "#303030")] * (-len(cells) % COLUMNS)
    page = Image.new("RGB", (COLUMNS * CELL, max(len(cells) // COLUMNS, 1) * CELL))
    for place, cell in enumerate(cells):
        page.paste(cell, (place % COLUMNS * CELL, place // COLUMNS * CELL))
    with replacing(path) as temporary:
        page.save(temporary, Image.registered_extensions()[path.suffix.lower()])


def check_page(path: Path, datasets: dict[str, CocoDataset]) -> None:
    """Refuses to write a page that is no picture by its name, or over a picture of the data set."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--page {path}: must end in .png, .jpg or .webp")
    for dataset in datasets.values() if path.exists() else ():
        paths = (dataset.image_path(index) for index in range(len(dataset)))
        if any(other.name == path.name and other.exists() and other.samefile(path) for other in paths):
            raise ValueError(f"--page {path}: is a picture of the data set; choose another name")


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0: usable (whatever was found), 2: training would refuse it."""
    options = parse_arguments(arguments)
    datasets, refusals = build_datasets(options)
    check_page(options.page, datasets)
    for split, dataset in datasets.items():
        print("\n".join(describe(split, dataset)))
        findings = dataset.report.lines()
        if not options.no_decode:
            report, readable = inspect_images(dataset, options.processes)
            findings = list(dict.fromkeys(findings + report.lines()))  # a sample of it was looked at already
            refusals += [] if readable else [f"{split}: not one of its images can be read"]
        print("\n".join(f"  {line}" for line in findings or ["nothing to complain about"]))
    if not options.no_decode:
        draw_page(options.page, datasets, options.samples)
        print(f"samples: {options.page}")
    for refusal in refusals:
        print(f"error: {refusal}", file=sys.stderr)
    return 2 if refusals else 0


if __name__ == "__main__":
    sys.exit(main())
