"""Grids of overrides: ``criterion.classification.alpha=0,0.25,0.5 seed=0..2`` is nine combinations."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

MAX_COMBINATIONS = 10_000
"""A grid beyond this is a slip of the keyboard."""

Grid = dict[str, list[str]]
"""Values of every key, as they are written in an override; keys vary in their order, the last one fastest."""

_RANGE = re.compile(r"^(-?\d+)\.\.(-?\d+)$")
_OPENING = {"[": "]", "{": "}", "(": ")"}


def parse_axis(text: str) -> tuple[str, list[str]]:
    """``key=a,b,c`` or ``key=0..2`` (both ends included), or a mixture, as the key and its values.

    Commas inside brackets or quotes belong to a value: ``matcher={name: mixed, candidates: 2},hungarian`` has two.

    Raises:
        ValueError: there is no key, no value, a value twice, or a range that holds nothing.
    """
    key, separator, rest = text.partition("=")
    if not separator or not key or any(not part for part in key.split(".")):
        raise ValueError(f"'{text}': expected key.path=value[,value…] or key.path=first..last")
    values: list[str] = []
    for part in _split(rest, text):
        bounds = _RANGE.match(part)
        if bounds is None:
            values.append(part)
            continue
        first, last = int(bounds[1]), int(bounds[2])
        if last < first:
            raise ValueError(f"'{text}': the range {part} holds nothing")
        if last - first >= MAX_COMBINATIONS:
            raise ValueError(f"'{text}': the range {part} holds more than {MAX_COMBINATIONS} values")
        values.extend(str(number) for number in range(first, last + 1))
    if "" in values:
        raise ValueError(f"'{text}': a value is empty (write null or '' if you mean it)")
    check_distinct(key, values)
    return key, values


def check_distinct(key: str, values: Sequence[str]) -> None:
    """Raise ValueError if a value is given twice."""
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{key}: the value {value} is given twice")


def _split(text: str, whole: str) -> list[str]:
    """Parts between commas that are outside of brackets and quotes."""
    parts, start = [], 0
    closing: list[str] = []
    for i, character in enumerate(text):
        if closing and closing[-1] in "'\"":
            if character == closing[-1]:
                closing.pop()
        elif closing and character == closing[-1]:
            closing.pop()
        elif character in _OPENING:
            closing.append(_OPENING[character])
        elif character in "'\"":
            closing.append(character)
        elif character == "," and not closing:
            parts.append(text[start:i].strip())
            start = i + 1
    if closing:
        raise ValueError(f"'{whole}': '{closing[-1]}' is missing")
    return [*parts, text[start:].strip()]


def parse_grid(axes: Sequence[str]) -> Grid:
    """Make the grid of several axes.

    Raises:
        ValueError: an axis is malformed or given twice.
    """
    grid: Grid = {}
    for text in axes:
        key, values = parse_axis(text)
        if key in grid:
            raise ValueError(f"{key} is given twice: list all its values in one argument")
        grid[key] = values
    return grid


def combinations(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every choice of one value for each key; the one empty choice for an empty grid.

    Raises:
        ValueError: there are more than ``MAX_COMBINATIONS``, or a key has no value.
    """
    count = 1
    for key, values in grid.items():
        if not values:
            raise ValueError(f"{key}: there is no value, so the grid is empty")
        count *= len(values)
    if count > MAX_COMBINATIONS:
        raise ValueError(f"the grid has {count} combinations, more than {MAX_COMBINATIONS}")
    return [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]
