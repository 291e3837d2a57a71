"""The root configuration: reads YAML with its base files and overrides, and dumps what came out of it."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from datasets import DataConfig
from engine.optimizer import OptimizerConfig, Schedule, StepSchedule
from engine.trainer_config import TrainerConfig
from former_keys import modernise
from losses import Criterion
from models import AnyDetector, DINOConfig
from schema import KeyPathError, decode, merge, plain


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    model: AnyDetector = field(default_factory=DINOConfig)
    """Detector, picked by name."""
    criterion: Criterion = field(default_factory=Criterion)
    """What is supervised, by which losses and which matcher."""
    data: DataConfig
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

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError("seed must lie within 64 bits")
        self.criterion.check(self.model.matched_layers, self.model.given_groups, self.model.no_object)
        if self.data.mean is None or self.data.std is None:
            # From here on they are explicit: a checkpoint keeps them, whatever a later version of timm says.
            mean, std = self.model.backbone.pixel_statistics
            data = replace(self.data, mean=self.data.mean or mean, std=self.data.std or std)
            object.__setattr__(self, "data", data)


class ConfigError(ValueError):
    """A configuration that a user has to correct; the message names file, key and what is known instead."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # one line, whatever was quoted in it


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's core schema, with duplicate keys refused and merge keys (``<<``) allowed.

    YAML 1.1, which PyYAML reads, takes ``010`` for 8, ``12:30`` for 750, ``no`` for false and ``2025-11-25`` for
    a date.
    """

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - as PyYAML declares it

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {key.start_mark.line + 1}: a key must be a word, found a list or mapping")
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: duplicate key '{key.value}'")
            seen.add(key.value)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader, or YAML 1.1, would take for something else than text."""


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
for _kind, _pattern in {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?[0-9]+|0o[0-7]{1,20}|0x[0-9a-fA-F]{1,15}",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": "<<",
}.items():
    for _class in (_StrictLoader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})\\Z"), None)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (with its chain of ``base:`` files), apply ``key.path=value`` overrides and decode.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: command-line overrides, later ones win; the value is read as YAML. ``base=FILE`` is a file of them.

    Raises:
        ConfigError: in one line, naming the file (or "command line"), the key and the nearest known key.
    """
    layers = list(_read_chain(Path(path), ())) if path is not None else []
    return _decode_layers([*layers, *_read_overrides(overrides)])


def from_dict(values: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "checkpoint") -> Config:
    """Decode an already resolved configuration (of a checkpoint), with overrides on top."""
    return _decode_layers([(source, dict(values)), *_read_overrides(overrides)])


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries and lists: what goes into a checkpoint, and what :func:`from_dict` reads."""
    return typing.cast(dict[str, Any], plain(config))


def dump(config: Config) -> str:
    """YAML of every key, sufficient to repeat the run."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, width=120)


def _read_chain(path: Path, below: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files of a ``base:`` chain, the deepest base first; of several bases, later ones win."""
    if path.resolve() in below:
        raise ConfigError(f"{path}: 'base' files form a circle")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, LookupError) as error:  # ConfigError among them; the others from `!!int x` and the like
        raise ConfigError(f"{path}: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested without end") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(values).__name__}")
    base = values.pop("base", None)
    for name in base if isinstance(base, list) else [] if base is None else [base]:
        if not isinstance(name, str):
            raise ConfigError(f"{path}: 'base' must be a file name or a list of them, relative to this file")
        yield from _read_chain(path.parent / os.path.expanduser(name), (*below, path.resolve()))
    yield str(path), values


def _read_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The command line's layers: ``base=FILE`` lays a whole file over what came before, such as a form of a loss."""
    for text in overrides:
        if text.startswith("base="):
            yield from _read_chain(Path(text.removeprefix("base=")), ())
        else:
            yield text, _parse_override(text)


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"override '{text}': expected key.path=value")
    values: Any
    try:
        node = yaml.compose(value, _StrictLoader)
        is_word = node is None or (isinstance(node, yaml.ScalarNode) and node.style is None)
        values = None if is_word else yaml.load(value, _StrictLoader)
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        if value.lstrip()[:1] in tuple("[{\"'&*!|>"):
            raise ConfigError(f"override '{text}': the value is not valid YAML") from error
        is_word = True
    if is_word:
        # Of one word, all is meant: the shell has taken quotes away, and `runs/a #1` has no comment.
        values = _read_word(value.strip(), f"override '{text}'")
    for part in reversed(key.split(".")):
        values = {part: values}
    return typing.cast(dict[str, Any], values)


def _read_word(word: str, source: str) -> Any:
    """A number, true, false, null or else text."""
    loader = _StrictLoader("")
    try:
        return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, word, (True, False)), word))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from error


def _decode_layers(layers: Sequence[tuple[str, dict[str, Any]]]) -> Config:
    origins: dict[tuple[str, ...], str] = {}
    merged: dict[str, Any] = {}
    try:
        for source, given in layers:
            values = modernise(given, merged)
            _record_origins(values, (), source, origins)
            merged = merge(Config, None, merged, values)
        return typing.cast(Config, decode(Config, None, merged, ()))
    except RecursionError:
        raise ConfigError(f"{source}: keys are nested without end, or refer to themselves") from None
    except KeyPathError as problem:
        path = problem.path
        while path and path not in origins:
            path = path[:-1]
        where = f"{origins[path]}: " if path in origins else ""
        key = f"{'.'.join(problem.path)}: " if problem.path else ""
        raise ConfigError(f"{where}{key}{problem}") from None


def _record_origins(values: Any, path: tuple[str, ...], source: str, origins: dict[tuple[str, ...], str]) -> None:
    if path:
        origins[path] = source
    if isinstance(values, Mapping):
        for key, value in values.items():
            _record_origins(value, (*path, str(key)), source, origins)
