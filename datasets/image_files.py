"""Image files in folders: which are there, and why a name is not."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote

from PIL import Image

from datasets.images import FORMATS

_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")


def _endings() -> tuple[str, ...]:
    return tuple(sorted(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS))


_PREFIX = re.compile(r"^[0-9a-f]{8}-")
EXTENSIONS = _endings()
"""Endings, in small letters, of the files that are taken from a folder: of all that can be read."""


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and of those below in the order of their names, through symbolic links, each folder once.

    Hidden ones are left out: some systems put ``._name`` beside every file.
    """
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(root))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) not in seen
        )
        for name in sorted(names):
            if not name.startswith(".") and (path := Path(root, name)).is_file():
                yield path


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(images of a folder and of those below, files that are left out for their ending)."""
    files = list(files_below(folder))
    images = sorted(path for path in files if path.suffix.lower() in EXTENSIONS)
    return images, [path for path in files if path.suffix.lower() not in EXTENSIONS]


def absent_files(root: Path, names: Iterable[str]) -> list[int]:
    """Indices of the names without a file; lists each directory once instead of asking for each file."""
    by_directory: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for index, path in enumerate(names):
        directory, name = os.path.split(path)
        by_directory[directory].append((index, name))
    absent: list[int] = []
    for directory, members in by_directory.items():
        try:
            present = set(os.listdir(root / directory))
        except (OSError, ValueError):  # no such directory, or a name that none can have
            present = set()
        absent.extend(index for index, name in members if name not in present)
    return sorted(absent)


def explain_absence(root: Path, name: str) -> str:
    """How the file of this name is called instead, to be put behind the name; nothing if it cannot be guessed."""
    plain = name.replace("\\", "/")
    parts = PurePosixPath(plain).parts
    shorter = ["/".join(parts[start:]) for start in range(1, len(parts))]
    guesses = {plain.strip(): "spaces around it"}
    guesses |= {unicodedata.normalize(form, plain): "accents composed otherwise" for form in _FORMS}
    guesses |= {unquote(plain): "escapes such as %20", plain: "backslashes"}
    guesses |= dict.fromkeys(shorter, "folders too many")
    if parts and _PREFIX.match(parts[-1]):
        guesses |= {str(PurePosixPath(*parts[:-1], _PREFIX.sub("", parts[-1]))): "Label Studio's prefix"}
    for guess, reason in guesses.items():
        if guess and guess != name and not absent_files(root, [guess]):
            return f", which has {reason}: {guess} is there"
    directory, base = os.path.split(plain)
    try:
        there = os.listdir(root / directory)
    except (OSError, ValueError):
        return ""
    for other in there:
        if other.casefold() == base.casefold():
            return f", whose letters' case differs: {other} is there"
    stem = os.path.splitext(base)[0]
    same = [other for other in there if os.path.splitext(other)[0] == stem and other.lower().endswith(EXTENSIONS)]
    return f", which has another ending: {same[0]} is there" if stem and len(same) == 1 else ""
