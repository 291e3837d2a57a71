"""The root configuration: reads YAML with its base files and overrides, and dumps what came out of it."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from datasets import DataConfig
from engine.optimizer import Optimizer, OptimizerConfig, Schedule, StepSchedule
from engine.trainer_config import TrainerConfig
from former_keys import modernise
from losses import Criterion
from models import AnyDetector, DINOConfig
from schema import KeyPathError, decode, merge, plain
from strict_yaml import ConfigError, Dumper, read_chain, read_value


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    model: AnyDetector = field(default_factory=DINOConfig)
    """Detector, picked by name."""
    criterion: Criterion = field(default_factory=Criterion)
    """What is supervised, by which losses and which matcher."""
    data: DataConfig
    """Data sets, augmentation and batching."""
    optimizer: Optimizer = field(default_factory=OptimizerConfig)
    """Optimizer and gradient clipping, picked by name (adamw where it is not given)."""
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


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (with its chain of ``base:`` files), apply ``key.path=value`` overrides and decode.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: command-line overrides, later ones win; the value is read as YAML. ``base=FILE`` is a file of them.

    Raises:
        ConfigError: in one line, naming the file (or "command line"), the key and the nearest known key.
    """
    layers = _layers(Path(path)) if path is not None else []
    return _decode_layers([*layers, *_read_overrides(overrides)])


def from_dict(values: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "checkpoint") -> Config:
    """Decode an already resolved configuration (of a checkpoint), with overrides on top."""
    return _decode_layers([(source, dict(values)), *_read_overrides(overrides)])


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries and lists: what goes into a checkpoint, and what :func:`from_dict` reads."""
    return typing.cast(dict[str, Any], plain(config))


def dump(config: Config) -> str:
    """YAML of every key, sufficient to repeat the run."""
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, width=120)


def _layers(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The files of a ``base:`` chain, the deepest base first."""
    return [(str(source), values) for source, values in read_chain(path)]


def _read_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The command line's layers: ``base=FILE`` lays a whole file over what came before, such as a form of a loss."""
    for text in overrides:
        if text.startswith("base="):
            yield from _layers(Path(text.removeprefix("base=")))
        else:
            yield text, _parse_override(text)


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"override '{text}': expected key.path=value")
    values = read_value(value, f"override '{text}'")
    for part in reversed(key.split(".")):
        values = {part: values}
    return typing.cast(dict[str, Any], values)


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
