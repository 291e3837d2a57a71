"""Sweeps as YAML files: a configuration, named variants of it, and a grid over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from experiments.grid import Grid, check_distinct, parse_axis
from strict_yaml import read_chain

KEYS = ("base", "cfg", "baseline", "overrides", "variants", "grid", "declared")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to run: every variant with every combination of the grid."""

    cfg: Path
    """Configuration of which everything is a variation."""
    baseline: str | None = None
    """Variant, or ``key=value`` of the grid, with which the others are compared."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Overrides for all runs."""
    variants: dict[str, dict[str, str]] = field(default_factory=dict)
    """Overrides by the name of the variant; none where all variation is in the grid."""
    grid: Grid = field(default_factory=dict)
    """Values of further keys, crossed with the variants."""
    declared: Mapping[str, Any] | None = None
    """What ``tools.ablate`` is to decide, see :class:`experiments.declared.Declaration`."""

    def updated(self, axes: Grid) -> Sweep:
        """Put the keys of the command line in place of the file's: one value overrides, several are an axis."""
        for name, settings in self.variants.items():
            if both := sorted(settings.keys() & axes.keys()):
                raise ValueError(f"{both[0]} is set by the variant '{name}' and cannot be varied as well")
        overrides = {key: value for key, value in self.overrides.items() if key not in axes}
        grid = {key: axes.get(key, values) for key, values in self.grid.items()}
        for key, values in axes.items():
            if key in grid or len(values) > 1:
                grid[key] = values
            else:
                overrides[key] = values[0]
        return replace(self, overrides=overrides, grid=grid)


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file; with ``base``, its keys replace those of another sweep file.

    Raises:
        ValueError: it cannot be read, has unknown keys or values of the wrong kind, or names no configuration.
    """
    values = _read_values(path)
    if "cfg" not in values:
        raise ValueError(f"{path}: 'cfg', the configuration to vary, is missing")
    variants = {
        str(name): _overrides(settings, f"{path}: variants.{name}")
        for name, settings in _mapping(values.get("variants", {}), f"{path}: variants").items()
    }
    grid = {}
    for key, axis in _mapping(values.get("grid", {}), f"{path}: grid").items():
        grid[str(key)] = _axis(str(key), axis, f"{path}: grid.{key}")
        for name, settings in variants.items():
            if key in settings:
                raise ValueError(f"{path}: {key} is in the grid and in the variant '{name}'")
    if not variants and not grid:
        raise ValueError(f"{path}: neither 'variants' nor 'grid' has an entry, so there is nothing to run")
    baseline = values.get("baseline")
    if baseline is not None and not isinstance(baseline, str):
        raise ValueError(f"{path}: baseline: expected the name of a variant or key=value, found {baseline!r}")
    named = [part.strip() for part in (baseline or "").split(",") if part and "=" not in part]
    if variants and baseline is not None and not (named and set(named) <= set(variants)):
        raise ValueError(f"{path}: baseline: there is no variant '{baseline}', known: {', '.join(variants)}")
    return Sweep(
        cfg=values["cfg"],
        baseline=baseline,
        overrides=_overrides(values.get("overrides", {}), f"{path}: overrides"),
        variants=variants,
        grid=grid,
        declared=_mapping(values["declared"], f"{path}: declared") if "declared" in values else None,
    )


def _read_values(path: Path) -> dict[str, Any]:
    """Lay the file's top-level keys over those of its bases; ``cfg`` is made relative to the working directory."""
    result: dict[str, Any] = {}
    for source, values in read_chain(path):
        for key in values:
            if key not in KEYS:
                raise ValueError(f"{source}: unknown key '{key}', known: {', '.join(KEYS)}")
        if "cfg" in values:
            if not isinstance(values["cfg"], str):
                raise ValueError(f"{source}: cfg: expected one file name, relative to this file")
            values["cfg"] = _shortened(source.parent / values["cfg"])
        result |= values
    return result


def _shortened(path: Path) -> Path:
    """Write a path as a person would: without ``..``, and relative to the working directory where it is below it."""
    resolved = path.resolve()
    here = Path.cwd()
    return resolved.relative_to(here) if resolved.is_relative_to(here) else resolved


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a mapping of keys, found {value!r}")
    return value


def _overrides(value: Any, where: str) -> dict[str, str]:
    return {str(key): _text(item) for key, item in _mapping(value, where).items()}


def _axis(key: str, value: Any, where: str) -> list[str]:
    """Read the values of a grid key: a list, or text as on the command line (``0..2``)."""
    if not isinstance(value, (list, str)):
        raise ValueError(f"{where}: expected a list of values or a range such as 0..2, found {value!r}")
    try:
        values = parse_axis(f"{key}={value}")[1] if isinstance(value, str) else [_text(item) for item in value]
        check_distinct(key, values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not values:
        raise ValueError(f"{where}: the list is empty")
    return values


def _text(value: Any) -> str:
    """Write a value as the right-hand side of an override, in one line of YAML."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("...").strip()
