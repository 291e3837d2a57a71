"""Turn Pascal VOC XML or YOLO text annotations into one COCO JSON file.

    python -m tools.convert_annotations voc annotations/ --split train.txt --out instances_train.json
    python -m tools.convert_annotations yolo labels/ --images images/ --classes data.yaml --out instances_train.json

Every object is kept as it is, degenerate ones too. What is doubtful is reported, and so is what training will drop.
What cannot be understood is an error that names the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets.annotations import CleaningReport, pack_annotations, read_categories
from engine.whole_files import replacing
from ops.coco_file import from_content
from tools import console
from tools.label_formats.class_names import read_class_names
from tools.label_formats.labels import LabelledFile
from tools.label_formats.voc import read_voc
from tools.label_formats.yolo import read_yolo

INFO = {"description": "converted by tools.convert_annotations"}
_HEAD = json.dumps({"info": INFO}).encode()[:-1]
"""By which a file that may be replaced is known."""


def to_coco(files: Sequence[LabelledFile], classes: Sequence[str] | None = None) -> dict[str, Any]:
    """The content of a COCO annotation file; ids of images, objects and categories count from 1.

    Args:
        files: in the order that the images get.
        classes: in the order that the categories get; None: all that occur, by name.

    Raises:
        ValueError: an object's class is not among ``classes``, or two files describe one image.
    """
    sources: dict[str, Path] = {}
    for file in files:
        if file.file_name in sources:
            raise ValueError(
                f"{sources[file.file_name]} and {file.source} both describe {file.file_name}: where names in XML are "
                "stale, give the images' folder with --images; else leave one of them"
            )
        sources[file.file_name] = file.source
    found = sorted({box.name for file in files for box in file.boxes})
    order = list(classes) if classes is not None else found
    number_of = {name: number for number, name in enumerate(order, 1)}
    unknown = [name for name in found if name not in number_of]
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
                    "category_id": number_of[box.name],
                    "bbox": [round(value, 3) for value in box.box_xywh],
                    "area": round(box.box_xywh[2] * box.box_xywh[3], 3),
                    "iscrowd": int(box.crowd),
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(order, 1)]
    return {"info": INFO, "images": images, "annotations": annotations, "categories": categories}


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("convert_annotations", __doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    voc = kinds.add_parser("voc", help="Pascal VOC XML")
    voc.add_argument("labels", type=Path, help="folder of the XML files")
    voc.add_argument("--images", type=Path, help="folder of the images; if names or sizes in the XML are wrong")
    voc.add_argument("--split", type=Path, help="text file that names the images to take (default: all)")
    voc.add_argument("--classes", type=Path, help="names in the order of their ids (default: sorted)")
    voc.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: corners are pixel numbers from 1, as in VOC itself",
    )
    voc.add_argument(
        "--difficult",
        choices=("keep", "crowd", "drop"),
        default="crowd",
        help="what becomes of difficult objects (%(default)s)",
    )
    yolo = kinds.add_parser("yolo", help="YOLO text")
    yolo.add_argument("labels", type=Path, help="folder of the text files")
    yolo.add_argument("--images", type=Path, required=True, help="folder of the images")
    yolo.add_argument("--classes", type=Path, required=True, help="data.yaml, or a text file with a name a line")
    yolo.add_argument("--polygons", action="store_true", help="longer lines are polygons, not boxes with keypoints")
    for kind in (voc, yolo):
        kind.add_argument("--out", type=Path, required=True, help="COCO JSON file to write")
    return parser


def _read(options: argparse.Namespace, report: CleaningReport) -> tuple[list[LabelledFile], list[str] | None]:
    """(label files, names of the classes in order, if they are given)."""
    if not options.labels.is_dir():
        raise ValueError(f"{options.labels}: no such folder")
    if options.out.suffix.lower() != ".json":
        raise ValueError(f"--out {options.out}: must end in .json")
    if options.out.exists():
        with options.out.open("rb") as former:
            if former.read(len(_HEAD)) not in (b"", _HEAD):
                raise ValueError(f"--out {options.out}: is there already; remove it, or choose another name")
    given = None if options.classes is None else read_class_names(options.classes)
    if options.kind == "voc":
        read = read_voc(options.labels, options.split, options.images, options.first_pixel, options.difficult, report)
        return list(read), None if given is None else given.names
    assert given is not None
    files = read_yolo(options.labels, options.images, given.names, given.keypoints, options.polygons, report)
    return files, given.names


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    report = CleaningReport()
    files, classes = _read(options, report)
    content = to_coco(files, classes)
    # What training would say of the result, of which there is no file yet.
    file = from_content(content, options.labels)
    _, reading = pack_annotations(file, options.labels, read_categories(file, options.labels))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
    counts = ", ".join(f"{len(content[key])} {key}" for key in ("images", "annotations", "categories"))
    print(f"{counts}: {options.out}")
    for line in report.lines() + reading.lines():
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
