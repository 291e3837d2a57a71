"""Plain nested values into typed dataclasses: merging, strict decoding, and back.

The tree of dataclasses is the schema; there is no other. A field whose type is a union of dataclasses with a ``name``
is an alternative: ``name`` picks the variant, and picking another one resets its siblings to that variant's defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal


class KeyPathError(ValueError):
    """Something is wrong with the value at ``path``; whoever knows where it was written adds that."""

    def __init__(self, path: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


def expand_home(text: str) -> str:
    """Put the home directory in place of a ``~`` at the start of a path; shells leave the one of ``--out=~/x``.

    Raises:
        ValueError: there is no home directory.
    """
    known = os.environ.get("HOME") != ""
    path = os.path.expanduser(text) if text.startswith("~") and known else text
    if path == "~" or path.startswith("~/"):
        raise ValueError(f"there is no home directory (HOME is not set) for {text}: write the whole path")
    return path


def merge(kind: Any, default: Any, base: Any, new: Any) -> Any:
    """Lay ``new`` over ``base``: mappings merge, everything else replaces, a changed ``name`` resets its siblings."""
    if not isinstance(new, Mapping):
        return new
    variants = _variants(kind)
    if variants:
        # A bare name stands for the variant with its defaults, in a base as in an override.
        base = {"name": base} if isinstance(base, str) else base
        implied = getattr(default, "name", None)
        known = base.get("name", implied) if isinstance(base, Mapping) else implied
        chosen = new.get("name", known)
        if chosen != known:
            base = None
        if chosen != implied:
            default = None
        kind = variants.get(chosen) if isinstance(chosen, str) else None
    entries = next((typing.get_args(option)[1] for option in _options(kind) if typing.get_origin(option) is dict), None)
    kind = next((option for option in _options(kind) if dataclasses.is_dataclass(option)), None)
    fields, defaults = (_field_types(kind), _defaults(kind, default)) if kind is not None else ({}, {})
    result = dict(base) if isinstance(base, Mapping) else {}
    for key, value in new.items():
        result[key] = merge(fields.get(key, entries), defaults.get(key), result.get(key), value)
    return result


def _field_types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _defaults(kind: Any, instance: Any) -> dict[str, Any]:
    """Values of the fields that need not be given: those of ``instance``, where there is one, else of the class."""
    if instance is not None:
        return {f.name: getattr(instance, f.name) for f in dataclasses.fields(kind)}
    result = {}
    for f in dataclasses.fields(kind):
        if f.default_factory is not dataclasses.MISSING:
            result[f.name] = f.default_factory()
        elif f.default is not dataclasses.MISSING:
            result[f.name] = f.default
    return result


def _options(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(typing.get_args(kind))
    return (kind,)


def _variants(kind: Any) -> dict[str, Any]:
    """Variants of a tagged union by name; empty for anything else."""
    result = {}
    for option in _options(kind):
        if dataclasses.is_dataclass(option):
            tag = _field_types(option).get("name")
            if typing.get_origin(tag) is Literal:
                result[typing.get_args(tag)[0]] = option
    return result


def decode(kind: Any, default: Any, value: Any, path: tuple[str, ...]) -> Any:
    options = _options(kind)
    if value is None:
        if type(None) in options:
            return None
        raise KeyPathError(path, f"must not be null, expected {_describe(kind)}")
    variants = _variants(kind)
    if variants:
        return _decode_variant(variants, default, value, path)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return _decode_dataclass(option, default, value, path)
    for option in options:
        decoded = _decode_plain(option, value, path)
        if decoded is not None:
            return decoded
    remedy = ""
    if str in options and isinstance(value, (int, float)):
        remedy = f": write it in quotes, on a command line '\"{value}\"'"
    raise KeyPathError(path, f"expected {_describe(kind)}, found {_shown(value)}{remedy}")


def _decode_variant(variants: Mapping[str, Any], default: Any, value: Any, path: tuple[str, ...]) -> Any:
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise KeyPathError(path, f"expected a mapping with 'name', one of {', '.join(variants)}; found {_shown(value)}")
    name = value.get("name", getattr(default, "name", next(iter(variants)) if len(variants) == 1 else None))
    if name is None:
        raise KeyPathError(path, f"'name' is missing, one of {', '.join(variants)}")
    if not isinstance(name, str) or name not in variants:
        raise KeyPathError((*path, "name"), f"unknown name {_shown(name)}{_nearest(str(name), variants)}")
    same = default if getattr(default, "name", None) == name else None
    return _decode_dataclass(variants[name], same, value, path)


def _decode_dataclass(kind: Any, default: Any, value: Any, path: tuple[str, ...]) -> Any:
    if not isinstance(value, Mapping):
        raise KeyPathError(path, f"expected a mapping of keys, found {_shown(value)}")
    kinds = _field_types(kind)
    for key in value:
        if key not in kinds:
            raise KeyPathError((*path, str(key)), f"unknown key '{key}'{_nearest(str(key), kinds)}")
    arguments = {}
    defaults = _defaults(kind, default)
    for name, hint in kinds.items():
        if name in value:
            arguments[name] = decode(hint, defaults.get(name), value[name], (*path, name))
        elif name not in defaults:
            raise KeyPathError((*path, name), f"is required ({_describe(hint)})")
        else:
            arguments[name] = defaults[name]
    try:
        return kind(**arguments)
    except ValueError as error:
        raise KeyPathError(path, str(error)) from error


def _decode_plain(kind: Any, value: Any, path: tuple[str, ...]) -> Any:
    """The value as ``kind``, or None where it is not one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value if any(value == a and type(value) is type(a) for a in args) else None
    if origin is tuple and isinstance(value, (list, tuple)):
        items = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(items) != len(value):
            raise KeyPathError(path, f"expected {len(items)} values, found {len(value)}")
        pairs = enumerate(zip(items, value, strict=True))
        return tuple(decode(item, None, entry, (*path, str(i))) for i, (item, entry) in pairs)
    if origin is dict and isinstance(value, Mapping):
        return {str(k): decode(args[1], None, v, (*path, str(k))) for k, v in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not -sys.float_info.max <= value <= sys.float_info.max:
            raise KeyPathError(path, f"expected a finite number, found {_shown(value)}")
        return float(value)
    if kind is bool and isinstance(value, str):  # YAML 1.1's words, which a person may still mean
        return {"yes": True, "on": True, "no": False, "off": False}.get(value.lower())
    if kind is str and isinstance(value, str):
        try:
            return expand_home(value)
        except ValueError as error:
            raise KeyPathError(path, str(error)) from None
    if kind in (bool, int) and type(value) is kind:
        return value
    return None


def _shown(value: Any) -> str:
    """As Python writes it, but not at any length."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _describe(kind: Any) -> str:
    variants = _variants(kind)
    if variants:
        return "one of " + ", ".join(variants)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a list"
    if kind is type(None):
        return "null"
    options = _options(kind)
    if len(options) > 1:
        return " or ".join(_describe(option) for option in options)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names.get(kind, "a mapping of keys")


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else f", known: {', '.join(known)}"


def plain(value: Any) -> Any:
    """The inverse of :func:`decode`: nested dictionaries and lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value
