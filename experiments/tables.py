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
    difference: Interval | None
    """To the baseline in the first metric; bounds are NaN where there are no intervals."""
    is_baseline: bool


class Comparison(NamedTuple):
    """Everything in the table."""

    rows: list[Row]
    metrics: list[str]
    has_baseline: bool
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


def _cells(comparison: Comparison, plus_minus: str, minus: str) -> tuple[list[str], list[list[Cell]]]:
    """(header, rows) of the table for people."""
    rows = comparison.rows
    keys = list(rows[0].group.settings)
    has_variants = any(row.group.variant is not None for row in rows)
    header = ["variant"] * has_variants + [short_keys(keys)[key] for key in keys] + ["runs"]
    for i, metric in enumerate(comparison.metrics):
        header += [metric] + [f"Δ{metric}"] * (i == 0 and comparison.has_baseline)
    best = _best(comparison)
    body = []
    for row in rows:
        cells = [Cell(row.group.variant or "", number=False)] * has_variants
        cells += [Cell(text_of(value), number=False) for value in row.group.settings.values()]
        cells.append(Cell(row.group.status(), number=False))
        for i, metric in enumerate(comparison.metrics):
            summary = row.summaries[metric]
            is_best = bool(summary.values) and round(summary.mean, 2) == best.get(metric)
            cells.append(Cell(_number(summary, plus_minus), is_best))
            if i == 0 and comparison.has_baseline:
                cells.append(Cell("baseline" if row.is_baseline else _difference(row.difference, minus)))
        body.append(cells)
    return header, body


def _number(summary: Summary, plus_minus: str) -> str:
    if not summary.values:
        return "–"
    spread = "" if math.isnan(summary.deviation) else f" {plus_minus} {summary.deviation:.2f}"
    return f"{summary.mean:.2f}{spread}"


def _difference(interval: Interval | None, minus: str) -> str:
    if interval is None or math.isnan(interval.difference):
        return "–"
    text = f"{interval.difference:+.2f}"
    if not math.isnan(interval.low):
        text += f" [{interval.low:+.2f}, {interval.high:+.2f}]"
    return text.replace("-", minus)


def as_text(comparison: Comparison) -> str:
    """Aligned columns for a terminal; the best of each column has a star."""
    header, body = _cells(comparison, "±", "-")
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
    header, body = _cells(comparison, "±", "−")
    escaped = [[cell._replace(text=cell.text.replace("|", "\\|")) for cell in row] for row in body]
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "|".join(" ---: " if cell.number else " --- " for cell in body[0]) + "|",
        *("| " + " | ".join(f"**{c.text}**" if c.best else c.text for c in row) + " |" for row in escaped),
    ]
    return "\n".join([*lines, "", *_notes(comparison, "Bold: best. ")]) + "\n"


def as_latex(comparison: Comparison) -> str:
    """A tabular for the booktabs package; the best of each column is bold."""
    header, body = _cells(comparison, r"$\pm$", "$-$")
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
    "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "Δ": r"$\Delta$", "–": "--", "α": r"$\alpha$", "τ": r"$\tau$",
}  # fmt: skip


def _latex(text: str) -> str:
    """Escaped, except for the mathematics that this module itself writes between dollars."""
    parts = text.split("$")
    if len(parts) % 2 == 0:  # a dollar of the user's
        return "".join(_LATEX.get(c, c) for c in text.replace("$", r"\$"))
    return "$".join(part if i % 2 else "".join(_LATEX.get(c, c) for c in part) for i, part in enumerate(parts))


def as_csv(comparison: Comparison) -> str:
    """Plain numbers, one column each, for other programs."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    keys = list(comparison.rows[0].group.settings)
    header = ["variant", *keys, "runs", "failed"]
    for metric in comparison.metrics:
        header += [metric, f"{metric}_std"]
    first = comparison.metrics[0]
    writer.writerow([*header, *(f"{first}_{name}" for name in ("difference", "low", "high"))])
    for row in comparison.rows:
        failed = sum(run.state == "failed" for run in row.group.runs)
        values: list[object] = [row.group.variant or "", *map(text_of, row.group.settings.values())]
        values += [len(row.group.finished), failed]
        for metric in comparison.metrics:
            values += [_plain(row.summaries[metric].mean), _plain(row.summaries[metric].deviation)]
        writer.writerow([*values, *(_plain(v) for v in row.difference or (math.nan,) * 3)])
    return stream.getvalue()


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _notes(comparison: Comparison, best: str) -> list[str]:
    return [f"{best}mean ± standard deviation over seeds, in percent", *comparison.notes]
