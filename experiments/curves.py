"""Learning curves of groups of runs on one picture, with bands over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from analysis.style import COLOURS, COLUMN, FONT, LINE_STYLES, MARKERS, drawing
from experiments.comparison import Group
from experiments.runs import Run


class Curve(NamedTuple):
    """Mean and spread of a metric over runs, at the epochs that all of them have evaluated."""

    epochs: list[float]
    means: list[float]
    deviations: list[float]
    """Standard deviations of the sample; 0 for a single run."""
    runs: int
    """Number of runs that contribute."""


def learning_curve(runs: Sequence[Run], metric: str) -> Curve:
    """Make the curve of some runs, unfinished ones included; empty if they share no evaluation."""
    by_run = [{r["epoch"]: r[metric] for r in run.evals if r.get(metric) is not None} for run in runs]
    by_run = [values for values in by_run if values]
    shared = sorted(set.intersection(*(set(values) for values in by_run))) if by_run else []
    columns = [[values[epoch] for values in by_run] for epoch in shared]
    return Curve(
        shared,
        [statistics.fmean(column) for column in columns],
        [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns],
        len(by_run),
    )


def draw_learning_curves(path: Path, groups: Sequence[Group], metrics: Sequence[str]) -> None:
    """One panel for each metric, one line for each group, with a band of one standard deviation over seeds.

    Args:
        path: PNG file to write.
        groups: in the order of the legend; those of which no run has been evaluated are left out.
        metrics: in percent.
    """
    # The legend stands in a column of its own: labels may be long and many.
    width = COLUMN * len(metrics) + 0.045 * max(len(group.label()) for group in groups) + 0.6
    with drawing(path, 1, len(metrics), width, 2.5) as (_, axes):
        for axis, metric in zip(axes[0], metrics, strict=True):
            for i, group in enumerate(groups):
                _draw_group(axis, group, metric, i)
            axis.set(xlabel="epoch", ylabel=f"{metric} (%)")
            axis.set_ylim(bottom=max(0.0, axis.get_ylim()[0]))
        if axes[0][-1].lines:
            axes[0][-1].legend(
                loc="center left", bbox_to_anchor=(1.02, 0.5), title="mean ± std (runs)", title_fontsize=FONT
            )


def _draw_group(axis: Any, group: Group, metric: str, index: int) -> None:
    runs = group.finished or group.runs
    curve = learning_curve(runs, metric)
    if not curve.epochs:
        return
    colour = COLOURS[index % len(COLOURS)]
    style = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
    marker = MARKERS[index % len(MARKERS)]
    of_all = f" of {len(group.runs)}" if curve.runs < len(group.runs) else ""
    label = f"{group.label()} ({curve.runs}{of_all})"
    axis.plot(curve.epochs, curve.means, style, color=colour, marker=marker, label=label)
    low = [mean - deviation for mean, deviation in zip(curve.means, curve.deviations, strict=True)]
    high = [mean + deviation for mean, deviation in zip(curve.means, curve.deviations, strict=True)]
    axis.fill_between(curve.epochs, low, high, color=colour, alpha=0.18, linewidth=0)
