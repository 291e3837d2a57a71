"""What all formats are read into, and their text files."""

from __future__ import annotations

import codecs
import math
from pathlib import Path
from typing import NamedTuple


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
    source: Path = Path()
    """The label file, for messages."""


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 where it begins with the mark of it.

    Raises:
        ValueError: it is neither.
    """
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#04x} at place {error.start}"
        raise ValueError(f"{path}: not text in UTF-8 ({where}); save it as UTF-8") from error


def parse_number(text: str) -> float:
    """A finite decimal number.

    Raises:
        ValueError: it is none.
    """
    number = float(text)
    if not math.isfinite(number) or "_" in text:
        raise ValueError(f"{text!r} is not a number")
    return number
