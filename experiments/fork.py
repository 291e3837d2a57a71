"""Branches of one run, trained side by side from the same step on the same random numbers, and what sets them apart."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine import checkpoint, distributed
from engine.gradient_parts import PARTS, Match, cosines, gradient_parts
from engine.records import read_records
from engine.run_log import finite
from engine.runs.signals import StopRequest
from engine.step import seed_step
from engine.trainer import Trainer
from engine.whole_files import replacing
from experiments.comparison import Group, value_of
from experiments.intervals import Intervals
from experiments.runs import read_run
from structures import Batch, BatchSize

RECORDS, FIGURE = "fork.jsonl", "fork.png"
MATCHED_ON = 8
"""Steps over whose batches gradient norms are compared where weights are to match them."""

Record = dict[str, Any]


class Branch(NamedTuple):
    """A run that goes on from the fork."""

    trainer: Trainer
    match: Match
    """Of its criterion."""

    def parts(self, batches: Sequence[Batch], size: BatchSize) -> Record:
        """Norms and shares of the parts of the next step's gradient, on the random numbers that the step will have."""
        seed_step(self.trainer.seed, distributed.rank(), self.trainer.step)
        return gradient_parts(self.trainer.optimizer_step, self.match, batches, size)._asdict()

    def heat(self) -> dict[str, float]:
        """Root of the summed squares of the gradient norms of all class and all box terms, over the next batches."""
        trainer = self.trainer
        coming = trainer.loader.iterate(*divmod(trainer.step, trainer.steps_per_epoch))
        norms = []
        for batches in itertools.islice(coming, MATCHED_ON):
            size = BatchSize(max(1, sum(sum(batch.targets.counts) for batch in batches)), trainer.batch_size)
            norms.append(self.parts(batches, size)["norms"])
        return {name: math.hypot(*(norm[name] for norm in norms)) for name in ("classes_in_all", "boxes_in_all")}


def choose_checkpoint(source: Path, at: int | None) -> checkpoint.Loaded:
    """Read the latest checkpoint at or before step ``at`` (None: the latest), of a run directory or the file itself.

    Raises:
        ValueError: there is none.
    """
    names = (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST)
    paths = [source / name for name in names if (source / name).exists()] if source.is_dir() else [source]
    steps = {int(loaded.state["position"]["step"]): loaded for loaded in map(checkpoint.load, reversed(paths))}
    if fitting := [step for step in steps if at is None or step <= at]:
        checkpoint.check_goes_on(steps[max(fitting)])
        return steps[max(fitting)]
    found = f"its checkpoints are of step {', '.join(map(str, sorted(steps)))}" if steps else "it has no checkpoint"
    raise ValueError(f"{source}: {found}, and --at {at} needs one at or before that step")


def go_on(trainer: Trainer, at: int) -> Path:
    """Train up to step ``at`` and leave a checkpoint there; returns its path."""
    with StopRequest() as stop:
        for _ in trainer.steps(stop):
            if trainer.step == at:
                break
    checkpoint.write(trainer.directory, trainer.state_dict())
    return trainer.directory / checkpoint.LAST


def side_by_side(branches: Mapping[str, Branch], every: int, at: int, known: int) -> Iterator[Record]:
    """Train all branches to their ends, a step of each after the other.

    Args:
        branches: with the same seed and the same data, logging every step.
        every: steps between two times at which gradients are taken apart, the first step being one.
        at: step of the fork.
        known: step up to which records are there already, and at or before which each branch is.

    Yields:
        For each further step of each branch ``kind`` step, ``branch``, ``step``, what the trainer logs, ``cosines``
        between its gradient and those of the others, each at its own weights, now and then ``norms`` and ``shares``.
    """
    with StopRequest() as stop:
        streams = {name: branch.trainer.steps(stop) for name, branch in branches.items()}
        coming = {name: next(stream, None) for name, stream in streams.items()}
        for name, branch in branches.items():
            while branch.trainer.step < known:
                coming[name] = next(streams[name], None)
        for taken in itertools.count(known - at):
            parts: dict[str, Record] = {}
            for name, ready in coming.items():
                if ready is None:
                    return
                parts[name] = {} if taken % every else branches[name].parts(*ready)
                coming[name] = next(streams[name], None)
            rows = cosines([branch.trainer.optimizer_step for branch in branches.values()]).tolist()
            for (name, part), row in zip(parts.items(), rows, strict=True):
                trainer, others = branches[name].trainer, dict(zip(parts, row, strict=True))
                del others[name]
                yield {
                    "kind": "step",
                    "branch": name,
                    "step": trainer.step,
                    **trainer.record,
                    "cosines": others,
                    **part,
                }


def forget_unfinished(path: Path, names: Sequence[str], at: int) -> int:
    """Remove results and records of steps that not all branches have; returns the last step that all have.

    Args:
        path: of fork.jsonl.
        names: of the branches.
        at: step of the fork.
    """
    records = read_records(path)
    taken = {(record["branch"], record["step"]) for record in records if record["kind"] == "step"}
    last = at
    while all((name, last + 1) in taken for name in names):
        last += 1
    kept = [r for r in records if r["kind"] in ("fork", "branch") or (r["kind"] == "step" and r["step"] <= last)]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8")
    return last


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to fork.jsonl; numbers that are not finite are null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(record), ensure_ascii=False) + "\n")


def results(
    directories: Mapping[str, Path], records: Sequence[Record], baseline: str, intervals: Intervals
) -> list[Record]:
    """Sum up each finished branch.

    Args:
        directories: of the branches.
        records: of :func:`side_by_side`.
        baseline: the branch with which the others are compared.
        intervals: makes the intervals of differences in AP over the validation images.

    Returns:
        ``kind`` result, ``branch``, ``AP``, its ``difference`` to the baseline's with ``low`` and ``high``, the
        ``norms``, ``shares`` and ``angle`` (to the baseline's gradient, in degrees) of the first step, and
        ``angle_later``, the mean over the others; None for what is not known.
    """
    groups = {name: Group(name, {}, [read_run(directory)]) for name, directory in directories.items()}
    found = []
    for name, one in groups.items():
        own = [record for record in records if record["kind"] == "step" and record["branch"] == name]
        first, *angles = [angle_to(record, baseline) for record in own]
        later = [angle for angle in angles if angle is not None]
        interval = intervals.between(one, groups[baseline], "AP")._asdict() if name != baseline else {}
        found.append({
            "kind": "result", "branch": name, "AP": value_of(one.runs[0], "AP", "last"), **interval, "angle": first,
            "angle_later": sum(later) / len(later) if later else None,
            "norms": own[0]["norms"], "shares": own[0]["shares"],
        })  # fmt: skip
    return found


def angle_to(record: Record, other: str) -> float | None:
    """Angle in degrees between the gradients of a record's branch and of another; None where it is not known."""
    cosine = record["cosines"].get(other)
    return None if cosine is None else math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def table(found: Sequence[Record], baseline: str) -> str:
    """Lay :func:`results` out for a terminal."""
    base = next(result for result in found if result["branch"] == baseline)["norms"]["total"] or math.nan

    def text(value: float | None, form: str) -> str:
        return "–" if value is None or math.isnan(value) else format(value, form)

    lines = [["branch", "gradient", *PARTS, "angle", "later", "AP", "ΔAP"]]
    for result in found:
        low, high = (text(result.get(bound), "+.2f") for bound in ("low", "high"))
        lines.append([
            result["branch"], text(result["norms"]["total"] / base, ".2f"),
            *(text(result["shares"][part], ".0%") for part in PARTS),
            *(text(result[name], ".0f") for name in ("angle", "angle_later")), text(result["AP"], ".2f"),
            "baseline" if result["branch"] == baseline else f"{text(result['difference'], '+.2f')} [{low}, {high}]",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
