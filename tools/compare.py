"""Make a table and learning curves of a sweep, or of any runs.

    python -m tools.compare runs/NAME --baseline KEY=VALUE
    python -m tools.compare runs/A runs/B
    python -m tools.compare runs/NAME --metrics AP,AP75 --analysis analysis/*/analysis.json

Rows are told apart by the keys in which the configurations differ; runs that differ in their seed only share a row.
Differences from the baseline come with a paired bootstrap interval over the validation images.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import config
from analysis.bootstrap import Interval
from experiments import intervals
from experiments.comparison import Group, collect, find_baseline, group, seed_notes, summarise
from experiments.curves import draw_learning_curves
from experiments.measures import add_measures
from experiments.tables import Comparison, Row, as_csv, as_latex, as_markdown
from tools import console

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("compare", __doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="sweeps, folders of runs, or runs")
    parser.add_argument("--baseline", help="row to compare with: a variant or key=value[,key=value]")
    parser.add_argument("--at", choices=("last", "best"), default="last", help="which evaluation counts (%(default)s)")
    parser.add_argument("--metrics", default=",".join(METRICS), help="columns (%(default)s)")
    parser.add_argument(
        "--analysis",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="tools.analyze's analysis.json: more columns",
    )
    parser.add_argument("--samples", type=int, default=1000, help="resamples of the bootstrap, or 0 (%(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="confidence of the intervals (%(default)s)")
    parser.add_argument("--out", type=Path, help="directory for the files (default: the first path)")
    return parser


def compare(args: argparse.Namespace) -> tuple[Comparison, list[Group]]:
    """Gather all numbers of the table.

    Raises:
        ValueError: there is nothing to compare, or the baseline is not among the rows.
    """
    members, baseline = collect(args.paths, lambda cfg, overrides: config.to_dict(config.load(cfg, overrides)))
    groups = group(members)
    metrics = [name.strip() for name in args.metrics.split(",")]
    if args.analysis:
        metrics += add_measures(members, args.analysis)
    known = {key for member in members for record in member.run.evals for key in record}
    if not known:
        raise ValueError(f"none of the {len(members)} runs has been evaluated yet")
    if unknown := [name for name in metrics if name not in known]:
        raise ValueError(f"there is no metric '{unknown[0]}' among the evaluations")
    wanted = args.baseline or baseline
    index = find_baseline(groups, wanted) if wanted is not None else None
    # The first column is what rows are compared by, whatever it is.
    compared = [name for i, name in enumerate(metrics) if i == 0 or name in intervals.METRICS]
    bounds = intervals.Intervals(args.samples, args.confidence, _say)
    rows = []
    for i, one in enumerate(groups):
        summaries = {metric: summarise(one.finished, metric, args.at) for metric in metrics}
        differences = {}
        if index is not None and i != index:
            for metric in compared:
                base = summarise(groups[index].finished, metric, args.at)
                differences[metric] = Interval(summaries[metric].mean - base.mean, math.nan, math.nan)
                if args.at == "last":
                    differences[metric] = bounds.between(one, groups[index], metric)
        rows.append(Row(one, summaries, differences, i == index))
    notes = [f"metrics of the {args.at} evaluation of each run"]
    if index is not None:
        notes.extend(_about_differences(args, groups[index].label(), compared))
    notes.extend(bounds.problems)
    notes.extend(seed_notes(groups))
    notes.extend(
        f"{run.directory.name} failed: {run.message}" for one in groups for run in one.runs if run.state == "failed"
    )
    return Comparison(rows, metrics, compared if index is not None else [], notes), groups


def _about_differences(args: argparse.Namespace, label: str, compared: Sequence[str]) -> list[str]:
    """Say what Δ is, and why some have no interval."""
    text = f"Δ: difference of means to '{label}'"
    if not args.samples:
        return [text]
    if args.at != "last":
        return [f"{text}; no intervals: the detections that runs keep are those of their last evaluation"]
    without = [name for name in compared if name not in intervals.METRICS]
    notes = [f"no interval for {name}: there is one for {', '.join(intervals.METRICS)} only" for name in without]
    if len(without) < len(compared):
        text += (
            f", with its {100 * args.confidence:g}% paired bootstrap interval over validation images ({args.samples} "
            "resamples; the spread over seeds is not in it)"
        )
    return [text, *notes]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(arguments)
    if args.samples < 0 or not 0 < args.confidence < 1:
        raise ValueError("--samples must not be negative, and --confidence must lie between 0 and 1")
    comparison, groups = compare(args)
    out = args.out or args.paths[0]
    out.mkdir(parents=True, exist_ok=True)
    forms: dict[str, Any] = {"md": as_markdown, "csv": as_csv, "tex": as_latex}
    for ending, form in forms.items():
        (out / f"comparison.{ending}").write_text(form(comparison), encoding="utf-8")
    shown = [name for name in ("AP", "AP75") if name in comparison.metrics] or comparison.metrics[:1]
    draw_learning_curves(out / "learning_curves.png", groups, shown)
    print(as_markdown(comparison))
    print(f"wrote {out}/comparison.{{md,csv,tex}} and {out}/learning_curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
