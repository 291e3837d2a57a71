"""Files of JSON lines, such as metrics.jsonl, read back: whatever a crash left half-written counts as absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file with one JSON object a line; a missing file has none, other lines are passed over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that is being written, or was when the process died
        if isinstance(record, dict):
            records.append(record)
    return records


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the (training, evaluation) records of a metrics.jsonl in the order of their steps.

    A run that was resumed repeats the steps since its checkpoint; of repeated records the later one counts.
    """
    kinds: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "eval": {}}
    for record in read_records(path):
        if record.get("kind") in kinds and isinstance(record.get("step"), int):
            kinds[record["kind"]][record["step"]] = record
    train, evals = ([by_step[step] for step in sorted(by_step)] for by_step in kinds.values())
    return train, evals
