"""One table in the forms that people want: terminal, Markdown, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from analysis.bootstrap import Interval
from experiments.comparison import Group, Summary, text_of
from experiments.plan import short_keys


class Row(NamedTuple):
    """A group of runs and its numbers."""

    group: Group
    summaries: dict[str, Summary]
    """By metric."""
    differences: dict[str, Interval]
    """To the baseline, by metric; bounds are NaN where there are no intervals."""
    is_baseline: bool


class Comparison(NamedTuple):
    """Everything in the table."""

    rows: list[Row]
    metrics: list[str]
    compared: list[str]
    """Those with a column of differences to the baseline; none where there is no baseline."""
    confidence: float
    notes: list[str]
    """What a reader has to know: which evaluation, what is missing."""


class Cell(NamedTuple):
    text: str
    best: bool = False
    number: bool = True


def _best(comparison: Comparison) -> dict[str, float]:
    """The highest mean of each metric as it is printed; none where all rows are equal."""
    result = {}
    for metric in comparison.metrics:
        means = [round(row.summaries[metric].mean, 2) for row in comparison.rows if row.summaries[metric].values]
        if len(set(means)) > 1:
            result[metric] = max(means)
    return result


def _cells(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    """(header, rows) of the table for people."""
    rows = comparison.rows
    keys = list(rows[0].group.settings)
    has_variants = any(row.group.variant is not None for row in rows)
    header = ["variant"] * has_variants + [short_keys(keys)[key] for key in keys] + ["runs"]
    for metric in comparison.metrics:
        header += [metric] + [f"Δ{metric}"] * (metric in comparison.compared)
    best = _best(comparison)
    body = []
    for row in rows:
        cells = [Cell(row.group.variant or "", number=False)] * has_variants
        cells += [Cell(text_of(value), number=False) for value in row.group.settings.values()]
        cells.append(Cell(row.group.status(), number=False))
        for metric in comparison.metrics:
            summary = row.summaries[metric]
            is_best = bool(summary.values) and round(summary.mean, 2) == best.get(metric)
            cells.append(Cell(_number(summary), is_best))
            if metric in comparison.compared:
                cells.append(Cell("baseline" if row.is_baseline else _difference(row.differences.get(metric))))
        body.append(cells)
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


def as_text(comparison: Comparison) -> str:
    """Aligned columns for a terminal; the best of each column has a star."""
    header, body = _cells(comparison)
    texts = [[cell.text + ("*" if cell.best else " " * cell.number) for cell in row] for row in body]
    widths = [max(len(line[i]) for line in [header, *texts]) for i in range(len(header))]
    numeric = [cell.number for cell in body[0]]
    lines = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)).rstrip()
        for line in [header, *texts]
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *_notes(comparison, "* best; ")])


def as_markdown(comparison: Comparison) -> str:
    """The best of each column is bold."""
    header, body = _cells(comparison)
    escaped = [[cell._replace(text=cell.text.replace("|", "\\|")) for cell in row] for row in body]
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "|".join(" ---: " if cell.number else " --- " for cell in body[0]) + "|",
        *("| " + " | ".join(f"**{c.text}**" if c.best else c.text for c in row) + " |" for row in escaped),
    ]
    return "\n".join([*lines, "", *_notes(comparison, "Bold: best. ")]) + "\n"


def as_latex(comparison: Comparison) -> str:
    """A tabular for the booktabs package; the best of each column is bold."""
    header, body = _cells(comparison)
    columns = "".join("r" if cell.number else "l" for cell in body[0])
    lines = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", _latex_line(header), "\\midrule"]
    for row in body:
        texts = [_latex(cell.text) for cell in row]
        lines.append(
            " & ".join(f"\\textbf{{{t}}}" if cell.best else t for t, cell in zip(texts, row, strict=True)) + r" \\"
        )
    notes = [f"% {note}" for note in _notes(comparison, "bold: best; ")]
    return "\n".join([*notes, *lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex_line(header: Sequence[str]) -> str:
    return " & ".join(_latex(name) for name in header) + r" \\"


_LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "–": "--", "Δ": r"$\Delta$", "α": r"$\alpha$", "τ": r"$\tau$",
}  # fmt: skip


def _latex(text: str) -> str:
    """One cell, every character as itself."""
    return "".join(_LATEX.get(character, character) for character in text)


def as_csv(comparison: Comparison) -> str:
    """Plain numbers, one column each, for other programs."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    keys = list(comparison.rows[0].group.settings)
    header = ["variant", *keys, "runs", "failed"]
    for metric in comparison.metrics:
        header += [metric, f"{metric}_std"]
    compared = comparison.compared or comparison.metrics[:1]
    writer.writerow([*header, *(f"{metric}_{name}" for metric in compared for name in Interval._fields)])
    for row in comparison.rows:
        failed = sum(run.state == "failed" for run in row.group.runs)
        values: list[object] = [row.group.variant or "", *map(text_of, row.group.settings.values())]
        values += [len(row.group.finished), failed]
        for metric in comparison.metrics:
            values += [_plain(row.summaries[metric].mean), _plain(row.summaries[metric].deviation)]
        for metric in compared:
            values += map(_plain, row.differences.get(metric, (math.nan,) * 3))
        writer.writerow(values)
    return stream.getvalue()


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _notes(comparison: Comparison, best: str) -> list[str]:
    return [f"{best}mean ± standard deviation over seeds, in percent", *comparison.notes]
