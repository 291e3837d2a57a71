"""One picture of a fork: how hot, of what, in which direction the branches' gradients are, and what they lead to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.style import COLOURS, COLUMN, LINE_STYLES, drawing
from engine.gradient_parts import PARTS
from experiments.fork import Record, angle_to

_PART_COLOURS = ("#D55E00", "#E69F00", "#56B4E9", "#999999")


def draw_fork(path: Path, records: Sequence[Record], found: Sequence[Record], baseline: str) -> None:
    """Draw six panels: gradient norm, its parts at the fork, angle, score and IoU, their correlation, AP.

    Args:
        path: PNG file to write.
        records: of ``fork.side_by_side``; curves are running means over a twentieth of the steps.
        found: ``fork.results`` of the same branches, in the order of the legend.
        baseline: name of the branch with which the others are compared.
    """
    names = [result["branch"] for result in found]
    steps = {name: [r for r in records if r["kind"] == "step" and r["branch"] == name] for name in names}
    layers = {name.partition("/")[0] for name in steps[names[0]][0]["diagnostics"] if name.startswith("decoder.")}
    last = max(layers, key=lambda layer: int(layer.removeprefix("decoder.")))

    def lines(axis: Any, label: str, value: Callable[[Record], float | None], style: str = "-") -> None:
        for i, own in enumerate(steps.values()):
            if points := [(record["step"], v) for record in own if (v := value(record)) is not None]:
                at, values = np.array(points).T
                width = max(1, len(points) // 20)
                mean = np.convolve(values, np.ones(width) / width, "valid")
                axis.plot(at[width - 1 :], mean, style, color=COLOURS[i % len(COLOURS)], label=names[i])
        axis.set(xlabel="step", ylabel=label)

    with drawing(path, 2, 3, 2.3 * COLUMN, 4.4) as (figure, axes):
        (norm, parts, angle), (plane, correlation, ap) = axes
        lines(norm, "gradient norm", lambda r: r["grad_norm"])
        lines(angle, f"angle to {_short(baseline)} (°)", lambda r: angle_to(r, baseline))
        lines(plane, "", lambda r: r["diagnostics"].get(f"{last}/iou_rank0"), LINE_STYLES[1])
        lines(plane, "best match: score (–), IoU (- -)", lambda r: r["diagnostics"].get(f"{last}/score_rank0"))
        spearman = f"{last}/score_iou_correlation"
        lines(correlation, "correlation of score and IoU", lambda r: r["diagnostics"].get(spearman))
        for axis in (norm, angle, plane):
            axis.set_ylim(bottom=0)
        for axis in (parts, ap):
            axis.set_yticks(range(len(names)), [_short(name) for name in names])
            axis.set_ylim(len(names) - 0.5, -0.5)
        _draw_parts(parts, found)
        ap.axvline(0, color="black", linewidth=0.6)
        for i, result in enumerate(found):
            value, low, high = (result.get(name, 0.0) for name in ("difference", "low", "high"))
            bars = None if math.isnan(low) else [[max(0.0, value - low)], [max(0.0, high - value)]]
            ap.errorbar([value], [i], xerr=bars, fmt="o", color=COLOURS[i % len(COLOURS)], capsize=2)
        ap.set(xlabel="ΔAP over images")
        figure.legend(*norm.get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(names)))


def _draw_parts(axis: Any, found: Sequence[Record]) -> None:
    """Stack each branch's shares of the gradient at the fork, those that pull the other way to the left of zero."""
    ends = np.zeros((2, len(found)))
    for part, colour in zip(PARTS, _PART_COLOURS, strict=True):
        shares = np.array([100 * result["shares"][part] for result in found])
        side = (shares < 0).astype(int)
        axis.barh(range(len(found)), shares, left=ends[side, range(len(found))], color=colour, label=part, height=0.6)
        ends[side, range(len(found))] += shares
    axis.set(xlabel="% of the gradient at the fork")
    axis.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=0.8, columnspacing=0.8)


def _short(name: str) -> str:
    return name if len(name) < 20 else f"{name[:18]}…"
