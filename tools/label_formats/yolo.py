"""YOLO: one text file for each image, a line for each object, numbers relative to the image's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets.annotations import CleaningReport
from datasets.image_files import files_below, image_files
from datasets.images import Header, read_header
from tools.label_formats.labels import LabelledBox, LabelledFile, parse_number, read_text

Box = tuple[float, float, float, float]


def read_yolo(
    labels: Path,
    images: Path,
    classes: Sequence[str],
    keypoints: tuple[int, int] | None = None,
    polygons: bool = False,
    report: CleaningReport | None = None,
) -> list[LabelledFile]:
    """Reads, for each image, a text file of the same relative name with a line ``class cx cy w h`` for each object.

    All numbers but the class are relative to the size of the upright image, as labelling tools show it. A line with a
    polygon instead of a box (three points or more) gives the box around it, one with keypoints behind its box the box.
    An image without a text file has no objects.

    Args:
        labels: folder of the text files.
        images: folder of the images.
        classes: names, indexed by class.
        keypoints: (points, numbers of a point) behind a box; None if there are none.
        polygons: whether longer lines are polygons even if they could be boxes with keypoints.
        report: gets what is doubtful.

    Raises:
        ValueError: a line cannot be understood, or there are no images.
    """
    report = CleaningReport() if report is None else report
    paths, _ = image_files(images)
    if not paths:
        raise ValueError(f"{images}: has no images")
    names: dict[Path, Path] = {}
    for path in paths:
        name = path.relative_to(images).with_suffix(".txt")
        if name in names:
            raise ValueError(
                f"{path}: {names[name].name} beside it would have the same labels, {name}; leave one of them"
            )
        names[name] = path
    _check_strays(labels, images, names, report)
    found: list[tuple[Path, Path, list[tuple[str, list[float]]]]] = []
    for name, path in names.items():
        file = labels / name
        lines = read_text(file).splitlines() if file.is_file() else []
        words = [(f"{file}, line {number}", line.split()) for number, line in enumerate(lines, 1) if line.strip()]
        found.append((path, file, [(where, _numbers(where, own, len(classes))) for where, own in words]))
    longer = [row for _, _, rows in found for row in rows if len(row[1]) > 5]
    if longer and keypoints is None and not polygons and _may_be_poses([numbers[1:] for _, numbers in longer]):
        raise ValueError(
            f"{longer[0][0]}: this line, as all longer ones, may be a polygon or a box with keypoints: for keypoints "
            "write kpt_shape: [points, 2 or 3] into the file of --classes, for polygons say --polygons"
        )
    files = []
    for path, file, rows in found:
        header = read_header(path)
        if header.orientation > 1:
            report.add("picture turned by its EXIF orientation, boxes taken as drawn on it upright", path.name)
        boxes = [(classes[int(numbers[0])], _box(where, numbers[1:], keypoints)) for where, numbers in rows]
        height, width, placed = _placed(header, [box for _, box in boxes])
        labelled = [
            LabelledBox(name, (x * width, y * height, w * width, h * height))
            for (name, _), (x, y, w, h) in zip(boxes, placed, strict=True)
        ]
        files.append(LabelledFile(path.relative_to(images).as_posix(), height, width, labelled, file))
    return files


def _check_strays(labels: Path, images: Path, names: dict[Path, Path], report: CleaningReport) -> None:
    """Label files without an image are an error, other texts are left out."""
    strays = []
    for file in files_below(labels):
        name = file.relative_to(labels)
        if name.suffix != ".txt" or name in names:
            continue
        if name.name not in ("classes.txt", "names.txt") and _holds_labels(file):
            strays.append(file)
        else:
            report.add("text file that belongs to no image, left out", str(name))
    if strays:
        raise ValueError(f"{strays[0]}: there is no image of this name in {images} ({len(strays)} such files)")


def _holds_labels(file: Path) -> bool:
    """Whether its first line is one of numbers, or there is none."""
    try:
        numbers = [parse_number(word) for word in read_text(file).strip().split("\n")[0].split()]
    except ValueError:
        return False
    return len(numbers) == 0 or len(numbers) >= 5


def _numbers(where: str, words: Sequence[str], classes: int) -> list[float]:
    try:
        numbers = [parse_number(word) for word in words]
        if numbers[0] != int(numbers[0]):
            raise ValueError("a class is a whole number")
    except ValueError as error:
        raise ValueError(f"{where}: expected a class and numbers, found {' '.join(words)[:60]!r}") from error
    if not 0 <= numbers[0] < classes:
        raise ValueError(f"{where}: class {numbers[0]:g}, but there are {classes} names")
    if max(map(abs, numbers[1:]), default=0) > 2:
        raise ValueError(f"{where}: numbers must be relative to the image's size, found {max(map(abs, numbers[1:])):g}")
    return numbers


def _may_be_poses(rows: Sequence[Sequence[float]]) -> bool:
    """Whether all rows have one length, and their numbers could be a box and points in it each."""
    return len({len(row) for row in rows}) == 1 and any(all(_is_pose(row, n) for row in rows) for n in (2, 3))


def _is_pose(row: Sequence[float], numbers: int) -> bool:
    x, y, w, h, *rest = row
    if len(rest) % numbers or (numbers == 3 and not set(rest[2::3]) <= {0.0, 1.0, 2.0}):
        return False
    points = [point for point in zip(rest[::numbers], rest[1::numbers], strict=True) if point != (0.0, 0.0)]
    return all(abs(px - x) <= 0.55 * w + 0.01 and abs(py - y) <= 0.55 * h + 0.01 for px, py in points)


def _box(where: str, numbers: Sequence[float], keypoints: tuple[int, int] | None) -> Box:
    """x, y, width and height, relative."""
    count = len(numbers)
    if count == 4 or (keypoints is not None and count == 4 + keypoints[0] * keypoints[1]):
        x, y, w, h = numbers[:4]
        return x - w / 2, y - h / 2, w, h
    if keypoints is None and count >= 6 and count % 2 == 0:
        left, top = min(numbers[::2]), min(numbers[1::2])
        return left, top, max(numbers[::2]) - left, max(numbers[1::2]) - top
    wanted = "a polygon" if keypoints is None else f"{keypoints[0]} keypoints of {keypoints[1]} behind them"
    raise ValueError(f"{where}: expected a class and 4 numbers or {wanted}, found {count} numbers")


def _placed(header: Header, boxes: Sequence[Box]) -> tuple[int, int, list[Box]]:
    """(height, width, boxes) such that data sets read the boxes on the right pixels.

    Data sets turn a picture upright where the stated size is the upright one. Where both sizes are equal, they take the
    pixels as stored, so that the boxes have to be turned instead.
    """
    height, width, turn = header.height, header.width, header.orientation
    if turn >= 5 and height != width:
        return width, height, list(boxes)
    turned = []
    for x, y, w, h in boxes:
        if turn in (2, 3, 6, 7):
            x = 1 - x - w
        if turn in (3, 4, 7, 8):
            y = 1 - y - h
        turned.append((y, x, h, w) if turn >= 5 else (x, y, w, h))
    return height, width, turned
