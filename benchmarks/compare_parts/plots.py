"""The trade-off of every method in one picture, and what relearning brings back in another."""

from __future__ import annotations

from pathlib import Path

from .tables import REFERENCE


def plot_tradeoff(methods: dict[str, dict], path: Path) -> None:
    """Forgetting against retention, a line a method, and what each dominates."""
    from matplotlib.figure import Figure

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
    figure.savefig(path, dpi=130)


def plot_relearning(methods: dict[str, dict], rows: list[dict], path: Path) -> None:
    """Relearning curves beside their controls, a panel a method."""
    from matplotlib.figure import Figure

    names = [name for name in methods if any(row["method"] == name and row.get("depth") for row in rows)]
    columns = 3
    figure = Figure(figsize=(9, 2.4 * -(-len(names) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(names) // columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for name, panel in zip(names, panels):
        curves = [row["depth"]["curves"]["all"] for row in rows if row["method"] == name and row.get("depth")]
        steps = [step for step, _, _ in curves[0]]
        for column, label, style in ((1, "the erased name", "-"), (2, "control: other names", "--")):
            values = [sum(curve[i][column] for curve in curves) / len(curves) for i in range(len(steps))]
            panel.plot(steps, values, style, marker="o", markersize=3, label=label)
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.25)
    panels[0].legend(fontsize=7)
    figure.supxlabel("fine-tuning steps on three images of the target", fontsize=9)
    figure.supylabel("its other images given the name", fontsize=9)
    figure.savefig(path, dpi=130)
