"""Find objects in images and videos: draw them, and write all detections as COCO results.

    python -m tools.predict --resume runs/k3/checkpoint_best.pth photo.jpg folder/ --threshold 0.4 --out found
    python -m tools.predict --resume runs/k3/checkpoint_best.pth street.mp4 --tile 640 --flip --also csv
    python -m tools.predict --resume runs/k3/checkpoint_best.pth frames/ --video 25

``found/`` then holds each picture (or video) with its boxes, and ``detections.json``: a list of COCO results (image_id,
category_id, bbox as x, y, width, height in pixels, score) with the file's name added. Pixels are taken as stored: EXIF
orientation is ignored, as in COCO. Files that cannot be read are named and skipped. The frames of a video have its
name, and their number, from 0 on, under 'frame'. With --video the pictures of a folder are written as one MP4 of its
name, in the order of the numbers in their names.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets.image_files import EXTENSIONS, image_files
from datasets.images import UnreadableImageError
from ops.coco_columns import is_integer, whole_number
from ops.coco_file import read_coco_file
from structures import Detections
from tools import console
from tools.detection_files import Output
from tools.predictor import Predictor, to_pixels
from tools.video import ENDINGS, open_video, write_video
from tools.views import Views


class Source(NamedTuple):
    """An image file to look at."""

    path: Path
    name: Path
    """Relative name: within the folder that was given, or the file's own."""

    @property
    def video(self) -> Path:
        """Name of the video that the pictures of its folder make."""
        folder = self.name.parent.name or self.path.parent.resolve().name or "video"
        return self.name.parent.with_name(f"{folder}.mp4") if self.name.parent.name else Path(f"{folder}.mp4")

    @property
    def place(self) -> tuple[Path, list[int | str]]:
        """By which pictures are sorted for a video: the folder, and the name with its numbers as such."""
        parts = re.split(r"([0-9]+)", self.path.name)
        return self.path.parent, [int(part) if index % 2 else part for index, part in enumerate(parts)]


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
            if not path.resolve().is_relative_to(out):
                files, others = (
                    [file for file in found if not file.parent.resolve().is_relative_to(out)]
                    for found in (files, others)
                )
            if others:
                print(f"{path}: {len(others)} files left out that are no pictures by their endings", file=sys.stderr)
            sources += [Source(file, file.relative_to(path)) for file in files]
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
    predictor: Predictor, sources: Sequence[Source], threshold: float, progress: Progress, views: Views
) -> Iterator[tuple[int, Tensor | None, Detections | str]]:
    """(index, pixels, detections) of each file in order; (index, None, reason) where it cannot be read."""
    for start in range(0, len(sources), predictor.batch_size):
        readable: list[tuple[int, Tensor]] = []
        results: dict[int, tuple[Tensor | None, Detections | str]] = {}
        for index in range(start, min(start + predictor.batch_size, len(sources))):
            try:
                readable.append((index, to_pixels(sources[index].path)))
            except UnreadableImageError as error:
                results[index] = (None, str(error))
        found = views(predictor, [pixels for _, pixels in readable], threshold)
        results.update((index, (pixels, f)) for (index, pixels), f in zip(readable, found, strict=True))
        for index in sorted(results):
            yield index, *results[index]
        progress.show(min(start + predictor.batch_size, len(sources)))


def predict_pictures(
    predictor: Predictor,
    sources: Sequence[Source],
    ids: Sequence[int],
    rate: float | None,
    views: Views,
    output: Output,
) -> list[str]:
    """Find objects in image files and write them, each picture or, at a ``rate`` of frames a second, one video.

    Returns:
        Why files were skipped.
    """
    skipped: list[str] = []
    with ExitStack() as files:
        writer = None
        for index, pixels, found in predict_files(predictor, sources, output.threshold, Progress(len(sources)), views):
            if pixels is None or isinstance(found, str):
                skipped.append(str(found))
                continue
            if writer is None and rate is not None and output.pictures:
                path = output.target(sources[index].video, ".mp4")
                writer = files.enter_context(write_video(path, Fraction(rate).limit_denominator(1001)))
            output.add(found, pixels, ids[index], sources[index].name, writer=writer)
    return skipped


def predict_video(predictor: Predictor, source: Source, first_id: int, views: Views, output: Output) -> int:
    """Find objects in every frame, write the video with them, and return the number of frames.

    Raises:
        ValueError: it cannot be read; what was found before that is kept.
    """
    count = 0
    with open_video(source.path) as video, ExitStack() as files:
        progress = Progress(max(video.length, 1))
        writer = None
        if output.pictures:
            writer = files.enter_context(write_video(output.target(source.name, ".mp4"), video.rate))
        for frames in batched(video, predictor.batch_size):
            for pixels, found in zip(frames, views(predictor, frames, output.threshold), strict=True):
                output.add(found, pixels, first_id + count, source.name, frame=count, writer=writer)
                count += 1
            progress.show(min(count, progress.total))
    return count


def batched(frames: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Lists of so many in a row, the last perhaps of fewer."""
    iterator = iter(frames)
    while batch := list(islice(iterator, size)):
        yield batch


def run(options: argparse.Namespace) -> int:
    """The command with its options; returns the exit code."""
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold must lie in [0, 1], got {options.threshold}")
    if options.video is not None and not 0 < options.video <= 1000:
        raise ValueError(f"--video must lie in (0, 1000] frames a second, got {options.video}")
    views = Views(tile=options.tile, overlap=options.overlap, flip=options.flip, scales=tuple(options.scales))
    sources = find_images(options.images, options.out)
    videos = [source for source in sources if source.path.suffix.lower() in ENDINGS]
    sources = [source for source in sources if source not in videos]
    if options.video is not None:
        sources.sort(key=lambda source: source.place)
    ids = image_numbers(sources, options.annotations)
    predictor = Predictor(options.resume, device=options.device, batch_size=options.batch_size, overrides=options.set)
    if predictor.remark is not None:
        print(predictor.remark, file=sys.stderr)
    output = Output(options, predictor)
    skipped: list[str] = []
    start = 0
    for _, group in groupby(sources, lambda source: options.video and source.path.parent):
        members = list(group)
        own_ids = ids[start : start + len(members)]
        skipped += predict_pictures(predictor, members, own_ids, options.video, views, output)
        start += len(members)
    images = len(sources) - len(skipped)
    next_id = max(ids, default=0) + 1
    for video in videos:
        try:
            frames = predict_video(predictor, video, next_id, views, output)
            next_id, images = next_id + frames, images + frames
        except ValueError as error:
            skipped.append(str(error))
            next_id = max([next_id, *(entry["image_id"] + 1 for entry in output.results)])
    for reason in skipped:
        print(f"skipped {reason}", file=sys.stderr)
    if not images:
        raise ValueError(f"none of the {len(sources) + len(videos)} files can be read as an image or video")
    output.close()
    print(
        f"{len(output.results)} detections of score {options.threshold:g} or more in {images} images"
        f"{f', {len(skipped)} files skipped' if skipped else ''}: {options.out}"
    )
    return 0


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = console.parser("predict", __doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_FOLDER_OR_VIDEO", help="what to look at")
    parser.add_argument("--resume", type=Path, required=True, help="checkpoint, or weights as safetensors")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write to (%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score of a detection (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="most images at once (%(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:0; by default the GPU where there is one")
    parser.add_argument("--annotations", type=Path, help="COCO file that gives the images their ids, by file name")
    parser.add_argument("--no-pictures", action="store_true", help="write no pictures and videos")
    parser.add_argument("--video", type=float, metavar="FPS", help="write the pictures of a folder as one video")
    parser.add_argument(
        "--also", nargs="*", choices=("csv", "yolo"), default=[], help="formats to write beside detections.json"
    )
    parser.add_argument("--tile", type=int, help="look at square tiles of so many pixels as well")
    parser.add_argument("--overlap", type=float, default=0.2, help="share of a tile in the next one (%(default)s)")
    parser.add_argument("--flip", action="store_true", help="look at everything mirrored as well, and merge")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="look at these sizes, and merge (1)")
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value", help="configuration override")
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
