"""Which evaluation was the best so far, by the metric that the configuration names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import index
from typing import Any

from engine.loggers import flat

Best = dict[str, Any]
"""The best value, under the metric's name, its ``step``, and ``since``, the evaluations without a gain after it."""


def updated(best: Best | None, metric: str, metrics: Mapping[str, Any], step: int) -> tuple[Best, bool]:
    """The best after one more evaluation, and whether that is this one.

    Where there is nothing to measure, every other evaluation is better.

    Raises:
        ValueError: evaluations have no such number.
    """
    known = dict(flat(metrics))
    if metric not in known:
        raise ValueError(f"trainer.best_metric={metric} is not measured, but {', '.join(list(known)[:20])}, …")
    sign = -1.0 if metric.startswith(("loss", "terms/")) else 1.0
    value = known[metric]
    value = -sign * math.inf if value is None or math.isnan(value) else float(value)
    if best is None or sign * value > sign * best[metric]:
        return {metric: value, "step": step, "since": 0}, True
    return {**best, "since": best["since"] + 1}, False


def restored(best: Mapping[str, Any] | None, metric: str) -> Best | None:
    """That of a checkpoint, perhaps of an earlier version; None if it was the best in something else."""
    if best is None or metric not in best:
        return None
    return {metric: float(best[metric]), "step": index(best["step"]), "since": index(best.get("since", 0))}
