"""The runs of a sweep, validated before the first one starts, and the manifest that lets a sweep go on later."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.whole_files import replacing
from experiments.grid import combinations
from experiments.sweep_file import Sweep

MANIFEST = "sweep.json"
STATE_DIRECTORY = ".sweep"
"""Beside the runs: the log and the outcome of each."""

MACHINE_KEYS = ("output_dir", "op_backend", "trainer.device", "data.num_workers", "data.worker_start", "data.prefetch")
"""What may differ between the start of a run and its continuation, because it does not change what is learned."""

Decode = Callable[[Path, Sequence[str]], dict[str, Any]]
"""Configuration file and overrides to the resolved configuration; ValueError where they are wrong."""


class PlannedRun(NamedTuple):
    """One run of a sweep."""

    name: str
    """Its directory below that of the sweep."""
    variant: str | None
    """Name of its variant in the sweep file; None where there are no variants."""
    overrides: tuple[str, ...]
    """``key=value``, without the output directory."""


class Plan(NamedTuple):
    """All runs of a sweep."""

    cfg: Path
    out: Path
    baseline: str | None
    runs: tuple[PlannedRun, ...]

    def directory(self, run: PlannedRun) -> Path:
        """Name the output directory of a run."""
        return self.out / run.name

    def outcome_file(self, run: PlannedRun) -> Path:
        """Name the file that says how the run last ended: JSON with ``exit_code``, and perhaps ``message`` and
        ``stopped``: whether it was asked to stop (torchrun's exit code does not tell)."""
        return self.out / STATE_DIRECTORY / f"{run.name}.json"

    def log_file(self, run: PlannedRun) -> Path:
        """Name the file of everything the run printed."""
        return self.out / STATE_DIRECTORY / f"{run.name}.log"


def make_plan(sweep: Sweep, out: Path, decode: Decode) -> Plan:
    """Combine every variant with every combination of the grid, each decoded to see that it is valid.

    Raises:
        ValueError: a combination is not a valid configuration, or two are the same.
    """
    chosen_by_hand = {*sweep.overrides, *sweep.grid, *(key for settings in sweep.variants.values() for key in settings)}
    if "output_dir" in chosen_by_hand:
        raise ValueError("output_dir is set by the sweep, to a directory below --out for each run")
    variants: list[tuple[str | None, dict[str, str]]] = [(None, {})]
    if sweep.variants:
        variants = list(sweep.variants.items())
    rows = [
        (variant, chosen, {**sweep.overrides, **settings, **chosen})
        for variant, settings in variants
        for chosen in combinations(sweep.grid)
    ]
    # One seed of everything before the next: an unfinished sweep can then be compared already.
    seeds = sweep.grid.get("seed", [])
    rows.sort(key=lambda row: seeds.index(row[1]["seed"]) if seeds else 0)
    names = _names([(variant, chosen) for variant, chosen, _ in rows])
    runs = tuple(
        PlannedRun(name, variant, tuple(f"{key}={value}" for key, value in overrides.items()))
        for name, (variant, _, overrides) in zip(names, rows, strict=True)
    )
    plan = Plan(sweep.cfg, out, sweep.baseline, runs)
    resolve_all(plan, decode)
    return plan


def resolve_all(plan: Plan, decode: Decode) -> dict[str, dict[str, Any]]:
    """Resolve the configuration of every run, by name.

    Raises:
        ValueError: one is not valid, or two are the same.
    """
    resolved: dict[str, dict[str, Any]] = {}
    seen: dict[str, str] = {}
    for run in plan.runs:
        try:
            values = decode(plan.cfg, [*run.overrides, f"output_dir={plan.directory(run)}"])
        except ValueError as error:
            raise ValueError(f"run {run.name}: {error}") from error
        text = _identity(values)
        if text in seen:
            raise ValueError(f"runs {seen[text]} and {run.name} have the same configuration: remove one of them")
        seen[text] = run.name
        resolved[run.name] = values
    return resolved


def _identity(values: Mapping[str, Any]) -> str:
    """Make a text that is the same for resolved configurations that teach the same."""
    return json.dumps(without_machine(values), sort_keys=True)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Write nested mappings as one, with dotted keys; lists are values."""
    if not isinstance(values, Mapping):
        return {prefix: values}
    if not values and prefix:
        return {prefix: {}}
    result: dict[str, Any] = {}
    for key, item in values.items():
        result.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return result


def without_machine(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a resolved configuration, without what does not change the result."""
    return {key: value for key, value in flatten(values).items() if key not in MACHINE_KEYS}


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Find for each dotted key its shortest ending that no other of the keys has."""
    result = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [other for other in keys if other != key]
        unique = (e for e in endings if not any(o == e or o.endswith(f".{e}") for o in others))
        result[key] = next(unique, key)
    return result


def _names(rows: Sequence[tuple[str | None, Mapping[str, str]]]) -> list[str]:
    """Make directory names, such as focal_seed-0; told apart by a hash where the values are no good for names."""
    short = short_keys(list(rows[0][1]))
    names = []
    for variant, chosen in rows:
        parts = [variant] if variant is not None else []
        parts += [f"{short[key]}-{value}" for key, value in chosen.items()]
        cleaned = [re.sub(r"[^A-Za-z0-9_.+-]+", "-", part).strip("-") for part in parts]
        names.append("_".join(cleaned) or "run")
    times = Counter(names)
    for i, (variant, chosen) in enumerate(rows):
        if times[names[i]] > 1 or len(names[i]) > 100:
            digest = hashlib.sha256(json.dumps([variant, chosen], sort_keys=True).encode()).hexdigest()[:8]
            names[i] = f"{names[i][:80]}_{digest}"
    return names


# ------------------------------------------------------------------------------------------------- manifest


def write_manifest(plan: Plan) -> None:
    """Write or replace the sweep's manifest, as a whole or not at all."""
    (plan.out / STATE_DIRECTORY).mkdir(parents=True, exist_ok=True)
    content = {
        "cfg": str(plan.cfg),
        "baseline": plan.baseline,
        "runs": [{"name": r.name, "variant": r.variant, "overrides": list(r.overrides)} for r in plan.runs],
    }
    with replacing(plan.out / MANIFEST) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(out: Path) -> Plan | None:
    """Read the plan that a sweep's directory holds, None if it holds none.

    Raises:
        ValueError: its manifest is damaged.
    """
    path = out / MANIFEST
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        runs = tuple(PlannedRun(r["name"], r["variant"], tuple(r["overrides"])) for r in content["runs"])
        return Plan(Path(content["cfg"]), out, content["baseline"], runs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, cannot be read as the manifest of a sweep ({error!r})") from error


def extend(old: Plan, new: Plan, decode: Decode) -> Plan:
    """Join the runs of both, those of the old plan first: a sweep may grow.

    A run is known by its resolved configuration, and keeps the name that it had, in whatever way it is asked for: with
    other axes their names are others.

    Raises:
        ValueError: the new plan contradicts the old one.
    """
    if old.cfg.resolve() != new.cfg.resolve():
        raise ValueError(f"{old.out} holds a sweep over {old.cfg}, not {new.cfg}: choose another --out")
    known = {_identity(values) for values in resolve_all(old, decode).values()}
    resolved = resolve_all(new, decode)
    added = [run for run in new.runs if _identity(resolved[run.name]) not in known]
    names = {run.name: run for run in old.runs}
    for run in added:
        if run.name in names:
            raise ValueError(
                f"{old.out} holds a run {run.name} with other overrides ({' '.join(names[run.name].overrides)}): "
                "choose another --out"
            )
    return Plan(old.cfg, old.out, new.baseline or old.baseline, (*old.runs, *added))
