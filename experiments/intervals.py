"""Paired bootstrap intervals between groups of runs, from the detections that the runs have left behind."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from analysis.average_precision import average_precision, match_dataset
from analysis.bootstrap import Interval, paired_interval, resampled_precision, resamples
from analysis.detections_file import annotated_images, detections_by_image, read_rows
from analysis.matching import IOU_THRESHOLDS, Floats
from engine.coco_metrics import read_ground_truth
from engine.runs.run_directory import DETECTIONS
from engine.whole_files import replacing
from experiments.comparison import Group, summarise, value_of
from experiments.runs import Run

RESAMPLED = "detections_resampled.npz"
"""Beside the detections: their AP on the resamples, which takes long where images are many."""
METRICS = ("AP", "AP50", "AP75")
"""Metrics that have intervals."""
TOLERANCE = 0.02
"""Percent of AP by which detections may disagree with the metrics that were logged for them (they are rounded)."""


class Intervals:
    """Intervals of differences in AP, AP50 and AP75, all from the same resamples of the validation images."""

    def __init__(self, samples: int, confidence: float, say: Callable[[str], None]) -> None:
        """Prepare; nothing is read yet.

        Args:
            samples: number of resamples; 0 for no intervals.
            confidence: share of the resamples between the bounds.
            say: is given lines of progress.
        """
        self.samples, self.confidence, self.say = samples, confidence, say
        self.problems: dict[str, None] = {}  # why intervals are missing, in the order in which that was found
        self._truth = functools.cache(read_ground_truth)
        self._resampled: dict[Path, Floats | None] = {}

    def between(self, one: Group, baseline: Group, metric: str) -> Interval:
        """Compare a metric of the last evaluations; without bounds where detections are not at hand."""
        first, second = (summarise(g.finished, metric, "last").values for g in (one, baseline))
        if not first or not second:
            return Interval(math.nan, math.nan, math.nan)
        plain = Interval(sum(first) / len(first) - sum(second) / len(second), math.nan, math.nan)
        if not self.samples or metric not in METRICS:
            return plain
        runs = [run for group in (one, baseline) for run in group.finished]
        paths = {_annotations(run) for run in runs}
        if None in paths:
            name = next(run.directory for run in runs if _annotations(run) is None)
            self.problems[f"no interval: the configuration of {name} names no data.val.annotations"] = None
            return plain
        if len(paths) > 1:
            self.problems["no interval between runs on different validation sets"] = None
            return plain
        resampled = [_of_metric(values, metric) for run in runs if (values := self._of(run)) is not None]
        if len(resampled) < len(runs):
            return plain
        count = len(one.finished)
        return paired_interval(first, second, resampled[:count], resampled[count:], self.confidence)

    def _of(self, run: Run) -> Floats | None:
        """Look up AP on the resamples, [samples, T], at each threshold; None if the run's detections cannot be used."""
        if run.directory not in self._resampled:
            try:
                self._resampled[run.directory] = self._read_or_make(run)
            except (ValueError, OSError) as error:
                self.problems[f"no interval: {error}"] = None
                self._resampled[run.directory] = None
        return self._resampled[run.directory]

    def _read_or_make(self, run: Run) -> Floats:
        path, annotations = run.directory / DETECTIONS, str(_annotations(run))
        rows = read_rows(path)
        # What resampled AP depends on.
        key = " ".join([hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (path, annotations)])
        key = f"{key} {self.samples}"
        kept = _read(run.directory / RESAMPLED, key)
        if kept is None:
            truth = self._truth(annotations)
            images = annotated_images(truth, truth.category_ids)
            found = detections_by_image(rows, [image.image_id for image in images], truth.category_ids)
            matched = match_dataset([image.objects for image in images], found, len(truth.category_ids))
            precision = 100 * average_precision(matched)
            _check(run, precision)
            self.say(f"resampling {run.directory.name} …")
            kept = precision, resampled_precision(matched, resamples(matched.num_images, self.samples))
            # It may be somebody else's run, that may only be read.
            with contextlib.suppress(OSError), replacing(run.directory / RESAMPLED) as new, new.open("wb") as file:
                np.savez(file, key=np.array(key), precision=np.array(precision), resampled=kept[1])
        _check(run, kept[0])
        return kept[1]


def _annotations(run: Run) -> str | None:
    node: object = run.config
    for key in ("data", "val", "annotations"):
        node = node.get(key) if isinstance(node, Mapping) else None
    return None if node is None else str(node)


def _of_metric(values: Floats, metric: str) -> Floats:
    """Select a metric, [samples], from AP at each threshold, [samples, T]."""
    if metric == "AP":
        return values.mean(axis=1)
    threshold = int(metric.removeprefix("AP")) / 100
    return values[:, int(np.abs(IOU_THRESHOLDS - threshold).argmin())]


def _check(run: Run, precision: float) -> None:
    """Raise ValueError if the detections are not those of the evaluation that counts."""
    logged = value_of(run, "AP", "last")
    if logged is None or abs(precision - logged) > TOLERANCE:
        raise ValueError(
            f"{run.directory / DETECTIONS} gives AP {precision:.2f}, not that of the last evaluation ({logged})"
        )


def _read(path: Path, key: str) -> tuple[float, Floats] | None:
    """(AP on all images, [samples, T] on the resamples) if they have been kept for this key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == key:
                return float(file["precision"]), file["resampled"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # it is not there, or damaged: it will be made anew
    return None
