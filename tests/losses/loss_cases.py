"""All classification losses of the index, with every option of every field, found by looking at their types."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from typing import Any, Literal

from losses import Classification, ClassificationLoss

EXPONENTS = (0.0, 0.5, 1.0, 2.0)
KINDS: tuple[Any, ...] = typing.get_args(Classification)
LOSSES: list[ClassificationLoss] = [kind() for kind in KINDS]


def _options(kind: Any, name: str, hint: Any) -> tuple[Any, ...]:
    if name in ("gamma", "beta"):
        return EXPONENTS
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if hint is bool:
        return (False, True)
    if hint is float:
        return (0.0, 0.4, 1.0)
    assert hint == int | None, f"say which values of {kind.__name__}.{name} are to be tested"
    return (None, 0, 7)


def variants(kind: Any) -> list[ClassificationLoss]:
    """Every value of every field by itself, and every exponent with every choice; without what is refused."""
    hints = typing.get_type_hints(kind)
    options = {field.name: _options(kind, field.name, hints[field.name]) for field in dataclasses.fields(kind)}
    alone = [{name: value} for name, values in options.items() for value in values]
    choices = [name for name in options if typing.get_origin(hints[name]) is Literal]
    exponents = [name for name in options if name in ("gamma", "beta")]
    crossed = itertools.product(*(options[name] for name in (*choices, *exponents)))
    settings = alone + [dict(zip((*choices, *exponents), values, strict=True)) for values in crossed]
    found = {}
    for fields in settings:
        try:
            loss = kind(**fields)
        except ValueError:
            continue
        found[loss] = None
    return list(found)


VARIANTS = [loss for kind in KINDS for loss in variants(kind)]
