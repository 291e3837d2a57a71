"""Class names in pictures: in a font that has their letters, or with a replacement that says which class it is."""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

_BESIDE_NAMES = "0123456789. "
"""What is written in the same font: scores."""


_needed: dict[str, None] = {}
"""Fonts, beside the first one, that names were found in."""


class Lettered(NamedTuple):
    """A name as it can be drawn."""

    text: str
    """The name in one line, or "class 7" where no font has all of its letters."""
    font: str | None
    """A font file that has them; None for whatever the drawing library takes by itself."""


def lettered(names: Sequence[str]) -> list[Lettered]:
    """How each class name, indexed by label, is drawn; names that no font has are logged, once."""
    return _lettered(tuple(names))


def families() -> list[str]:
    """matplotlib's ``font.family`` for texts with the names of this process so far in them: the usual font first."""
    from matplotlib.font_manager import FontProperties

    # A font may have been taken away since.
    return ["DejaVu Sans", *(FontProperties(fname=file).get_name() for file in _needed if Path(file).exists())]


@functools.cache
def _lettered(names: tuple[str, ...]) -> list[Lettered]:
    clean = [" ".join(unicodedata.normalize("NFC", name).split()) for name in names]
    found: dict[int, Lettered] = {}
    files = _font_files()
    for file in files:
        missing = [label for label in range(len(clean)) if label not in found]
        if not missing:
            break
        here = [label for label in missing if _has(file, clean[label] + _BESIDE_NAMES)]
        found |= {label: Lettered(clean[label], file) for label in here}
        if here and file != files[0]:
            _needed[file] = None
    plain = next((file for file in files if _has(file, _BESIDE_NAMES + "class")), None)
    replaced = [label for label in range(len(clean)) if label not in found]
    if replaced:
        log.warning(
            "no font of this machine has the letters of %s: in pictures they are named by number (Noto's fonts have "
            "every script)", ", ".join(f"class {label}, {clean[label]!r}" for label in replaced),
        )  # fmt: skip
    return [found.get(label) or Lettered(f"class {label}", plain) for label in range(len(clean))]


@functools.cache
def _font_files() -> list[str]:
    """Of this machine, the one that comes with matplotlib first; none without matplotlib."""
    try:
        from matplotlib import font_manager

        usual = font_manager.findfont("DejaVu Sans")
        # Its last resort has a box for every character there is, its mathematical fonts have signs in letters' places.
        others = {
            entry.fname for entry in font_manager.fontManager.ttflist
            if not entry.name.startswith(("Last Resort", "cm", "STIXSize", "STIXNonUnicode"))
        }  # fmt: skip
        return [usual, *sorted(others - {usual})]
    except Exception as error:  # a broken font cache, say: pictures are not worth more than a word
        log.warning("no fonts can be found (%s)", error)
        return []


def _has(file: str, text: str) -> bool:
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
        return all(font.get_char_index(ord(letter)) for letter in set(text))
    except (OSError, RuntimeError, ValueError):  # not a font that can be drawn with
        return False
