"""What the panels of attacks have in common; an attack draws its own. Importing it does not import matplotlib."""

from __future__ import annotations

import numpy as np

from ..figures.style import BEFORE, FORGET, INK, KEEP, short


AFTER, CONTROL = FORGET, KEEP


def label_of(text: str) -> str:
    """A text as matplotlib shows it in a legend."""
    # matplotlib takes text between dollar signs for a formula, and a label with a leading underscore for none.
    return short(text, 24).replace("$", r"\$").lstrip("_")


def draw_searches(axes, details: dict, ylabel: str) -> None:
    """Lines of three searches, each with a `name` and a `curve`, of which two may be missing: before, control, after."""
    for key, colour, style in (("before", BEFORE, "-"), ("control", CONTROL, "--"), ("after", AFTER, "-")):
        search = details[key]
        if search is not None:
            label = f"after, “{label_of(search['name'])}”" if key == "control" else key
            axes.plot(search["curve"], color=colour, linestyle=style, linewidth=1.8, label=label)
    axes.set(xlabel="steps of search", ylabel=ylabel)


def draw_groups(axes, names: list[str], series: list[tuple[str, str, list[float | None]]]) -> None:
    """Bars side by side."""
    width = 0.8 / len(series)
    for i, (label, colour, values) in enumerate(series):
        places = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
        heights = [value or 0.0 for value in values]
        axes.bar(places, heights, width * 0.92, color=colour, label=label)
        for place, value in zip(places, values):
            text = "-" if value is None else f"{value:.2g}"
            axes.text(place, (value or 0) + 0.015, text, ha="center", fontsize=7, color=INK)
    axes.set_xticks(np.arange(len(names)), [label_of(name) for name in names])
