"""The figures of the analysis, each for any number of checkpoints side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.average_precision import RECALLS
from analysis.best_regressed import SIZES, recall
from analysis.error_types import ERRORS
from analysis.matching import IOU_THRESHOLDS
from analysis.misalignment import BINS, CALIBRATION_BINS, joint_density
from analysis.report import FACTORS, LEAST_IOUS, Report
from analysis.style import COLOURS, COLUMN, FONT, LINE_STYLES, MARKERS, drawing

HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++")
POPULATION_NAMES = {"best_regressed": "best-regressed", "most_confident": "N most confident"}


def draw_all(directory: Path, reports: Sequence[Report]) -> list[Path]:
    """Draw every figure into ``directory``; returns the files."""
    figures: dict[str, Callable[[Path, Sequence[Report]], None]] = {
        "best_regressed_recall": draw_recall,
        "iou_histograms": draw_histograms,
        "score_iou": draw_joint_density,
        "calibration": draw_calibration,
        "oracle": draw_oracle,
        "error_types": draw_errors,
        "precision_recall": draw_precision_recall,
        "per_class": draw_per_class,
    }
    paths = []
    for name, draw in figures.items():
        path = directory / f"{name}.png"
        draw(path, reports)
        paths.append(path)
    return paths


def draw_recall(path: Path, reports: Sequence[Report]) -> None:
    """Recall of best-regressed samples by their IoU (left) and by the size of the target (right)."""
    with drawing(path, 1, 2, 2 * COLUMN, 2.3, sharey=True) as (_, axes):
        by_iou, by_size = axes[0]
        for i, report in enumerate(reports):
            for factor, style in zip(FACTORS, LINE_STYLES, strict=False):
                values = [_percent(recall(report.best, factor, least)) for least in LEAST_IOUS]
                label = f"{report.label}, top {'N' if factor == 1 else '2N'}"
                by_iou.plot(range(len(LEAST_IOUS)), values, style, color=COLOURS[i], marker=MARKERS[i], label=label)
        by_iou.set_xticks(range(len(LEAST_IOUS)), ["any", *(f"≥ {least:g}" for least in LEAST_IOUS[1:])])
        by_iou.set(xlabel="IoU of the best-regressed query", ylabel="recall (%)", ylim=(0, 102))
        by_iou.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        series = {
            f"{report.label}, top {'N' if factor == 1 else '2N'}": [
                _percent(recall(report.best, factor, size=size)) for size in SIZES
            ]
            for report in reports
            for factor in FACTORS
        }
        colours = [COLOURS[i] for i in range(len(reports)) for _ in FACTORS]
        hatches = [HATCHES[k] for _ in reports for k in range(len(FACTORS))]
        _bars(by_size, list(SIZES), series, colours, hatches)
        by_size.set(xlabel="size of the target")
        by_size.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def draw_histograms(path: Path, reports: Sequence[Report]) -> None:
    """IoU of the best-regressed and of the most confident queries with their targets."""
    edges = np.linspace(0, 1, BINS + 1)
    height = 2.2
    with drawing(path, 1, len(reports), max(COLUMN, 2.4 * len(reports)), height, sharey=True) as (_, axes):
        for axis, report in zip(axes[0], reports, strict=True):
            for k, (name, title) in enumerate(POPULATION_NAMES.items()):
                found = report.alignments[name]
                if found is None:
                    continue
                share = 100 * found.histogram / found.queries
                axis.stairs(share, edges, fill=True, alpha=0.3, color=COLOURS[k])
                label = f"{title}, mean {found.mean_iou:.2f}"
                axis.stairs(share, edges, color=COLOURS[k], linewidth=1.1, label=label, linestyle=LINE_STYLES[k])
            axis.set(title=report.label, xlabel="IoU with the target", xlim=(0, 1))
            axis.legend(loc="upper left")
        axes[0][0].set_ylabel("queries (%)")


def draw_joint_density(path: Path, reports: Sequence[Report]) -> None:
    """Score against IoU of both populations: a density with marginals, its scale shared by all panels."""
    rows = list(POPULATION_NAMES)
    densities = [[joint_density(*report.populations[name]) for report in reports] for name in rows]
    highest = max(float(density.max()) for row in densities for density in row) or 1.0
    with drawing(path, len(rows), len(reports), max(COLUMN, 2.5 * len(reports)), 2.45 * len(rows)) as (figure, axes):
        image = None
        for r, name in enumerate(rows):
            for c, report in enumerate(reports):
                image = _joint_panel(axes[r][c], 100 * densities[r][c], 100 * highest)
                found = report.alignments[name]
                numbers = "no queries"
                if found is not None:
                    rho = "–" if found.spearman is None else f"{found.spearman:.2f}"
                    numbers = f"Spearman {rho}, calibration error {found.calibration_error:.2f}"
                axes[r][c].set_title(f"{report.label}: {POPULATION_NAMES[name]}\n{numbers}", pad=16, fontsize=FONT)
        figure.colorbar(image, ax=axes.ravel().tolist(), label="queries (%)", shrink=0.6, aspect=30)


def _joint_panel(axis: Any, density: Any, highest: float) -> Any:
    """Density with histograms of score (above) and IoU (right) along its edges."""
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


def draw_calibration(path: Path, reports: Sequence[Report]) -> None:
    """Mean IoU over mean score of the N most confident queries by range of the score, if it has 1% of them."""
    with drawing(path, 1, 1, COLUMN, 2.4) as (_, axes):
        axis = axes[0][0]
        axis.plot([0, 1], [0, 1], color="0.5", linewidth=0.8, linestyle=":", label="score = IoU")
        for i, report in enumerate(reports):
            found = report.alignments["most_confident"]
            if found is None:
                continue
            full = found.reliability[found.reliability[:, 0] >= 0.01 * found.queries]
            label = f"{report.label}, error {found.calibration_error:.2f}"
            axis.plot(full[:, 1], full[:, 2], LINE_STYLES[i % 4], color=COLOURS[i], marker=MARKERS[i], label=label)
        axis.set(
            xlabel=f"mean score ({CALIBRATION_BINS} ranges)",
            ylabel="mean IoU with the target",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        axis.legend(loc="upper left")


def draw_oracle(path: Path, reports: Sequence[Report]) -> None:
    """AP as it is, and with better scores for the same boxes."""
    names = ["as it is", "score = IoU\nif matched", "others\nranked below"]
    series = {report.label: list(report.oracle) for report in reports}
    with drawing(path, 1, 1, COLUMN, 2.2) as (_, axes):
        _bars(axes[0][0], names, series, COLOURS, HATCHES, numbers=True)
        axes[0][0].set(ylabel="AP (%)")
        axes[0][0].margins(y=0.15)
        axes[0][0].legend(loc="upper left")


def draw_errors(path: Path, reports: Sequence[Report]) -> None:
    """What each kind of error costs (left) and how often it occurs among confident detections (right)."""
    with drawing(path, 1, 2, 2 * COLUMN, 2.3) as (_, axes):
        cost, count = axes[0]
        series = {report.label: [report.errors.cost[name] for name in ERRORS] for report in reports}
        _bars(cost, ERRORS, series, COLOURS, HATCHES, numbers=True)
        cost.set(ylabel="AP50 to be gained (points)")
        series = {report.label: [float(report.errors.confident_counts[name]) for name in ERRORS] for report in reports}
        _bars(count, ERRORS, series, COLOURS, HATCHES)
        count.set(ylabel="confident errors (number)")
        for axis in (cost, count):
            axis.tick_params(axis="x", rotation=30)
            axis.margins(y=0.15)
        cost.legend()


def draw_precision_recall(path: Path, reports: Sequence[Report]) -> None:
    """Precision over recall at some IoU thresholds, mean over classes."""
    with drawing(path, 1, len(reports), max(COLUMN, 2.4 * len(reports)), 2.8, sharey=True) as (_, axes):
        for axis, report in zip(axes[0], reports, strict=True):
            for k, t in enumerate((0, 3, 5, 7, 9)):
                label = f"{IOU_THRESHOLDS[t]:.2f}: {100 * report.precision[t].mean():.1f}"
                axis.plot(100 * RECALLS, 100 * report.precision[t], LINE_STYLES[k % 4], color=COLOURS[k], label=label)
            axis.set(title=report.label, xlabel="recall (%)", xlim=(0, 100), ylim=(0, 102))
            axis.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, columnspacing=1,
                title="IoU threshold: AP (%)", title_fontsize=FONT - 0.5,
            )  # fmt: skip
        axes[0][0].set_ylabel("precision (%)")


def draw_per_class(path: Path, reports: Sequence[Report], most: int = 40) -> None:
    """AP of every class and by size; of very many classes those where the first report is worst."""
    means = [
        {name: float(np.mean([_or_nan(x) for x in values])) for name, values in report.per_class.items()}
        for report in reports
    ]
    known = [name for name, value in means[0].items() if not np.isnan(value)]
    shown = sorted(known, key=lambda name: means[0][name])[:most]
    metrics = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    with drawing(path, 2, 1, 2 * COLUMN, 4.2) as (_, axes):
        by_class, by_size = axes[0][0], axes[1][0]
        series = {report.label: [mean[name] for name in shown] for report, mean in zip(reports, means, strict=True)}
        _bars(by_class, shown, series, COLOURS, HATCHES)
        title = "" if len(shown) == len(known) else f" (the lowest {len(shown)} of {len(known)})"
        by_class.set(ylabel="AP (%)", xlabel=f"class{title}")
        by_class.tick_params(axis="x", rotation=0 if len(shown) < 10 else 90)
        series = {report.label: [_or_nan(report.metrics.get(metric)) for metric in metrics] for report in reports}
        _bars(by_size, metrics, series, COLOURS, HATCHES, numbers=True)
        by_size.set(ylabel="%")
        by_size.margins(y=0.15)
        by_size.legend()


def _percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _bars(
    axis: Any,
    names: Sequence[str],
    series: dict[str, list[float]],
    colours: Sequence[str],
    hatches: Sequence[str],
    numbers: bool = False,
) -> None:
    """Groups of bars, one group a name, one bar a series."""
    width = 0.8 / max(len(series), 1)
    for i, (label, values) in enumerate(series.items()):
        places = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
        bars = axis.bar(
            places, values, width * 0.92, label=label, color=colours[i % len(colours)], alpha=0.8,
            hatch=hatches[i % len(hatches)], edgecolor="white", linewidth=0,
        )  # fmt: skip
        if numbers:
            texts = ["" if np.isnan(value) else f"{value:.1f}" for value in values]
            axis.bar_label(bars, texts, fontsize=FONT - 2, padding=1)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.5, max(len(names), 1) - 0.5)
    axis.grid(False, axis="x")
