"""One style for all pictures: colours, fonts, and how a figure becomes a file. Importing it does not import matplotlib.

Figures are drawn on their own Agg canvas, never through pyplot: nothing global changes, no window opens, and a figure
is freed with its last reference.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..records.escape import plain_line
from ..records.io import atomic_path


if TYPE_CHECKING:
    from matplotlib.figure import Figure


STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "figure.facecolor": "white",
}
# Colours that stay apart for colour-blind readers and in grey.
BEFORE, FORGET, KEEP, INK = "#b4bac4", "#d1603d", "#2f6690", "#333333"
ERASED, BAD = "#1b7f6b", "#b3261e"  # On the page of answers, where red must mean failure alone.


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int) -> None:
    """Writes a figure as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        # No `bbox_inches="tight"`: the layout is in inches and leaves room for everything.
        figure.savefig(temporary, format="png", dpi=dpi)


def short(text: str, width: int) -> str:
    """One line of at most `width` characters, as matplotlib shows it."""
    # Between two dollars matplotlib would read a formula.
    return plain_line(text, width).replace("$", r"\$")
