"""Drawing on images."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.matching import Floats

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
