"""Groups of runs that differ in their seed only, and what separates one group from another."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine.runs.run_directory import METRICS
from experiments.plan import Decode, Plan, read_manifest, short_keys, without_machine
from experiments.runs import Run, find_runs, read_run
from strict_yaml import read_value

At = Literal["last", "best"]
SEED = "seed"
ABSENT = "–"
"""Shown for a key that a run's configuration does not have."""


class Member(NamedTuple):
    """A run among those to compare."""

    run: Run
    variant: str | None
    """Name of its variant in the sweep file."""
    config: dict[str, Any]
    """Flat, without what does not change the result; empty if unknown."""


class Group(NamedTuple):
    """Runs that differ in nothing but their seed."""

    variant: str | None
    settings: dict[str, Any]
    """Values of the keys that differ between groups."""
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.state == "done"]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the finished runs, in order; runs whose configuration is not known have none."""
        return tuple(sorted(run.config[SEED] for run in self.finished if isinstance(run.config.get(SEED), int)))

    def label(self) -> str:
        """For legends: the variant, and the settings."""
        parts = [] if self.variant is None else [self.variant]
        short = short_keys(list(self.settings))
        return ", ".join([*parts, *(f"{short[k]}={text_of(v)}" for k, v in self.settings.items())]) or "all runs"

    def status(self) -> str:
        """How many runs the numbers rest on, and what became of the others."""
        others = [
            state for state in ("failed", "running", "unfinished", "missing") for run in self.runs if run.state == state
        ]
        counts = [f"{others.count(state)} {state}" for state in dict.fromkeys(others)]
        return ", ".join([f"{len(self.finished)}", *counts])


class Summary(NamedTuple):
    """Mean and spread of a metric over the runs of a group."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample; NaN for fewer than two runs."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


def collect(paths: Sequence[Path], decode: Decode | None = None) -> tuple[list[Member], str | None]:
    """Collect the runs of sweeps, of directories of runs, and single runs; and the baseline that a sweep names.

    Args:
        paths: of sweeps, directories that hold run directories, or run directories.
        decode: resolves the configurations of planned runs that have not begun.

    Raises:
        ValueError: a path does not exist, or holds no run.
    """
    members: list[Member] = []
    baseline = None
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path}: there is no such directory")
        plan = read_manifest(path)
        if plan is not None:
            members.extend(_planned(plan, decode))
            baseline = baseline or plan.baseline
            continue
        directories = find_runs(path)
        if not directories:
            raise ValueError(f"{path}: holds neither a sweep nor a run (a directory with {METRICS})")
        members.extend(Member(run, None, without_machine(run.config)) for run in map(read_run, directories))
    return members, baseline


def check_baseline(plan: Plan, resolved: Mapping[str, Mapping[str, Any]]) -> None:
    """See before the first run starts that the plan's baseline will be found among the rows.

    Args:
        plan: of the sweep.
        resolved: configuration of each run, by name.

    Raises:
        ValueError: no row, or more than one, fits.
    """
    if plan.baseline is not None:
        nothing = Run(plan.out, "missing", "", {}, [], [])
        members = [Member(nothing, run.variant, without_machine(resolved[run.name])) for run in plan.runs]
        find_baseline(group(members), plan.baseline)


def _planned(plan: Plan, decode: Decode | None) -> list[Member]:
    members = []
    for planned in plan.runs:
        run = read_run(plan.directory(planned), plan.outcome_file(planned))
        config = run.config
        if not config and decode is not None:
            try:
                config = decode(plan.cfg, planned.overrides)
            except ValueError:  # the configuration file has moved or changed since
                config = {}
        members.append(Member(run, planned.variant, without_machine(config)))
    return members


def differing_keys(members: Sequence[Member]) -> list[str]:
    """Keys whose values differ between runs, the seed aside, in the order of the configuration.

    Where there are variants, keys that are constant within each variant are explained by its name and left out.
    """
    known = [member for member in members if member.config]
    keys = dict.fromkeys(key for member in known for key in member.config if key != SEED)
    variants = {member.variant for member in known}

    def varies(key: str, some: Sequence[Member]) -> bool:
        return len({_comparable(member.config.get(key, ABSENT)) for member in some}) > 1

    if variants == {None}:
        return [key for key in keys if varies(key, known)]
    return [key for key in keys if any(varies(key, [m for m in known if m.variant == variant]) for variant in variants)]


def group(members: Sequence[Member]) -> list[Group]:
    """Gather runs that differ in their seed only, in the order in which they first appear."""
    keys = differing_keys(members)
    groups: dict[str, Group] = {}
    for member in members:
        settings = {key: member.config.get(key, ABSENT) for key in keys}
        identity = json.dumps([member.variant, settings], sort_keys=True)
        groups.setdefault(identity, Group(member.variant, settings, [])).runs.append(member.run)
    return list(groups.values())


def seed_notes(groups: Sequence[Group]) -> list[str]:
    """Tell a reader about the seeds: whether rows rest on different ones, or on one more than once."""
    rows = [one for one in groups if one.seeds]
    notes = []
    if len({tuple(dict.fromkeys(one.seeds)) for one in rows}) > 1:
        listed = "; ".join(f"{one.label()}: {', '.join(map(str, dict.fromkeys(one.seeds)))}" for one in rows)
        notes.append(f"rows rest on different seeds ({listed}), so that part of a difference may be theirs")
    for one in rows:
        notes.extend(
            f"{one.label()}: {one.seeds.count(seed)} runs have seed {seed} and count as if their seeds were different"
            for seed in dict.fromkeys(one.seeds)
            if one.seeds.count(seed) > 1
        )
    return notes


def summarise(runs: Sequence[Run], metric: str, at: At) -> Summary:
    """Summarise a metric over finished runs; those without it (no such objects) do not count."""
    values = [value for run in runs if (value := value_of(run, metric, at)) is not None]
    return Summary(tuple(values))


def value_of(run: Run, metric: str, at: At) -> float | None:
    """Select a metric of a run's last evaluation, or of the one with the highest AP."""
    evals = [record for record in run.evals if record.get("AP") is not None]
    if not evals:
        return None
    record = evals[-1] if at == "last" else max(evals, key=lambda r: r["AP"])
    return record.get(metric)


def find_baseline(groups: Sequence[Group], text: str) -> int:
    """Index of the group that ``text`` names: a variant, ``key=value[,key=value…]``, or both.

    Keys may be shortened to their last parts.

    Raises:
        ValueError: no group, or more than one, fits.
    """
    wanted = [part.strip() for part in text.split(",")]
    fitting = [i for i, candidate in enumerate(groups) if all(_fits(candidate, part) for part in wanted)]
    if len(fitting) == 1:
        return fitting[0]
    labels = "; ".join(candidate.label() for candidate in groups)
    problem = "nothing fits" if not fitting else f"{len(fitting)} rows fit"
    raise ValueError(f"baseline '{text}': {problem}; the rows are: {labels}")


def _fits(candidate: Group, part: str) -> bool:
    key, separator, value = part.partition("=")
    if not separator:
        return candidate.variant == part
    wanted = _comparable(read_value(value, "baseline"))
    return any(
        (own == key or own.endswith(f".{key}")) and (_comparable(found) == wanted or text_of(found) == value)
        for own, found in candidate.settings.items()
    )


def _comparable(value: Any) -> str:
    """1 and 1.0 are the same, lists and mappings are compared by content."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    return json.dumps(value, sort_keys=True)


def text_of(value: Any) -> str:
    """Write a value of a configuration for people."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {text_of(item)}" for key, item in value.items()) + "}"
    return str(value)
