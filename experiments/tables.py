"""One table in the forms that people want: Markdown (for terminals too), CSV, LaTeX.

pandas writes these forms with two further packages, and would still be told every cell.
"""

from __future__ import annotations

import csv
import io
import math
from typing import NamedTuple

from analysis.bootstrap import Interval
from experiments.comparison import Group, Summary, text_of
from experiments.measures import LOWER_IS_BETTER
from experiments.plan import short_keys


class Row(NamedTuple):
    """A group of runs and its numbers."""

    group: Group
    summaries: dict[str, Summary]
    """Mean and spread of each metric."""
    differences: dict[str, Interval]
    """To the baseline, by metric; bounds are NaN where there are no intervals."""
    is_baseline: bool


class Comparison(NamedTuple):
    """Everything in the table."""

    rows: list[Row]
    metrics: list[str]
    compared: list[str]
    """Metrics with a column of differences to the baseline; none where there is no baseline."""
    notes: list[str]
    """What a reader has to know: which evaluation, what is missing."""


class Cell(NamedTuple):
    """An entry of the table."""

    text: str
    best: bool = False
    number: bool = True


def _cells(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    """Lay out the table for people: (header, rows). The best of a column is that of what is printed, unless all tie."""
    rows = comparison.rows
    keys = list(rows[0].group.settings)
    variants = any(row.group.variant is not None for row in rows)
    header = ["variant"] * variants + [short_keys(keys)[key] for key in keys] + ["runs"]
    texts = [
        [row.group.variant or ""] * variants + [*map(text_of, row.group.settings.values()), row.group.status()]
        for row in rows
    ]
    body = [[Cell(text, number=False) for text in line] for line in texts]
    for metric in comparison.metrics:
        means = [round(row.summaries[metric].mean, 2) for row in rows]
        finite = [mean for mean in means if not math.isnan(mean)]
        best = min if metric in LOWER_IS_BETTER else max
        chosen = best(finite) if len(set(finite)) > 1 else math.nan
        header.append(metric)
        for cells, row, mean in zip(body, rows, means, strict=True):
            cells.append(Cell(_number(row.summaries[metric]), mean == chosen))
        if metric in comparison.compared:
            header.append(f"Δ{metric}")
            for cells, row in zip(body, rows, strict=True):
                cells.append(Cell("baseline" if row.is_baseline else _difference(row.differences.get(metric))))
    return header, body


def _number(summary: Summary) -> str:
    if not summary.values:
        return "–"
    spread = "" if math.isnan(summary.deviation) else f" ± {summary.deviation:.2f}"
    return f"{summary.mean:.2f}{spread}"


def _difference(interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.difference):
        return "–"
    text = f"{interval.difference:+.2f}"
    if not math.isnan(interval.low):
        text += f" [{interval.low:+.2f}, {interval.high:+.2f}]"
    return text.replace("-", "−")


def as_markdown(comparison: Comparison) -> str:
    """Write the table in Markdown, aligned for terminals too; the best of each column is bold."""
    header, body = _cells(comparison)
    lines = [header, *([f"**{c.text}**" if c.best else c.text.replace("|", "\\|") for c in row] for row in body)]
    widths = [max(4, *map(len, column)) for column in zip(*lines, strict=True)]
    right = [cell.number for cell in body[0]]
    rule = [f"{'-' * (width - 1)}:" if r else "-" * width for width, r in zip(widths, right, strict=True)]
    padded = [
        [text.rjust(width) if r else text.ljust(width) for text, width, r in zip(line, widths, right, strict=True)]
        for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in padded), "", *_notes(comparison, "Bold: best; ")]) + "\n"


def as_latex(comparison: Comparison) -> str:
    """Write a tabular for the booktabs package; the best of each column is bold."""
    header, body = _cells(comparison)
    rows = [[rf"\textbf{{{_latex(c.text)}}}" if c.best else _latex(c.text) for c in row] for row in body]
    lines = [rf"{' & '.join(row)} \\" for row in [[_latex(name) for name in header], *rows]]
    columns = "".join("r" if cell.number else "l" for cell in body[0])
    head = [*(f"% {note}" for note in _notes(comparison, "bold: best; ")), rf"\begin{{tabular}}{{{columns}}}"]
    return "\n".join([*head, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "–": "--", "Δ": r"$\Delta$", "α": r"$\alpha$", "τ": r"$\tau$",
})  # fmt: skip


def _latex(text: str) -> str:
    """Escape a text so that every character stands for itself."""
    return text.translate(_LATEX)


def as_csv(comparison: Comparison) -> str:
    """Write plain numbers, one column each, for other programs."""
    compared = comparison.compared or comparison.metrics[:1]
    lines: list[dict[str, object]] = []
    for row in comparison.rows:
        line: dict[str, object] = {"variant": row.group.variant or ""}
        line |= {key: text_of(value) for key, value in row.group.settings.items()}
        line |= {"runs": len(row.group.finished), "failed": sum(run.state == "failed" for run in row.group.runs)}
        for metric in comparison.metrics:
            summary = row.summaries[metric]
            line |= {metric: _plain(summary.mean), f"{metric}_std": _plain(summary.deviation)}
        for metric in compared:
            values = row.differences.get(metric, Interval(math.nan, math.nan, math.nan))._asdict()
            line |= {f"{metric}_{name}": _plain(value) for name, value in values.items()}
        lines.append(line)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _notes(comparison: Comparison, best: str) -> list[str]:
    return [f"{best}mean ± standard deviation over seeds, in percent", *comparison.notes]
