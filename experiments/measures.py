"""What ``tools.analyze`` measured of runs, as further metrics of theirs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.comparison import Member

LOWER_IS_BETTER = ("calibration", "duplicates")


def add_measures(members: Sequence[Member], files: Sequence[Path]) -> list[str]:
    """Add to the last evaluation of each run what was measured of a checkpoint in its directory.

    Args:
        members: the runs.
        files: ``analysis.json`` of any number of analyses.

    Returns:
        Names of the added metrics; all of them are in percent.

    Raises:
        ValueError: a file is no analysis, or a run was measured twice, or some runs with evaluations were not measured.
    """
    measures: dict[Path, dict[str, float | None]] = {}
    for file in files:
        try:
            checkpoints = json.loads(file.read_text(encoding="utf-8"))["checkpoints"]
            found = {Path(entry["path"]).resolve().parent: _measures(entry) for entry in checkpoints}
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{file}: not a file of tools.analyze as it is written now ({error!r:.80})") from error
        if twice := found.keys() & measures.keys():
            raise ValueError(f"{file}: {min(twice).name} is in another of these analyses already")
        measures |= found
    without = []
    for member in members:
        own = measures.get(member.run.directory.resolve())
        if own is not None and member.run.evals:
            member.run.evals[-1].update(own)
        elif member.run.evals:
            without.append(member.run.directory.name)
    if without:
        raise ValueError(f"not in these analyses: {', '.join(without)} (python -m tools.analyze --resume …)")
    return list(dict.fromkeys(name for own in measures.values() for name in own))


def _measures(entry: Any) -> dict[str, float | None]:
    """Select those of one checkpoint; None where one is not defined."""
    best, confident, oracle = entry["best_regressed"], entry["misalignment"]["most_confident"], entry["oracle"]
    (within,) = (name for name in best if name.startswith("recall_within_"))
    shares = {
        "recall N": best["recall"]["N"]["IoU>=0"],
        "recall 2N": best["recall"]["2N"]["IoU>=0"],
        f"N within {within.rpartition('_')[2]}": best[within]["N"],
        "Spearman": confident and confident["spearman"],
        "calibration": confident and confident["calibration_error"],
    }
    percent = {name: None if value is None else 100 * value for name, value in shares.items()}
    others = {"aligned AP": oracle["matched_by_iou"], "AP after NMS": oracle["after_nms"]}
    return {**percent, **others, "duplicates": entry["errors"]["cost"]["duplicate"]}
