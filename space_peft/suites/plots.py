"""Forget quality against model utility, as the field plots them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ..figures.style import FORGET, INK, KEEP, save_figure, short, styled


# p-values of models that have nothing in common with a retain-only one go down to 1e-30; below this all are alike.
LOWEST = 1e-12
SIGNIFICANT = 0.05


def plot_forget_quality(points: Mapping[str, Mapping[str, Any]], path: str | os.PathLike, *, title: str = "") -> None:
    """Draws one point a model.

    Args:
        points (`dict[str, dict]`): By model: `utility`, and `forget_quality` (the KS p-value; without a retain-only model None,
            and `truth_ratio` of the forgotten people is drawn instead).
        path (`str` or `os.PathLike`): PNG file to write, whole or not at all.
        title (`str`, *optional*): Above it.
    """
    tested = any(point["forget_quality"] is not None for point in points.values())
    key = "forget_quality" if tested else "truth_ratio"
    with styled():
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.subplots()
        shown, left_out = {}, []
        for name, point in points.items():
            x, y = point["utility"], point[key]
            if x is None or y is None:
                left_out.append(name)
                continue
            shown[name] = (x, math.log10(max(y, LOWEST)) if tested else y)
            axes.scatter(*shown[name], s=36, color=FORGET if point.get("unlearned", True) else KEEP, zorder=3)
        if tested:
            axes.axhline(math.log10(SIGNIFICANT), color=INK, linewidth=0.8, linestyle="--")
            axes.set_ylim(math.log10(LOWEST) - 0.8, 0.8)
        else:
            axes.set_ylim(-0.05, 1.1)
        axes.set_xlim(-0.05, 1.05)
        axes.set_xlabel("model utility (harmonic mean), higher is better")
        axes.set_ylabel(
            "forget quality: log10 p against retain-only" if tested else "truth ratio of the forgotten, 1 is best"
        )
        # Good models stand close together: their names stand in a column beside, apart from each other.
        low, high = axes.get_ylim()
        gap, place = (high - low) * 0.07, math.inf
        for name, (x, y) in sorted(shown.items(), key=lambda item: -item[1][1]):
            place = min(y, place - gap)
            line = {"arrowstyle": "-", "color": INK, "linewidth": 0.4, "alpha": 0.5}
            axes.annotate(short(name, 24), (x, y), (1.1, place), va="center", fontsize=8, color=INK, arrowprops=line)
        note = f"; not drawn, nothing measured: {', '.join(left_out)}" if left_out else ""
        axes.set_title(short(title + note, 90), fontsize=9, loc="left", color=INK)
        save_figure(figure, path, 150)
