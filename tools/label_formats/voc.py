"""Pascal VOC: one XML file for each image."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

from datasets.annotations import CleaningReport
from datasets.image_files import EXTENSIONS, image_files
from datasets.images import read_header
from ops.coco_columns import CROWD_UNCLEAR, read_flag
from ops.errors import describe_error
from tools.label_formats.labels import LabelledBox, LabelledFile, parse_number, read_text

Difficult = Literal["keep", "crowd", "drop"]

_ENCODING = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""")


def read_voc(
    directory: Path,
    split: Path | None = None,
    images: Path | None = None,
    first_pixel: int = 0,
    difficult: Difficult = "crowd",
    report: CleaningReport | None = None,
) -> Iterator[LabelledFile]:
    """Reads a folder of XML files.

    Args:
        directory: of the XML files.
        split: text file whose lines are, or begin with, the names to take, with or without an ending and a folder, in
            their order; None takes all files.
        images: folder in and below which the image files are looked up; None trusts names and sizes in the XML files.
        first_pixel: 1 for the original VOC, whose corners are numbers of pixels counted from 1, both included; 0 for
            labelling tools, whose corners are coordinates.
        difficult: what becomes of objects marked so: ordinary ones, ignored in evaluation ("crowd"), or nothing.
        report: gets what is doubtful.

    Raises:
        ValueError: a file cannot be understood, or is missing.
    """
    report = CleaningReport() if report is None else report
    present = [path for path in directory.iterdir() if path.suffix.lower() == ".xml" and not path.name.startswith(".")]
    files = sorted(present) if split is None else _chosen({path.stem: path for path in present}, split, directory)
    if not files:
        raise ValueError(
            f"{split or directory}: names no annotation files" if split else f"{directory}: has no .xml files"
        )
    index = None if images is None else _ImageIndex(images)
    for file in files:
        root = _parse(file)
        boxes = list(_boxes(file, root, first_pixel, difficult))
        name = (root.findtext("filename") or "").strip()
        size = _stated_size(root)
        if index is not None:
            path = index.find(name, file, report)
            yield LabelledFile(index.name(path), *_true_size(path, size, report), boxes, file)
            continue
        if PurePosixPath(name).suffix.lower() not in EXTENSIONS:
            raise ValueError(
                f"{file}: its <filename> is {name!r}, which is no picture's; give the images' folder with --images"
            )
        if "\\" in name or name.startswith("/"):
            name = PureWindowsPath(name).name
        if size is None:
            raise ValueError(f"{file}: states no size of the image; give the images' folder with --images")
        if PurePosixPath(name).stem != file.stem:
            report.add("XML file that names another picture than its own, taken as it says", f"{file.name}: {name}")
        yield LabelledFile(name, *size, boxes, file)


def _chosen(present: dict[str, Path], split: Path, directory: Path) -> list[Path]:
    chosen = []
    for line in read_text(split).splitlines():
        if not line.strip():
            continue
        stated = [PureWindowsPath(text).name for text in (line.strip(), line.split()[0])]
        names = [*stated, *(PurePosixPath(name).stem for name in stated)]
        file = next((present[name] for name in names if name in present), None)
        if file is None:
            raise ValueError(f"{directory / stated[1]}.xml: no such file, though {split} names it")
        chosen.append(file)
    return chosen


def _parse(file: Path) -> ElementTree.Element:
    """The root, whatever encoding the file states: expat itself knows but a few."""
    data = file.read_bytes()
    stated = _ENCODING.match(data)
    try:
        if stated and stated[1].lower() not in (b"utf-8", b"utf-16"):
            return ElementTree.fromstring(data[stated.end() :].decode(stated[1].decode()))
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        reason = describe_error(error)[:100]
        raise ValueError(f"{file}: not valid XML in UTF-8 or the encoding that it states ({reason})") from error


def _boxes(file: Path, root: ElementTree.Element, first_pixel: int, difficult: Difficult) -> Iterator[LabelledBox]:
    for node in root.findall("object"):
        text = (node.findtext("difficult") or "0").strip()
        flag, oddity = read_flag("0" if text.lower() == "unspecified" else text)
        if oddity == CROWD_UNCLEAR:
            raise ValueError(f"{file}: <difficult> is {text!r}, neither 0 nor 1")
        if flag and difficult == "drop":
            continue
        name = (node.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{file}: an object has no name")
        x0, y0, x1, y1 = (_number(file, node, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax"))
        # Pixel numbers from 1: pixel n covers n - 1 to n.
        box = (x0 - first_pixel, y0 - first_pixel, x1 - x0 + first_pixel, y1 - y0 + first_pixel)
        yield LabelledBox(name, box, bool(flag) and difficult == "crowd")


def _number(file: Path, node: ElementTree.Element, path: str) -> float:
    text = node.findtext(path)
    try:
        return parse_number(text or "")
    except ValueError as error:
        raise ValueError(f"{file}: {path} is {'missing' if text is None else f'{text!r:.40}, not a number'}") from error


def _stated_size(root: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width), or None where they are missing or no sizes."""
    try:
        height, width = (int(parse_number(root.findtext(f"size/{side}") or "")) for side in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if min(height, width) >= 1 else None


class _ImageIndex:
    """The images in and below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in image_files(folder)[0]:
            self.by_stem[path.stem].append(path)

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def find(self, stated: str, source: Path, report: CleaningReport) -> Path:
        """The image that an XML file belongs to: that of its own name first, as labelling tools leave stale names."""
        plain = PurePosixPath(stated.replace("\\", "/"))
        for stem in dict.fromkeys((source.stem, plain.stem)):
            found = self.by_stem.get(stem, [])
            exact = [path for path in found if path.name.lower() == plain.name.lower()] or found
            exact = [path for path in exact if self.name(path) == str(plain)] or exact
            if len(exact) > 1:
                names = " and ".join(self.name(path) for path in exact[:2])
                raise ValueError(f"{source}: {names} in {self.folder} could both be its picture; leave one of them")
            if exact:
                if plain.name and exact[0].stem != plain.stem:
                    report.add(
                        "XML file that names another picture, that of its own name taken", f"{source.name}: {plain}"
                    )
                return exact[0]
        stated = plain.name or "its <filename>"
        raise ValueError(f"{source}: neither {stated} nor another image named {source.stem} is in {self.folder}")


def _true_size(path: Path, stated: tuple[int, int] | None, report: CleaningReport) -> tuple[int, int]:
    """(height, width) that the boxes refer to: of the pixels as stored, or turned upright where the XML says so."""
    header = read_header(path)
    stored = (header.height, header.width)
    upright = stored[::-1] if header.orientation >= 5 else stored
    if stated == upright != stored:
        report.add("picture annotated upright, to be turned by its EXIF orientation", path.name)
        return upright
    if stated not in (None, stored):
        report.add("XML file that states another size than its picture has, which is taken", path.name)
    if header.orientation > 1 and (stored == upright or stated is None):
        report.add("picture to be turned by its EXIF orientation, boxes taken as drawn on it unturned", path.name)
    return stored
