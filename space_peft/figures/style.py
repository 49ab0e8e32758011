"""One style for all pictures: colours, fonts, and how a figure becomes a file. Importing it does not import matplotlib.

Figures are drawn on their own Agg canvas, never through pyplot: nothing global changes, no window opens, and a figure
is freed with its last reference. They stand on white, with a margin, so that they can be read on a dark page as well.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..records.escape import plain_line
from ..records.io import atomic_path


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Colours that stay apart for colour-blind readers and in grey.
BEFORE, FORGET, KEEP, INK = "#b4bac4", "#d1603d", "#2f6690", "#333333"
ERASED, BAD = "#1b7f6b", "#b3261e"  # On the page of answers, where red must mean failure alone.
PAPER = "white"
# Where several things are compared none of which is good or bad.
SEVERAL = (KEEP, FORGET, ERASED, "#8e5ea2", "#c79a2b", "#4aa3c7", BAD, "#6b7280")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.prop_cycle": f"cycler('color', {list(SEVERAL)})",
    "figure.facecolor": PAPER,
}
MARGIN = 0.12  # In inches, around a figure that is laid out by itself.


def styled(**changes: Any) -> AbstractContextManager[None]:
    """The style, over matplotlib's defaults and not over the user's own, while a figure is drawn and saved.

    Args:
        changes: Settings of matplotlib that differ, with `__` for a dot.
    """
    import matplotlib.style

    return matplotlib.style.context(["default", {**STYLE, **{key.replace("__", "."): v for key, v in changes.items()}}])


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int) -> None:
    """Writes a figure as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    FigureCanvasAgg(figure)
    if isinstance(layout := figure.get_layout_engine(), ConstrainedLayoutEngine):
        layout.set(w_pad=MARGIN, h_pad=MARGIN)
    with atomic_path(path) as temporary:
        # No `bbox_inches="tight"`: the layout is in inches and leaves room for everything.
        figure.savefig(temporary, format="png", dpi=dpi, facecolor=PAPER, transparent=False)


def short(text: str, width: int) -> str:
    """One line of at most `width` characters, as matplotlib shows it."""
    # Between two dollars matplotlib would read a formula.
    return plain_line(text, width).replace("$", r"\$")
