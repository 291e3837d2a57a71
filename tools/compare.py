"""Table and learning curves of a sweep, or of any runs: python -m tools.compare runs/NAME --baseline KEY=VALUE.

Rows are told apart by the keys in which the runs' configurations differ; runs that differ in their seed only share a
row. Differences to the baseline come with a paired bootstrap interval over the validation images.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import config
from analysis.average_precision import MatchedDataset, average_precision, match_dataset
from analysis.bootstrap import Interval, paired_interval, resampled_precision, resamples
from analysis.detections_file import annotated_images, detections_by_image, read_rows
from analysis.matching import Floats
from engine.coco_metrics import GroundTruth, read_ground_truth
from engine.run_directory import DETECTIONS
from experiments.comparison import Group, collect, find_baseline, group, summarise, value_of
from experiments.curves import draw_learning_curves
from experiments.runs import Run
from experiments.tables import Comparison, Row, as_csv, as_latex, as_markdown, as_text

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
TOLERANCE = 0.02
"""Percent of AP by which detections may disagree with the metrics that were logged for them (they are rounded)."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="+", type=Path, help="sweeps, directories of runs, or runs")
    parser.add_argument("--baseline", help="row to compare with: a variant or key=value[,key=value]")
    parser.add_argument("--at", choices=("last", "best"), default="last", help="which evaluation counts (%(default)s)")
    parser.add_argument("--metrics", default=",".join(METRICS), help="columns (%(default)s)")
    parser.add_argument("--samples", type=int, default=1000, help="of the bootstrap; 0 for none (%(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (%(default)s)")
    parser.add_argument("--out", type=Path, help="directory for the files (default: the first path)")
    return parser


class Intervals:
    """Paired bootstrap intervals from the detections that runs have left behind."""

    def __init__(self, samples: int, confidence: float) -> None:
        self.samples, self.confidence = samples, confidence
        self.problems: dict[str, None] = {}
        self._truth: dict[str, GroundTruth] = {}
        self._resampled: dict[Path, Floats | None] = {}

    def between(self, one: Group, baseline: Group) -> Interval:
        """The difference in AP; without bounds where a run's detections are not at hand."""
        first, second = (summarise(g.finished, "AP", "last").values for g in (one, baseline))
        nothing = Interval(math.nan, math.nan, math.nan)
        if not first or not second:
            return nothing
        plain = Interval(sum(first) / len(first) - sum(second) / len(second), math.nan, math.nan)
        if not self.samples:
            return plain
        if len({str(run.config["data"]["val"]["annotations"]) for g in (one, baseline) for run in g.finished}) > 1:
            self.problems["no interval between runs on different validation sets"] = None
            return plain
        values = [self._of(run) for run in one.finished]
        others = [self._of(run) for run in baseline.finished]
        if any(value is None for value in [*values, *others]):
            return plain
        present, others_present = ([v for v in some if v is not None] for some in (values, others))
        return paired_interval(first, second, present, others_present, self.confidence)

    def _of(self, run: Run) -> Floats | None:
        """[samples] AP on the resamples; None if the run's detections cannot be used."""
        if run.directory not in self._resampled:
            try:
                matched = self._matched(run)
                print(f"resampling {run.directory.name} …", file=sys.stderr, flush=True)
                weights = resamples(matched.num_images, self.samples)
                self._resampled[run.directory] = resampled_precision(matched, weights)
            except (ValueError, OSError) as error:
                self.problems[f"no interval: {error}"] = None
                self._resampled[run.directory] = None
        return self._resampled[run.directory]

    def _matched(self, run: Run) -> MatchedDataset:
        rows = read_rows(run.directory / DETECTIONS)
        path = str(run.config["data"]["val"]["annotations"])
        if path not in self._truth:
            self._truth[path] = read_ground_truth(path)
        truth = self._truth[path]
        images = annotated_images(truth, truth.category_ids)
        found = detections_by_image(rows, [image.image_id for image in images], truth.category_ids)
        matched = match_dataset([image.objects for image in images], found, len(truth.category_ids))
        logged, own = value_of(run, "AP", "last"), 100 * average_precision(matched)
        if logged is None or abs(own - logged) > TOLERANCE:
            raise ValueError(
                f"{run.directory / DETECTIONS} gives AP {own:.2f}, not that of the last evaluation ({logged})"
            )
        return matched


def compare(args: argparse.Namespace) -> tuple[Comparison, list[Group]]:
    """All numbers of the table.

    Raises:
        ValueError: there is nothing to compare, or the baseline is not among the rows.
    """
    members, baseline = collect(args.paths, lambda cfg, overrides: config.to_dict(config.load(cfg, overrides)))
    groups = group(members)
    metrics = [name.strip() for name in args.metrics.split(",")]
    known = {key for member in members for record in member.run.evals for key in record}
    if not known:
        raise ValueError(f"none of the {len(members)} runs has been evaluated yet")
    if unknown := [name for name in metrics if name not in known]:
        raise ValueError(f"there is no metric '{unknown[0]}' among the evaluations")
    wanted = args.baseline or baseline
    index = find_baseline(groups, wanted) if wanted is not None else None
    intervals = Intervals(args.samples if args.at == "last" and metrics[0] == "AP" else 0, args.confidence)
    rows = []
    for i, one in enumerate(groups):
        summaries = {metric: summarise(one.finished, metric, args.at) for metric in metrics}
        difference = None
        if index is not None and i != index:
            base = summarise(groups[index].finished, metrics[0], args.at)
            difference = Interval(summaries[metrics[0]].mean - base.mean, math.nan, math.nan)
            if intervals.samples:
                difference = intervals.between(one, groups[index])
        rows.append(Row(one, summaries, difference, i == index))
    notes = [f"metrics of the {args.at} evaluation of each run"]
    if index is not None and intervals.samples:
        notes.append(
            f"Δ: difference of means to '{groups[index].label()}', with its {100 * args.confidence:g}% paired "
            f"bootstrap interval over validation images ({args.samples} resamples; the spread over seeds is not in it)"
        )
    notes.extend(intervals.problems)
    notes.extend(
        f"{run.directory.name} failed: {run.message}" for one in groups for run in one.runs if run.state == "failed"
    )
    return Comparison(rows, metrics, index is not None, args.confidence, notes), groups


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(arguments)
    try:
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
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_text(comparison))
    print(f"wrote {out}/comparison.{{md,csv,tex}} and {out}/learning_curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
