"""COCO annotation files as columns of numbers, read piece by piece: neither polygons nor Python objects pile up.

A piece is a stretch of ``images`` or ``annotations``. msgspec decodes only the fields that detection needs, and refuses
whatever is not as COCO defines it; such a piece goes through the standard library and is looked at entry by entry.
"""

from __future__ import annotations

import codecs
import gc
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from ops.coco_columns import (
    AnnotationColumns,
    ImageEntry,
    PlainAnnotation,
    annotation_columns,
    image_entries,
    image_entry,
    join_columns,
)

PIECE = 2**17
"""Bytes that are decoded at once: so few that what becomes of them stays in the processor's cache."""
PROGRESS_SECONDS = 5.0
"""Reading that takes longer says how far it is, so often."""

_KEY = re.compile(rb'"(images|annotations)"[ \t\r\n]*:[ \t\r\n]*\[')
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{}]', re.DOTALL)
_COMMA = re.compile(rb"[ \t\r\n]*,")
_BRACKET = re.compile(rb"[ \t\r\n]*\]")
_LAST_ENTRY = re.compile(rb"\}[ \t\r\n]*\]")
_NEXT_ENTRY = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*\{")
_TAKEN = "taken apart: "

_DECODERS: dict[bytes, tuple[Callable[[list[Any]], Any], msgspec.json.Decoder[list[Any]]]] = {
    b"images": (image_entries, msgspec.json.Decoder(list[ImageEntry])),
    b"annotations": (annotation_columns, msgspec.json.Decoder(list[PlainAnnotation])),
}

_logger = logging.getLogger(__name__)


class CocoFile(NamedTuple):
    """What detection needs of a COCO file."""

    images: list[ImageEntry]
    annotations: AnnotationColumns
    categories: list[Any]
    """As they are."""


def read_coco_file(path: Path | str) -> CocoFile:
    """Reads a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not COCO JSON: cut off, no JSON, or without a list of ``images``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file {path}")
    collects = gc.isenabled()
    gc.disable()  # it would walk millions of tuples that refer to nothing, again and again
    try:
        with path.open("rb") as file:
            return _in_pieces(file, path)
    except (_MalformedError, RecursionError):
        return from_content(_all_at_once(path), path)
    finally:
        if collects:
            gc.enable()


def from_content(content: object, source: Path | str = "annotations") -> CocoFile:
    """The same from a file's content as Python objects."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{source} is not a COCO annotation file: it has no list of 'images'")
    lists = {key: content.get(key, []) for key in ("annotations", "categories")}
    for key, value in lists.items():
        if not isinstance(value, list):
            raise ValueError(f"{source} is not a COCO annotation file: '{key}' is not a list")
    images = [image_entry(entry) for entry in content["images"]]
    return CocoFile(images, annotation_columns(lists["annotations"]), lists["categories"])


class _MalformedError(Exception):
    """A piece is no JSON; reading the file as a whole says where."""


def _all_at_once(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            return json.load(stream, object_hook=_without_segmentation)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def _without_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


class _Window:
    """The part of a file that is being looked at, as bytes."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, max(path.stat().st_size, 1)
        self.bytes = file.read(PIECE).removeprefix(codecs.BOM_UTF8)
        self.told = time.monotonic() + PROGRESS_SECONDS

    def grow(self) -> bool:
        """Reads on; False at the end of the file."""
        if (now := time.monotonic()) >= self.told:
            _logger.info("reading %s: %d %%", self.path, 100 * self.file.tell() // self.size)
            self.told = now + PROGRESS_SECONDS
        more = self.file.read(max(PIECE, len(self.bytes)))
        self.bytes += more
        return bool(more)

    def drop(self, count: int) -> None:
        self.bytes = self.bytes[count:]


def _in_pieces(file: BinaryIO, path: Path) -> CocoFile:
    """Takes the arrays of these names out of the file, wherever they are, and then decodes what is left.

    What is left says which of them are those of the file itself: each leaves its number behind.
    """
    window, rest = _Window(file, path), bytearray()
    taken: list[list[Any]] = []
    tail = max(PIECE // 4, 256)  # a key may be cut in two
    while True:
        if found := _KEY.search(window.bytes):
            rest += window.bytes[: found.end()] + b'"%s%d"' % (_TAKEN.encode(), len(taken))
            window.drop(found.end())
            convert, decoder = _DECODERS[found[1]]
            taken.append([convert(entries) for entries in _take(window, decoder)])
        elif len(window.bytes) > 2 * tail:
            rest += window.bytes[:-tail]
            window.drop(len(window.bytes) - tail)
        elif not window.grow():
            break
    try:
        content = json.loads((rest + window.bytes).decode(), object_hook=_without_segmentation)
    except ValueError as error:
        raise _MalformedError from error
    pieces: dict[str, list[Any]] = {}
    for key in ("images", "annotations") if isinstance(content, dict) else ():
        value = content.get(key)
        if isinstance(value, list) and len(value) == 1 and str(value[0]).startswith(_TAKEN):
            pieces[key], content[key] = taken[int(value[0].removeprefix(_TAKEN))], []
    plain = from_content(content, path)
    return CocoFile(
        plain.images + list(chain.from_iterable(pieces.get("images", ()))),
        join_columns([plain.annotations, *pieces.get("annotations", ())]),
        plain.categories,
    )


def _take(window: _Window, decoder: msgspec.json.Decoder[list[Any]]) -> Iterator[list[Any]]:
    """Decodes the array that begins at the window, and leaves the window at its closing bracket.

    Where an entry ends is guessed first: a guess too early or too late leaves brackets or quotes open, so that the
    piece cannot be decoded. Only then are brackets counted.
    """
    follows_comma = False
    while True:
        if len(window.bytes) < PIECE:
            window.grow()
        closed, cut = False, _guessed_end(window.bytes)
        entries = _decode(decoder, window.bytes[:cut], guessed=True) if cut else None
        if entries is None and (last := _LAST_ENTRY.search(window.bytes)):
            closed, cut = True, last.start() + 1
            entries = _decode(decoder, window.bytes[:cut], guessed=True)
        if entries is None:
            cut, closed = _counted_end(window.bytes)
            if not cut and not closed:
                if not window.grow():
                    raise _MalformedError
                continue
            entries = _decode(decoder, window.bytes[:cut])
            if entries is None or (follows_comma and not entries):
                raise _MalformedError
        yield entries
        window.drop(cut)
        if closed:
            if not _BRACKET.match(window.bytes):
                raise _MalformedError
            return
        comma = _COMMA.match(window.bytes)
        assert comma is not None
        window.drop(comma.end())
        follows_comma = True


def _guessed_end(text: bytes) -> int:
    """Where the last mapping ends that another one follows; 0 if there seems to be none."""
    end = len(text)
    for _ in range(1000):
        end = text.rfind(b"}", 0, end)
        if end < 0:
            break
        if _NEXT_ENTRY.match(text, end + 1):
            return end + 1
    return 0


def _counted_end(text: bytes) -> tuple[int, bool]:
    """(where the last whole entry ends that a comma follows, whether it is the end of the array instead)."""
    depth, last = 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in b"{[":
            depth += 1
        elif token[0] in b"}]":
            depth -= 1
            if depth < 0:
                return token.start(), True
            if not depth and _COMMA.match(text, token.end()):
                last = token.end()
    return last, False


def _decode(decoder: msgspec.json.Decoder[list[Any]], piece: bytes, guessed: bool = False) -> list[Any] | None:
    """Typed entries, or Python objects where one of them is odd; None if this is no JSON."""
    try:
        if not piece.isascii():
            piece.decode()  # msgspec does not look at the fields that it skips
        return decoder.decode(b"[%b]" % piece)
    except UnicodeDecodeError:
        return None
    except msgspec.ValidationError:
        pass
    except msgspec.DecodeError:  # no JSON, or only the standard library's, which knows NaN
        if guessed:
            return None
    try:
        entries: list[Any] = json.loads(f"[{piece.decode()}]", object_hook=_without_segmentation)
    except ValueError:
        return None
    return entries
