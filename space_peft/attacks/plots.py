"""One picture of all attacks, a panel each, drawn from a report's figures alone."""

from __future__ import annotations

import math
import os

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..evaluation.plots import _BEFORE, _FORGET, _INK, _KEEP, _STYLE, _save, _short


_AFTER, _CONTROL = _FORGET, _KEEP


def draw_attacks(concept: str, attacks: dict[str, dict], path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Draws every attack of a report.

    Args:
        concept (`str`): What was erased.
        attacks (`dict[str, dict]`): See [`AttackReport`].
        path (`str` or `os.PathLike`): PNG file to write, whole or not at all.
        dpi (`int`, defaults to 150): Dots per inch.
    """
    names = [name for name in PANELS if name in attacks]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2 * columns, 3.3 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(grid, names):
            title, draw = PANELS[name]
            axes.set_title(title, loc="left", fontsize=10, weight="bold", color=_INK)
            axes.grid(color="#ececec", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.set(ylim=(-0.03, 1.3), yticks=np.linspace(0, 1, 6))
            draw(axes, attacks[name]["details"])
            # Above the highest value there can be, so that no legend lies on what it explains.
            axes.legend(frameon=False, fontsize=7.5, loc="upper left", ncols=2, handlelength=1.6, columnspacing=1.2)
        title = f"Attacks on the erasure of “{_short(concept, 40)}”"
        figure.suptitle(title, x=0.01, ha="left", weight="bold", parse_math=False)
        _save(figure, path, dpi)


def _label(text: str) -> str:
    # matplotlib takes text between dollar signs for a formula, and a label with a leading underscore for none.
    return _short(text, 24).replace("$", r"\$").lstrip("_")


def _draw_audit(axes, details: dict) -> None:
    for key, colour, style in (("before", _BEFORE, "-"), ("control", _CONTROL, "--"), ("after", _AFTER, "-")):
        search = details[key]
        if search is not None:
            label = {"before": "before", "after": "after"}.get(key, f"after, “{_label(search['name'])}”")
            axes.plot(search["curve"], color=colour, linestyle=style, linewidth=1.8, label=label)
    axes.set(xlabel="steps of search", ylabel="best p(name)")


def _draw_relearning(axes, details: dict) -> None:
    counts = sorted({point["images"] for point in details["points"]})
    for count, width in zip(counts, np.linspace(1.0, 2.4, len(counts))):
        points = [point for point in details["points"] if point["images"] == count]
        steps = [point["steps"] for point in points]
        plural = "" if count == 1 else "s"
        relearned, control = ([point[key] for point in points] for key in ("relearned", "control"))
        axes.plot(
            steps, relearned, "o-", color=_AFTER, linewidth=width, markersize=3, label=f"name, {count} image{plural}"
        )
        axes.plot(steps, control, "s--", color=_CONTROL, linewidth=width, markersize=3, label=f"other names, {count}")
    axes.set(xlabel="fine-tuning steps", ylabel="unseen images named")


def _draw_linear_probe(axes, details: dict) -> None:
    layers = details["layers"]
    x = np.arange(len(layers))
    for tokens, marker in (("image", "o"), ("last", "^")):
        chosen = [i for i, layer in enumerate(layers) if layer["tokens"] == tokens]
        label = {"image": "image tokens", "last": "last token"}[tokens]
        if layers[0]["before"] is not None:
            before = [layers[i]["before"]["auc"] for i in chosen]
            axes.plot(x[chosen], before, marker, color=_BEFORE, markersize=7, linestyle="-", label=f"before, {label}")
        after = [layers[i]["after"]["auc"] for i in chosen]
        axes.plot(x[chosen], after, marker, color=_AFTER, markersize=4, linestyle="-", label=f"after, {label}")
    low, high = ([layer[key] for layer in layers] for key in ("chance", "chance_high"))
    axes.fill_between(x, low, high, color=_CONTROL, alpha=0.15, linewidth=0, label="labels at random")
    step = max(1, len(layers) // 12)
    axes.set_xticks(x[::step], [layer["layer"] for layer in layers[::step]], rotation=60, ha="right", fontsize=7)
    axes.set(ylabel="AUC of a linear probe")


def _draw_groups(axes, names: list[str], series: list[tuple[str, str, list[float | None]]]) -> None:
    """Bars side by side."""
    width = 0.8 / len(series)
    for i, (label, colour, values) in enumerate(series):
        places = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
        heights = [value or 0.0 for value in values]
        axes.bar(places, heights, width * 0.92, color=colour, label=label)
        for place, value in zip(places, values):
            text = "-" if value is None else f"{value:.2g}"
            axes.text(place, (value or 0) + 0.015, text, ha="center", fontsize=7, color=_INK)
    axes.set_xticks(np.arange(len(names)), [_label(name) for name in names])


def _draw_quantization(axes, details: dict) -> None:
    schemes = list(details["after"])
    series = [("target named, after", _AFTER, [details["after"][s]["forget"]["value"] for s in schemes])]
    if details["before"] is not None:
        series.insert(0, ("target named, before", _BEFORE, [details["before"][s]["forget"]["value"] for s in schemes]))
    if all("retain" in details["after"][s] for s in schemes):
        series.append(("others kept, after", _CONTROL, [details["after"][s]["retain"]["value"] for s in schemes]))
    _draw_groups(axes, schemes, series)


def _draw_confirmation(axes, details: dict) -> None:
    series = [("after", _AFTER, [details["p_yes"], details["p_yes_absent"]])]
    if details["p_yes_before"] is not None:
        series.insert(0, ("before", _BEFORE, [details["p_yes_before"], details["p_yes_absent_before"]]))
    _draw_groups(axes, ["the target", "what is not there"], series)
    axes.set(ylabel="mean p(yes)")


def _draw_perturbations(axes, details: dict) -> None:
    kinds = list(details["named"])
    series = [("after", _AFTER, [details["named"][kind] for kind in kinds])]
    if details["named_before"] is not None:
        series.insert(0, ("before", _BEFORE, [details["named_before"][kind] for kind in kinds]))
    _draw_groups(axes, kinds, series)
    axes.set(ylabel="target named")


PANELS = {
    "audit": ("Audit: an image that makes it say the name", _draw_audit),
    "relearning": ("Relearning from a few images", _draw_relearning),
    "linear_probe": ("Linear probe for the target", _draw_linear_probe),
    "quantization": ("Merged and quantised", _draw_quantization),
    "confirmation": ("Asked whether it is there", _draw_confirmation),
    "perturbation": ("Perturbed images", _draw_perturbations),
}
