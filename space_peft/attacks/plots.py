"""One picture of all attacks, a panel each, drawn from a report's figures alone."""

from __future__ import annotations

import math
import os

import numpy as np
from matplotlib.figure import Figure

from ..figures.style import INK, save_figure, short, styled
from .kinds import KINDS


def draw_attacks(concept: str, attacks: dict[str, dict], path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Draws every attack of a report.

    Args:
        concept (`str`): What was erased.
        attacks (`dict[str, dict]`): See [`AttackReport`].
        path (`str` or `os.PathLike`): PNG file to write, whole or not at all.
        dpi (`int`, defaults to 150): Dots per inch.
    """
    kinds = [kind for kind in KINDS.values() if kind.name in attacks]
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    with styled():
        figure = Figure(figsize=(4.2 * columns, 3.3 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in grid[len(kinds) :]:
            axes.set_visible(False)
        for axes, kind in zip(grid, kinds):
            axes.set_title(kind.title, loc="left", fontsize=10, weight="bold", color=INK)
            axes.grid(color="#ececec", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.set(ylim=(-0.03, 1.3), yticks=np.linspace(0, 1, 6))
            kind.draw(axes, attacks[kind.name]["details"])
            # Above the highest value there can be, so that no legend lies on what it explains.
            axes.legend(frameon=False, fontsize=7.5, loc="upper left", ncols=2, handlelength=1.6, columnspacing=1.2)
        title = f"Attacks on the erasure of “{short(concept, 40)}”"
        figure.suptitle(title, x=0.01, ha="left", weight="bold", parse_math=False)
        save_figure(figure, path, dpi)
