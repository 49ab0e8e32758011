"""The trade-off of every method in one picture, and what relearning brings back in another."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.figure import Figure

from space_peft.figures.style import FORGET, KEEP, save_figure, styled

from .tables import REFERENCE


DPI = 130


def plot_tradeoff(methods: dict[str, dict], path: Path) -> None:
    """Forgetting against retention, a line a method, and what each dominates."""
    with styled():
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for name, result in methods.items():
            x = [1 - point["forget"] for point in result["curve"]]
            y = [point["retain_all"] for point in result["curve"]]
            own = {"linewidth": 2.4, "zorder": 3} if name == "SPACE" else {"linewidth": 1.2, "alpha": 0.9}
            style = "-" if not result["sees_images"] else "--"
            axes.plot(x, y, style, marker="o", markersize=4, label=f"{name} ({result['hypervolume']:.3f})", **own)
        axes.axhline(0.985, color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate("0.985", (0.0, 0.985), color="0.4", fontsize=8, va="bottom")
        axes.set(
            xlabel="forgotten: share of the target's unseen images no longer named",
            ylabel="retained: share of other images still named",
            ylim=(REFERENCE, 1.003),
            xlim=(-0.01, 1.01),
        )
        axes.legend(title="method (hypervolume); dashed: sees images of the target", fontsize=8, title_fontsize=8)
        axes.grid(alpha=0.25)
        save_figure(figure, path, DPI)


def plot_relearning(methods: dict[str, dict], rows: list[dict], path: Path) -> None:
    """Relearning curves beside their controls, a panel a method."""
    found = {
        name: [
            row["depth"]["curves"]
            for row in rows
            if row.get("depth") and (row["method"], row["settings"]) == (name, result["settings"])
        ]
        for name, result in methods.items()
    }
    names = [name for name, curves in found.items() if curves]
    columns = 3
    with styled():
        figure = Figure(figsize=(9, 2.4 * -(-len(names) // columns)), layout="constrained")
        panels = figure.subplots(-(-len(names) // columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        kinds = {"all": ("merged", KEEP), "adapter": ("adapter", FORGET)}
        shown = {1: ("the erased name", "-"), 2: ("control", "--")}
        for name, panel in zip(names, panels):
            for weights, column in itertools.product(kinds, shown):
                (label, colour), (what, style) = kinds[weights], shown[column]
                curves = [own[weights] for own in found[name]]
                steps = [step for step, _, _ in curves[0]]
                values = [sum(curve[i][column] for curve in curves) / len(curves) for i in range(len(steps))]
                panel.plot(steps, values, style, color=colour, marker="o", markersize=3, label=f"{label}: {what}")
            panel.set_title(name, fontsize=9)
            panel.grid(alpha=0.25)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, handlelength=3)
        figure.supxlabel("fine-tuning steps on three images of the target", fontsize=9)
        figure.supylabel("its other images given the name", fontsize=9)
        save_figure(figure, path, DPI)
