"""Turn Pascal VOC XML or YOLO text annotations into one COCO JSON file.

    python -m tools.convert_annotations voc annotations/ --split train.txt --out instances_train.json
    python -m tools.convert_annotations yolo labels/ --images images/ --classes data.yaml --out instances_train.json

Every object is kept as it is, degenerate ones too: reading the result says what it drops. What cannot be understood is
an error that names the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from datasets.images import UnreadableImageError, read_size
from tools.predict import EXTENSIONS

Difficult = Literal["keep", "crowd", "drop"]


class LabelledBox(NamedTuple):
    """One object."""

    name: str
    box_xywh: tuple[float, float, float, float]
    """In pixels, from the top left corner of the top left pixel."""
    crowd: bool = False


class LabelledFile(NamedTuple):
    """One image and what is in it."""

    file_name: str
    height: int
    width: int
    boxes: list[LabelledBox]


def read_voc(
    directory: Path,
    split: Path | None = None,
    images: Path | None = None,
    first_pixel: int = 0,
    difficult: Difficult = "crowd",
) -> Iterator[LabelledFile]:
    """Pascal VOC: one XML file for each image.

    Args:
        directory: of the XML files.
        split: text file whose lines begin with the names to take, without ending, in their order; None takes all files.
        images: directory in which the image files are looked up; None trusts the names and sizes in the XML files.
        first_pixel: 1 for the original VOC, whose corners are numbers of pixels counted from 1, both included; 0 for
            labelling tools, whose corners are coordinates.
        difficult: what becomes of objects marked so: ordinary ones, ignored in evaluation ("crowd"), or nothing.

    Raises:
        ValueError: a file cannot be understood, or is missing.
    """
    if split is not None:
        lines = (line.split() for line in split.read_text(encoding="utf-8").splitlines())
        files = [directory / f"{words[0]}.xml" for words in lines if words]
    else:
        files = sorted(directory.glob("*.xml"))
    if not files:
        raise ValueError(
            f"{split or directory}: names no annotation files" if split else f"{directory}: has no .xml files"
        )
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
        except FileNotFoundError as error:
            raise ValueError(f"{file}: no such file, though {split} names it") from error
        except ElementTree.ParseError as error:
            raise ValueError(f"{file}: not valid XML ({error})") from error
        boxes = [
            _voc_box(file, node, first_pixel, marked and difficult == "crowd")
            for node in root.findall("object")
            if not ((marked := (node.findtext("difficult") or "0").strip() == "1") and difficult == "drop")
        ]
        name = (root.findtext("filename") or file.stem).strip()
        if images is not None:
            path = _find_image(images, Path(name), file)
            name = path.relative_to(images).as_posix()
            height, width = _image_size(path)
        else:
            height, width = (int(_number(file, root, f"size/{side}")) for side in ("height", "width"))
            if height < 1 or width < 1:
                raise ValueError(f"{file}: states no size of the image; give the images' folder with --images")
        yield LabelledFile(name, height, width, boxes)


def _voc_box(file: Path, node: ElementTree.Element, first_pixel: int, crowd: bool) -> LabelledBox:
    name = (node.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{file}: an object has no name")
    x0, y0, x1, y1 = (_number(file, node, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax"))
    # Pixel numbers from 1: pixel n covers n - 1 to n.
    return LabelledBox(name, (x0 - first_pixel, y0 - first_pixel, x1 - x0 + first_pixel, y1 - y0 + first_pixel), crowd)


def _number(file: Path, node: ElementTree.Element, path: str) -> float:
    text = node.findtext(path)
    try:
        return float(text or "")
    except ValueError as error:
        raise ValueError(f"{file}: {path} is {'missing' if text is None else f'{text!r}, not a number'}") from error


def _find_image(images: Path, name: Path, source: Path) -> Path:
    """The image that an annotation file names, or the one of its own name; labelling tools often leave stale names."""
    candidates = [images / name.name, *(images / f"{source.stem}{ending}" for ending in EXTENSIONS)]
    candidates += [candidate.with_suffix(candidate.suffix.upper()) for candidate in candidates]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ValueError(f"{source}: neither {name.name} nor another image named {source.stem} is in {images}")


def _image_size(path: Path) -> tuple[int, int]:
    try:
        return read_size(path)
    except UnreadableImageError as error:
        raise ValueError(str(error)) from error


def read_yolo(labels: Path, images: Path, classes: Sequence[str]) -> Iterator[LabelledFile]:
    """YOLO: for each image a text file of the same relative name, a line ``class cx cy w h`` for each object.

    All numbers but the class are relative to the image's size. A line with a polygon instead of a box (three points or
    more) gives the box around it. An image without a text file has no objects.

    Args:
        labels: directory of the text files.
        images: directory of the images.
        classes: names, indexed by class.

    Raises:
        ValueError: a line cannot be understood, or there are no images.
    """
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise ValueError(f"{images}: has no images")
    names = {path.relative_to(images).with_suffix(".txt") for path in paths}
    stray = sorted(file.relative_to(labels) for file in labels.rglob("*.txt") if file.relative_to(labels) not in names)
    stray = [name for name in stray if name.name not in ("classes.txt", "names.txt")]
    if stray:
        raise ValueError(f"{labels / stray[0]}: there is no image of this name in {images} ({len(stray)} such files)")
    for path in paths:
        height, width = _image_size(path)
        file = labels / path.relative_to(images).with_suffix(".txt")
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        boxes = [
            _yolo_box(f"{file}, line {number}", line.split(), classes, height, width)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
        yield LabelledFile(path.relative_to(images).as_posix(), height, width, boxes)


def _yolo_box(where: str, words: Sequence[str], classes: Sequence[str], height: int, width: int) -> LabelledBox:
    try:
        index, *numbers = int(words[0]), *map(float, words[1:])
    except ValueError as error:
        raise ValueError(f"{where}: expected a class and numbers, found {' '.join(words)[:60]!r}") from error
    if not 0 <= index < len(classes):
        raise ValueError(f"{where}: class {index}, but there are {len(classes)} names")
    if len(numbers) == 4:
        x, y, w, h = numbers
        left, top = x - w / 2, y - h / 2
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:
        left, top = min(numbers[::2]), min(numbers[1::2])
        w, h = max(numbers[::2]) - left, max(numbers[1::2]) - top
    else:
        raise ValueError(f"{where}: expected a class and 4 numbers or a polygon, found {len(numbers)} numbers")
    if max(map(abs, numbers)) > 2:
        raise ValueError(f"{where}: numbers must be relative to the image's size, found {max(map(abs, numbers)):g}")
    return LabelledBox(classes[index], (left * width, top * height, w * width, h * height))


def read_class_names(path: Path) -> list[str]:
    """Names in the order of their index: ``names`` of a YAML file (list or mapping), or the lines of a text file.

    Raises:
        ValueError: the file does not hold them.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() not in (".yaml", ".yml"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())[:100]})") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: has no 'names', a list or a mapping from 0, 1, 2, …")
    return [str(name) for name in names]


def to_coco(files: Sequence[LabelledFile], classes: Sequence[str] | None = None) -> dict[str, Any]:
    """The content of a COCO annotation file; ids of images, objects and categories count from 1.

    Args:
        files: in the order that the images get.
        classes: in the order that the categories get; None: all that occur, by name.

    Raises:
        ValueError: an object's class is not among ``classes``.
    """
    found = sorted({box.name for file in files for box in file.boxes})
    order = list(classes) if classes is not None else found
    unknown = [name for name in found if name not in order]
    if unknown:
        raise ValueError(f"objects of class {unknown[0]!r}, but the classes are {', '.join(order)}")
    annotations: list[dict[str, Any]] = []
    images = []
    for image_id, file in enumerate(files, 1):
        images.append({"id": image_id, "file_name": file.file_name, "width": file.width, "height": file.height})
        for box in file.boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": order.index(box.name) + 1,
                    "bbox": [round(value, 3) for value in box.box_xywh],
                    "area": round(box.box_xywh[2] * box.box_xywh[3], 3),
                    "iscrowd": int(box.crowd),
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(order, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.convert_annotations", description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    voc = kinds.add_parser("voc", help="Pascal VOC XML")
    voc.add_argument("labels", type=Path, help="folder of the XML files")
    voc.add_argument("--images", type=Path, help="folder of the images, if names or sizes in the XML are wrong")
    voc.add_argument("--split", type=Path, help="text file naming the images to take; without it all")
    voc.add_argument("--classes", type=Path, help="names in the order of their ids; without it sorted")
    voc.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: corners are pixel numbers from 1, as in VOC itself",
    )
    voc.add_argument("--difficult", choices=("keep", "crowd", "drop"), default="crowd", help="(%(default)s)")
    yolo = kinds.add_parser("yolo", help="YOLO text")
    yolo.add_argument("labels", type=Path, help="folder of the text files")
    yolo.add_argument("--images", type=Path, required=True, help="folder of the images")
    yolo.add_argument("--classes", type=Path, required=True, help="data.yaml, or a text file with a name a line")
    for kind in (voc, yolo):
        kind.add_argument("--out", type=Path, required=True, help="COCO JSON file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        if not options.labels.is_dir():
            raise ValueError(f"{options.labels}: no such folder")
        classes = None if options.classes is None else read_class_names(options.classes)
        if options.kind == "voc":
            files = list(
                read_voc(options.labels, options.split, options.images, options.first_pixel, options.difficult)
            )
        else:
            assert classes is not None
            files = list(read_yolo(options.labels, options.images, classes))
        content = to_coco(files, classes)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    flat = sum(min(box.box_xywh[2:]) <= 0 for file in files for box in file.boxes)
    print(
        f"{len(content['images'])} images, {len(content['annotations'])} objects, {len(content['categories'])} classes"
        f"{f', {flat} of the objects without area' if flat else ''}: {options.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
