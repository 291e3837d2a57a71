"""Find objects in image files: annotated pictures, and all detections as COCO results.

    python -m tools.predict --resume runs/k3/checkpoint_best.pth photo.jpg folder/ --threshold 0.4 --out found

``found/`` then holds each picture with its boxes, and ``detections.json``: a list of COCO results (image_id,
category_id, bbox as x, y, width, height in pixels, score) with the file's name added. Pixels are taken as stored: EXIF
orientation is ignored, as in COCO. Files that cannot be read are named and skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets.image_files import EXTENSIONS, image_files
from datasets.images import UnreadableImageError
from engine.lettering import lettered
from engine.pictures import COLOURS
from engine.whole_files import replacing
from ops.coco_columns import is_integer, whole_number
from ops.coco_file import read_coco_file
from structures import Detections
from tools import console
from tools.detector import Detector, to_pixels

RESULTS = "detections.json"


class Source(NamedTuple):
    """An image file to look at."""

    path: Path
    name: Path
    """Relative name: within the folder that was given, or the file's own."""


def find_images(paths: Sequence[Path], out: Path) -> list[Source]:
    """The files among ``paths`` and the images in the folders among them and below, in the order of their names.

    What lies in ``out`` below a folder is left out: it may be of an earlier call.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image at all.
        ValueError: an image that was asked for lies in ``out``, or would be written over there.
    """
    sources = []
    out = out.resolve()
    for path in paths:
        if path.is_dir():
            files, others = image_files(path)
            if others:
                print(f"{path}: {others} files left out that are no pictures by their endings", file=sys.stderr)
            own = not path.resolve().is_relative_to(out)
            sources += [
                Source(file, file.relative_to(path))
                for file in files
                if not (own and file.parent.resolve().is_relative_to(out))
            ]
        elif path.exists():
            sources.append(Source(path, Path(path.name)))
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    for source in sources:
        if source.path.resolve().is_relative_to(out) or source.path.parent.resolve().is_relative_to(out):
            raise ValueError(f"{source.path} lies in the folder to write to, {out}: choose another one with --out")
    if not sources:
        raise FileNotFoundError(f"no image in {', '.join(map(str, paths))} (known endings: {' '.join(EXTENSIONS)})")
    return sources


def draw(pixels: Tensor, detections: Detections, class_names: Sequence[str]) -> Image.Image:
    """The picture with boxes, class names and scores, the best on top.

    Args:
        pixels: [3, H, W] uint8 RGB.
        detections: in its pixels.
        class_names: indexed by label.
    """
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    canvas = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 400))
    size = max(11, round(max(picture.size) / 60))
    names = lettered(class_names)
    files = {name.font for name in names}
    fonts = {file: ImageFont.truetype(file, size) if file else ImageFont.load_default(size) for file in files}
    worst_first = list(reversed(list(zip(*(part.tolist() for part in detections), strict=True))))
    for _, label, box in worst_first:
        canvas.rectangle(box, outline=COLOURS[label % len(COLOURS)], width=width)
    # Texts after all boxes, so that no line crosses them.
    for score, label, box in worst_first:
        text, font = f"{names[label].text} {score:.2f}", fonts[names[label].font]
        left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
        # Above the box where there is room, else inside it, and never beyond the right border.
        x = max(0, min(box[0], picture.width - right - 2))
        y = box[1] - bottom - 2 if box[1] >= bottom + 2 else box[1] + width
        canvas.rectangle((x + left, y + top - 1, x + right + 2, y + bottom + 1), fill=COLOURS[label % len(COLOURS)])
        canvas.text((x + 1, y), text, fill="black", font=font)
    return picture


def coco_results(
    detections: Detections, image_id: int, file_name: str, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The entries of one image."""
    results = []
    for score, label, (x0, y0, x1, y1) in zip(*(part.tolist() for part in detections), strict=True):
        box = [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)]
        entry = {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": round(score, 5)}
        results.append({**entry, "file_name": file_name})
    return results


def image_numbers(sources: Sequence[Source], annotations: Path | None) -> list[int]:
    """The id of each image: that of the annotation file, or its place in the order, from 1 on.

    Raises:
        ValueError: the annotation file does not list one of the images, or lists one twice.
    """
    if annotations is None:
        return list(range(1, len(sources) + 1))
    listed: dict[str, list[int]] = defaultdict(list)
    for image in read_coco_file(annotations).images:
        if is_integer(number := whole_number(image.id)):
            listed[str(image.file_name)].append(number)
    missing = [source.name for source in sources if len(set(listed[source.name.as_posix()])) != 1]
    if missing:
        raise ValueError(f"{annotations} does not list {len(missing)} of the images once, the first is {missing[0]}")
    return [listed[source.name.as_posix()][0] for source in sources]


class Progress:
    """A bar on the terminal; nothing where stderr is a file."""

    def __init__(self, total: int) -> None:
        self.total, self.start = total, time.monotonic()
        self.visible = sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Redraw after ``done`` images."""
        if not self.visible:
            return
        elapsed = time.monotonic() - self.start
        filled = round(30 * done / self.total)
        rate = f"{done / elapsed:.1f} images/s" if elapsed > 0 else ""
        end = "\n" if done >= self.total else ""
        print(
            f"\r[{'█' * filled}{' ' * (30 - filled)}] {done}/{self.total} {rate} ", end=end, file=sys.stderr, flush=True
        )


def predict_files(
    detector: Detector, sources: Sequence[Source], threshold: float, progress: Progress
) -> Iterator[tuple[int, Tensor | None, Detections | str]]:
    """(index, pixels, detections) of each file in order; (index, None, reason) where it cannot be read."""
    for start in range(0, len(sources), detector.batch_size):
        readable: list[tuple[int, Tensor]] = []
        results: dict[int, tuple[Tensor | None, Detections | str]] = {}
        for index in range(start, min(start + detector.batch_size, len(sources))):
            try:
                readable.append((index, to_pixels(sources[index].path)))
            except UnreadableImageError as error:
                results[index] = (None, str(error))
        found = detector([pixels for _, pixels in readable], threshold)
        results.update((index, (pixels, f)) for (index, pixels), f in zip(readable, found, strict=True))
        for index in sorted(results):
            yield index, *results[index]
        progress.show(min(start + detector.batch_size, len(sources)))


def output_path(out: Path, name: Path, taken: set[Path]) -> Path:
    """A name in ``out`` that nothing else in ``taken`` has; PNG where the format is not one to write."""
    suffix = name.suffix if name.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp") else ".png"
    candidate, number = out / name.with_suffix(suffix), 1
    while candidate in taken:
        number += 1
        candidate = out / name.with_name(f"{name.stem}_{number}{suffix}")
    taken.add(candidate)
    return candidate


def run(options: argparse.Namespace) -> int:
    """The command with its options; returns the exit code."""
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold must lie in [0, 1], got {options.threshold}")
    sources = find_images(options.images, options.out)
    ids = image_numbers(sources, options.annotations)
    detector = Detector(options.resume, device=options.device, batch_size=options.batch_size, overrides=options.set)
    category_ids = [category.id for category in detector.categories]
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    # Without the file that says what was found these pictures are not of an earlier call.
    earlier = (options.out / RESULTS).exists()
    taken: set[Path] = set() if earlier else {path for path in options.out.rglob("*") if path.is_file()}
    for index, pixels, found in predict_files(detector, sources, options.threshold, Progress(len(sources))):
        if pixels is None or isinstance(found, str):
            skipped.append(str(found))
            continue
        name = sources[index].name
        results += coco_results(found, ids[index], name.as_posix(), category_ids)
        if not options.no_pictures:
            target = output_path(options.out, name, taken)
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:  # where a link stands, not what it points to is replaced
                draw(pixels, found, detector.class_names).save(
                    temporary, Image.registered_extensions()[target.suffix.lower()]
                )
    for reason in skipped:
        print(f"skipped {reason}", file=sys.stderr)
    if len(skipped) == len(sources):
        raise ValueError(f"none of the {len(sources)} files can be read as an image")
    with replacing(options.out / RESULTS) as temporary:
        temporary.write_text(json.dumps(results), encoding="utf-8")
    print(
        f"{len(results)} detections of score {options.threshold:g} or more in {len(sources) - len(skipped)} images"
        f"{f', {len(skipped)} files skipped' if skipped else ''}: {options.out}"
    )
    return 0


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = console.parser("predict", __doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--resume", type=Path, required=True, help="checkpoint")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write to (%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="most images at once (%(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:0; by default the GPU where there is one")
    parser.add_argument("--annotations", type=Path, help="COCO file that gives the images their ids, by file name")
    parser.add_argument("--no-pictures", action="store_true", help="write detections.json only")
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value", help="configuration override")
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
