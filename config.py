"""The root configuration: read YAML, merge bases and overrides, decode strictly into typed dataclasses, dump.

The tree of dataclasses is the schema; there is no other. A field whose type is a union of dataclasses with a ``name``
is an alternative: ``name`` picks the variant, and picking another one resets its siblings to that variant's defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from engine.trainer import TrainerConfig

from datasets import DataConfig
from engine.optimizer import OptimizerConfig, Schedule, StepSchedule
from losses import CriterionConfig
from models import Detector, DINOConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    model: Detector = field(default_factory=DINOConfig)
    """Detector, picked by name."""
    criterion: CriterionConfig = field(default_factory=CriterionConfig)
    """What is supervised, by which losses and which matcher."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data sets, augmentation and batching."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and gradient clipping."""
    schedule: Schedule = field(default_factory=StepSchedule)
    """Length of the training and course of the learning rate, picked by name."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Precision, accumulation, EMA, how often to log, evaluate and save."""
    seed: int = 0
    """Seed of initialisation, data order, augmentation and denoising noise."""
    output_dir: str = "runs/default"
    """Directory that receives everything the run writes."""
    op_backend: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    """Implementation of multi-scale deformable attention."""


class ConfigError(ValueError):
    """A configuration that a user has to correct; the message names file, key and what is known instead."""


class _KeyProblem(Exception):  # noqa: N818 - internal carrier of a path, always turned into a ConfigError
    def __init__(self, path: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


class _StrictLoader(yaml.SafeLoader):
    """YAML with duplicate keys refused and ``1e-4`` read as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: duplicate key '{key}'")
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (with its chain of ``base:`` files), apply ``key.path=value`` overrides and decode.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: command-line overrides, later ones win; the value is read as YAML.

    Raises:
        ConfigError: in one line, naming the file (or "command line"), the key and the nearest known key.
    """
    layers = list(_read_chain(Path(path), ())) if path is not None else []
    return _decode_layers([*layers, *((text, _parse_override(text)) for text in overrides)])


def from_dict(values: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "checkpoint") -> Config:
    """Decode an already resolved configuration (of a checkpoint), with overrides on top."""
    return _decode_layers([(source, dict(values)), *((text, _parse_override(text)) for text in overrides)])


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries and lists: what goes into a checkpoint, and what :func:`from_dict` reads."""
    return typing.cast(dict[str, Any], _plain(config))


def dump(config: Config) -> str:
    """YAML of every key, sufficient to repeat the run."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


# ---------------------------------------------------------------------------------------------------- reading


def _read_chain(path: Path, below: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files of a ``base:`` chain, the deepest base first."""
    if path.resolve() in below:
        raise ConfigError(f"{path}: 'base' files form a circle")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(values).__name__}")
    base = values.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: 'base' must be one file name, relative to this file")
        yield from _read_chain(path.parent / base, (*below, path.resolve()))
    yield str(path), values


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"override '{text}': expected key.path=value")
    try:
        values: Any = yaml.load(value, _StrictLoader)
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"override '{text}': the value is not valid YAML") from error
    for part in reversed(key.split(".")):
        values = {part: values}
    return typing.cast(dict[str, Any], values)


# ---------------------------------------------------------------------------------------------------- merging


def _decode_layers(layers: Sequence[tuple[str, dict[str, Any]]]) -> Config:
    origins: dict[tuple[str, ...], str] = {}
    merged: dict[str, Any] = {}
    for source, values in layers:
        _record_origins(values, (), source, origins)
        merged = _merge(Config, Config(), merged, values)
    try:
        return typing.cast(Config, _decode(Config, Config(), merged, ()))
    except _KeyProblem as problem:
        path = problem.path
        while path and path not in origins:
            path = path[:-1]
        where = f"{origins[path]}: " if path in origins else ""
        raise ConfigError(f"{where}{'.'.join(problem.path)}: {problem}".replace(": : ", ": ")) from None


def _record_origins(values: Any, path: tuple[str, ...], source: str, origins: dict[tuple[str, ...], str]) -> None:
    if path:
        origins[path] = source
    if isinstance(values, Mapping):
        for key, value in values.items():
            _record_origins(value, (*path, str(key)), source, origins)


def _merge(kind: Any, default: Any, base: Any, new: Any) -> Any:
    """Lay ``new`` over ``base``: mappings merge, everything else replaces, a changed ``name`` resets its siblings."""
    if not isinstance(new, Mapping):
        return new
    variants = _variants(kind)
    if variants:
        # A bare name stands for the variant with its defaults, in a base as in an override.
        base = {"name": base} if isinstance(base, str) else base
        implied = getattr(default, "name", None)
        known = base.get("name", implied) if isinstance(base, Mapping) else implied
        if new.get("name", known) != known or not isinstance(base, Mapping):
            base = {}
            default = None
        chosen = new.get("name", known)
        kind = variants.get(chosen) if isinstance(chosen, str) else None
    fields = _field_types(kind) if dataclasses.is_dataclass(kind) else {}
    result = dict(base) if isinstance(base, Mapping) else {}
    for key, value in new.items():
        result[key] = _merge(fields.get(key), getattr(default, str(key), None), result.get(key), value)
    return result


def _field_types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


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


# --------------------------------------------------------------------------------------------------- decoding


def _decode(kind: Any, default: Any, value: Any, path: tuple[str, ...]) -> Any:
    options = _options(kind)
    if value is None:
        if type(None) in options:
            return None
        raise _KeyProblem(path, f"must not be null, expected {_describe(kind)}")
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
    raise _KeyProblem(path, f"expected {_describe(kind)}, found {value!r}")


def _decode_variant(variants: Mapping[str, Any], default: Any, value: Any, path: tuple[str, ...]) -> Any:
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise _KeyProblem(path, f"expected a mapping with 'name', one of {', '.join(variants)}; found {value!r}")
    name = value.get("name", getattr(default, "name", next(iter(variants)) if len(variants) == 1 else None))
    if name is None:
        raise _KeyProblem(path, f"'name' is missing, one of {', '.join(variants)}")
    if name not in variants:
        raise _KeyProblem((*path, "name"), f"unknown name {name!r}{_nearest(str(name), variants)}")
    same = default if getattr(default, "name", None) == name else None
    return _decode_dataclass(variants[name], same, value, path)


def _decode_dataclass(kind: Any, default: Any, value: Any, path: tuple[str, ...]) -> Any:
    if not isinstance(value, Mapping):
        raise _KeyProblem(path, f"expected a mapping of keys, found {value!r}")
    kinds = _field_types(kind)
    for key in value:
        if key not in kinds:
            raise _KeyProblem((*path, str(key)), f"unknown key '{key}'{_nearest(str(key), kinds)}")
    arguments = {}
    for f in dataclasses.fields(kind):
        if default is not None:
            fallback = getattr(default, f.name)
        elif f.default_factory is not dataclasses.MISSING:
            fallback = f.default_factory()
        else:
            fallback = f.default
        if f.name in value:
            known = None if fallback is dataclasses.MISSING else fallback
            arguments[f.name] = _decode(kinds[f.name], known, value[f.name], (*path, f.name))
        elif fallback is dataclasses.MISSING:
            raise _KeyProblem((*path, f.name), f"is required ({_describe(kinds[f.name])})")
        else:
            arguments[f.name] = fallback
    try:
        return kind(**arguments)
    except ValueError as error:
        raise _KeyProblem(path, str(error)) from error


def _decode_plain(kind: Any, value: Any, path: tuple[str, ...]) -> Any:
    """The value as ``kind``, or None where it is not one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value if any(value == a and type(value) is type(a) for a in args) else None
    if origin is tuple and isinstance(value, (list, tuple)):
        items = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(items) != len(value):
            raise _KeyProblem(path, f"expected {len(items)} values, found {len(value)}")
        pairs = enumerate(zip(items, value, strict=True))
        return tuple(_decode(item, None, entry, (*path, str(i))) for i, (item, entry) in pairs)
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _decode(args[1], None, v, (*path, str(k))) for k, v in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    return None


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
