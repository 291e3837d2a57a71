"""The figures of the analysis, each for any number of checkpoints side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.best_regressed import SIZES, recall
from analysis.error_types import ERRORS
from analysis.misalignment import BINS, joint_density
from analysis.report import FACTORS, LEAST_IOUS, Report
from analysis.style import COLOURS, COLUMN, FONT, LINE_STYLES, MARKERS, drawing

HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++")
POPULATION_NAMES = {"best_regressed": "best-regressed", "most_confident": "N most confident"}


def draw_all(directory: Path, reports: Sequence[Report]) -> list[Path]:
    """Draw every figure into ``directory`` and return the files."""
    figures: dict[str, Callable[[Path, Sequence[Report]], None]] = {
        "best_regressed_recall": draw_recall,
        "iou_histograms": draw_histograms,
        "score_iou": draw_joint_density,
        "error_types": draw_errors,
    }
    for name, draw in figures.items():
        draw(directory / f"{name}.png", reports)
    return [directory / f"{name}.png" for name in figures]


def draw_recall(path: Path, reports: Sequence[Report]) -> None:
    """Draw the recall of best-regressed samples by their IoU (left) and by the size of the target (right)."""
    with drawing(path, 1, 2, 2 * COLUMN, 2.5, sharey=True) as (figure, axes):
        by_iou, by_size = axes[0]
        series, handles = {}, []
        for i, report in enumerate(reports):
            for factor, style in zip(FACTORS, LINE_STYLES, strict=False):
                values = [_percent(recall(report.best, factor, least)) for least in LEAST_IOUS]
                label = f"{report.label}, top {'N' if factor == 1 else '2N'}"
                handles += by_iou.plot(
                    range(len(LEAST_IOUS)), values, style, color=COLOURS[i], marker=MARKERS[i], label=label
                )
                series[label] = [_percent(recall(report.best, factor, size=size)) for size in SIZES]
        by_iou.set_xticks(range(len(LEAST_IOUS)), ["any", *(f"≥ {least:g}" for least in LEAST_IOUS[1:])])
        by_iou.set(xlabel="IoU of the best-regressed query", ylabel="recall (%)", ylim=(0, 102))
        colours = [COLOURS[i] for i in range(len(reports)) for _ in FACTORS]
        hatches = [HATCHES[k] for _ in reports for k in range(len(FACTORS))]
        area = reports[0].best.area
        numbers = [int(((area >= low) & (area < high)).sum()) for low, high in SIZES.values()]
        names = [f"{size}\n({number})" for size, number in zip(SIZES, numbers, strict=True)]
        bars = _bars(by_size, names, series, colours, hatches)
        by_size.set(xlabel="size of the target (number of targets)", ylabel="recall (%)")
        by_size.tick_params(labelleft=True)
        pairs = list(zip(handles, bars, strict=True))
        _legend_above(figure, pairs, list(series))


def draw_histograms(path: Path, reports: Sequence[Report]) -> None:
    """Draw the IoU of the best-regressed and of the most confident queries with their targets."""
    edges = np.linspace(0, 1, BINS + 1)
    columns = min(len(reports), 2)
    rows = math.ceil(len(reports) / columns)
    with drawing(path, rows, columns, COLUMN * columns, 1.9 * rows + 0.4, sharey=True) as (_, axes):
        highest = 0.0
        for axis in axes.ravel()[len(reports) :]:
            axis.set_axis_off()
        for axis, report in zip(axes.ravel(), reports, strict=False):
            for k, (name, title) in enumerate(POPULATION_NAMES.items()):
                found = report.alignments[name]
                if found is None:
                    continue
                share = 100 * found.histogram / found.queries
                highest = max(highest, float(share.max()))
                axis.stairs(share, edges, fill=True, alpha=0.3, color=COLOURS[k])
                label = f"{title}, mean {found.mean_iou:.2f}"
                axis.stairs(share, edges, color=COLOURS[k], linewidth=1.1, label=label, linestyle=LINE_STYLES[k])
            axis.set(title=report.label, xlabel="IoU with the target", xlim=(0, 1), ylabel="queries (%)")
            axis.tick_params(labelleft=True)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(loc="upper left")
        # Room for the legend above the highest bar: the panels share their scale.
        axes[0][0].set_ylim(0, 1.35 * highest or 1.0)


def draw_joint_density(path: Path, reports: Sequence[Report]) -> None:
    """Draw score against IoU of both populations: a density with marginals, its scale shared by all panels."""
    rows = list(POPULATION_NAMES)
    densities = [[joint_density(*report.populations[name]) for report in reports] for name in rows]
    highest = max(float(density.max()) for row in densities for density in row) or 1.0
    width = COLUMN * max(len(reports), 1.2)
    with drawing(path, len(rows), len(reports), width, 2.9 * len(rows)) as (figure, axes):
        image = None
        for r, name in enumerate(rows):
            for c, report in enumerate(reports):
                image = _joint_panel(axes[r][c], 100 * densities[r][c], 100 * highest)
                found = report.alignments[name]
                numbers = "no queries"
                if found is not None:
                    rho = "undefined" if found.spearman is None else f"{found.spearman:.2f}".replace("-", "−")
                    numbers = f"Spearman {rho}, calibration error {found.calibration_error:.2f}"
                axes[r][c].set_title(f"{report.label}: {POPULATION_NAMES[name]}\n{numbers}", pad=4, fontsize=FONT)
        label = "queries in a cell (%), square-root scale"
        figure.colorbar(image, ax=axes.ravel().tolist(), label=label, shrink=0.6, aspect=30)


def _joint_panel(axis: Any, density: Any, highest: float) -> Any:
    """Draw a density with histograms of score (above) and IoU (right) along its edges."""
    from matplotlib.colors import PowerNorm

    # A square-root scale: most queries sit in few cells, the others are what one looks for.
    image = axis.imshow(
        density.T, origin="lower", extent=(0, 1, 0, 1), cmap="cividis", aspect="equal",
        norm=PowerNorm(0.5, vmin=0, vmax=highest),
    )  # fmt: skip
    axis.plot([0, 1], [0, 1], color="white", linewidth=0.7, linestyle="--")
    axis.set(xlabel="score", ylabel="IoU with the target", xticks=np.linspace(0, 1, 5), yticks=np.linspace(0, 1, 5))
    axis.grid(False)
    edges = np.linspace(0, 1, len(density) + 1)
    for marginal, place, orientation in (
        (density.sum(axis=1), (0.0, 1.02, 1.0, 0.14), "vertical"),
        (density.sum(axis=0), (1.02, 0.0, 0.14, 1.0), "horizontal"),
    ):
        inset = axis.inset_axes(place)
        inset.stairs(marginal, edges, orientation=orientation, fill=True, color=COLOURS[0], alpha=0.6)
        (inset.set_xlim if orientation == "vertical" else inset.set_ylim)(0, 1)
        inset.set_axis_off()
    return image


def draw_errors(path: Path, reports: Sequence[Report]) -> None:
    """Draw what each kind of error costs (left) and how often it occurs among confident detections (right)."""
    with drawing(path, 1, 2, 2 * COLUMN, 2.5) as (figure, axes):
        cost, count = axes[0]
        series = {report.label: [report.errors.cost[name] for name in ERRORS] for report in reports}
        bars = _bars(cost, ERRORS, series, COLOURS, HATCHES, numbers="{:.1f}")
        cost.set(ylabel="AP50 to be gained (points)")
        series = {report.label: [float(report.errors.confident_counts[name]) for name in ERRORS] for report in reports}
        _bars(count, ERRORS, series, COLOURS, HATCHES, numbers="{:.0f}")
        count.set(ylabel=f"errors with a score ≥ {reports[0].errors.threshold:g}")
        for axis in (cost, count):
            axis.set_xticks(axis.get_xticks(), ERRORS, rotation=30, ha="right", rotation_mode="anchor")
        _legend_above(figure, bars, list(series))


def _legend_above(figure: Any, handles: Sequence[Any], labels: list[str]) -> None:
    """Draw one legend for all panels, in fewer columns where labels are long; a tuple of handles stands for both."""
    from matplotlib.legend_handler import HandlerTuple

    # In points: the handle with its margins, and about half the size of the font for each letter.
    entry = 6 * FONT + 0.55 * FONT * max(len(label) for label in labels)
    columns = max(1, min(4, len(labels), int(72 * figure.get_figwidth() / entry)))
    figure.legend(
        list(handles), labels, loc="outside upper center", ncols=columns,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.4)}, handlelength=3.2,
    )  # fmt: skip


def _percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def _bars(
    axis: Any,
    names: Sequence[str],
    series: dict[str, list[float]],
    colours: Sequence[str],
    hatches: Sequence[str],
    numbers: str | None = None,
) -> list[Any]:
    """Draw groups of bars, one group a name, one bar a series; return the bars of each series.

    ``numbers`` is the format of the values above the bars, for which there is room with up to four series.
    """
    width = 0.8 / max(len(series), 1)
    drawn = []
    for i, (label, values) in enumerate(series.items()):
        places = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
        bars = axis.bar(
            places, values, width * 0.92, label=label, color=colours[i % len(colours)], alpha=0.8,
            hatch=hatches[i % len(hatches)], edgecolor="white", linewidth=0,
        )  # fmt: skip
        if numbers is not None and len(series) <= 4:
            texts = ["" if np.isnan(value) else numbers.format(value) for value in values]
            axis.bar_label(bars, texts, fontsize=FONT - 1.5, padding=1.5, rotation=0 if len(series) <= 2 else 90)
        drawn.append(bars)
    if numbers is not None:
        axis.margins(y=0.12 if len(series) <= 2 else 0.25)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.5, max(len(names), 1) - 0.5)
    axis.grid(False, axis="x")
    return drawn
