"""The look of all figures: column width of a paper, colours that the colour-blind can tell apart, whole files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.lettering import families
from engine.whole_files import replacing

# Okabe and Ito's palette, the darkest first: yellow is hardly seen on white and comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

COLUMN = 3.35
"""Width in inches of a column in a two-column paper."""
DPI = 220
FONT = 7.5
"""Points, at the size at which the figure is printed."""

_SETTINGS: Any = {
    "font.size": FONT,
    "text.parse_math": False,
    "axes.titlesize": FONT + 0.5,
    "axes.labelsize": FONT,
    "legend.fontsize": FONT - 0.5,
    "xtick.labelsize": FONT - 0.5,
    "ytick.labelsize": FONT - 0.5,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.4,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


@contextmanager
def drawing(path: Path, rows: int, columns: int, width: float, height: float, **grid: Any) -> Iterator[tuple[Any, Any]]:
    """Open a figure with axes [rows, columns]; at the end it is written to ``path`` as a whole or not at all.

    Args:
        path: PNG file.
        rows: of axes.
        columns: of axes.
        width: of the figure in inches.
        height: of the figure in inches.
        grid: arguments of matplotlib's ``subplots``, such as ``sharey``.
    """
    # Made without pyplot, which would keep figures in a global list and look for a display.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_SETTINGS, "font.family": families()}):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns, squeeze=False, **grid)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)
