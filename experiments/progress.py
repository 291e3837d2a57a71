"""How long a sweep will still take, from what its runs have logged so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from experiments.runs import Run


class Length(NamedTuple):
    """How long a run is to train."""

    unit: Literal["step", "epoch"]
    amount: float


def planned_length(values: Mapping[str, Any]) -> Length | None:
    """Of a resolved configuration; None if its schedule does not say."""
    schedule = values.get("schedule")
    if not isinstance(schedule, Mapping):
        return None
    if schedule.get("steps") is not None:
        return Length("step", schedule["steps"])
    return Length("epoch", schedule["epochs"]) if schedule.get("epochs") is not None else None


def seconds_left(
    all_runs: Sequence[Run], remaining: Sequence[tuple[Run, Length | None]], side_by_side: int
) -> float | None:
    """Time until the remaining runs are done.

    The pace is that of all steps (or epochs) logged so far, with their evaluations, whenever they were taken: a run
    that went on after an interruption counts with all of its time and all of its steps, and one of twice the length
    takes twice as long.

    Args:
        all_runs: of the sweep.
        remaining: those of them that run or wait, with their planned lengths.
        side_by_side: runs at the same time, at most.

    Returns:
        Seconds; None as long as nothing has been logged, or a length is unknown.
    """
    logged = [run for run in all_runs if run.train]
    seconds = sum(run.seconds for run in logged)
    total = 0.0
    for run, length in remaining:
        if length is None:
            return None
        amount = sum(other.train[-1][length.unit] for other in logged)
        if amount <= 0:
            return None
        done = run.train[-1][length.unit] if run.train else 0
        total += max(0.0, length.amount - done) * seconds / amount
    return total / max(1, min(side_by_side, len(remaining)))
