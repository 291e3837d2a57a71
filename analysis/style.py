"""The look of all figures: column width of a paper, colours that the colour-blind can tell apart, boxes on images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.matching import Floats
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


Pixels = NDArray[np.uint8]
"""[h, w, 3] RGB."""


class Picture(NamedTuple):
    """An image to draw on."""

    pixels: Pixels
    size: tuple[int, int]
    """(height, width) in which boxes are given; that of the annotations, of which the file may be a resized copy."""


def bare(axis: Any) -> None:
    """Take ticks and frame away, but with room for a label, which hiding the whole axis would not leave."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def show(axis: Any, picture: Picture, alpha: float = 1.0) -> None:
    """Show an image in the coordinates of its annotations."""
    height, width = picture.size
    axis.imshow(picture.pixels, extent=(0, width, height, 0), alpha=alpha)
    axis.set(xlim=(0, width), ylim=(height, 0))


def draw_box(axis: Any, box: Floats, colour: str, *, halo: str, dashed: bool = False, width: float = 1.2) -> None:
    """Draw a frame that can be seen on any image, thanks to a wider one of another colour below it."""
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = (float(value) for value in box)
    for edge, line, style in ((halo, width + 0.8, "-"), (colour, width, (0, (3, 2)) if dashed else "-")):
        axis.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=line, linestyle=style)
        )
