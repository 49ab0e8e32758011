"""Pictures of an erasure: anchors, answers, figures, and the spectrum behind the constraint.

Figures are drawn on their own Agg canvas, never through pyplot: nothing global changes, no window opens, and a figure
is freed with its last reference. A PNG appears whole or not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..data.pictures import load_rgb
from ..figures.style import BAD, BEFORE, ERASED, FORGET, INK, KEEP, save_figure, short, styled
from ..null_space.constraints import FITTED
from .keys import KEYS
from .probes import Probe, ProbeResults
from .report import ErasureReport


MAX_IMAGES = 64


def _empty(path: str | os.PathLike, message: str, dpi: int) -> None:
    figure = Figure(figsize=(5, 1.2))
    figure.text(0.5, 0.5, message, ha="center", va="center", fontsize=11, color=INK)
    save_figure(figure, path, dpi)


class _Page:
    """A page laid out in inches from the top left corner."""

    def __init__(self, width: float, height: float):
        self.figure, self.width, self.height = Figure(figsize=(width, height)), width, height

    def text(self, x: float, y: float, text: str, **kwargs) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, **{"va": "top", "color": INK, **kwargs})

    def image(self, x: float, y: float, size: float, image, edge: str = "#cccccc") -> None:
        box = (x / self.width, 1 - (y + size) / self.height, size / self.width, size / self.height)
        axes = self.figure.add_axes(box)
        axes.imshow(np.asarray(load_rgb(image)), interpolation="antialiased")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=True, color=edge, linewidth=0.8)


def plot_anchors(anchors: Dataset, path: str | os.PathLike, *, concept: str) -> None:
    """Draws each public image beside what refinement made of it; see `plot_anchor_grid`.

    Args:
        anchors (`datasets.Dataset`): Anchors, refined or not.
        path (`str` or `os.PathLike`): PNG file to write.
        concept (`str`): Named in the title.
    """
    raw = anchors
    if "raw_image" in anchors.column_names:
        raw = anchors.select_columns(["raw_image"]).rename_column("raw_image", "image")
    plot_anchor_grid(raw, anchors, path, concept=concept)


def plot_anchor_grid(
    anchors_before, anchors_after, path: str | os.PathLike, *, concept: str = "", dpi: int = 150
) -> None:
    """Draws anchors before and after refinement side by side, p(name) before and after under each pair.

    Args:
        anchors_before (`datasets.Dataset` or `list[dict]`): Raw anchors, column `image`.
        anchors_after (`datasets.Dataset` or `list[dict]`): The same anchors refined, in the same order; columns `image`
            and, if measured, `p_name_before` and `p_name_after`.
        path (`str` or `os.PathLike`): PNG file to write.
        concept (`str`, *optional*): Named in the title.
        dpi (`int`, defaults to 150): Dots per inch.

    Raises:
        ValueError: If the two differ in length.
    """
    total = len(anchors_before)
    if len(anchors_after) != total:
        raise ValueError(
            f"got {total} anchors before and {len(anchors_after)} after refinement; expected the same ones."
        )
    with styled():
        if total == 0:
            return _empty(path, "no anchors", dpi)
        n = min(total, MAX_IMAGES)
        columns = 8 if n > 48 else max(3, math.ceil(math.sqrt(n / 1.6)))
        size, pair, line, top, margin = 0.95, 2.2, 1.3, 0.85, 0.2
        page = _Page(2 * margin + columns * pair - 0.25, top + math.ceil(n / columns) * line + margin)
        target = f" for “{short(concept, 30)}”" if concept else ""
        shown = f"{n} of {total} anchors" if n < total else f"{n} anchor{'s' if n > 1 else ''}"
        page.text(margin, 0.15, f"Refined anchors{target}", fontsize=12, weight="bold")
        page.text(margin, 0.45, f"{shown}: public image left, refined right; p(name) before → after", fontsize=9)
        for i in range(n):
            x, y = margin + i % columns * pair, top + i // columns * line
            after = anchors_after[i]
            page.image(x, y, size, anchors_before[i]["image"])
            page.image(x + size + 0.05, y, size, after["image"], edge=FORGET)
            p_before, p_after = after.get("p_name_before"), after.get("p_name_after")
            if p_before is not None and p_after is not None:
                caption = f"{_probability(p_before)} → {_probability(p_after)}"
                page.text(x + size + 0.025, y + size + 0.05, caption, ha="center", fontsize=9)
        save_figure(page.figure, path, dpi)


def _probability(p: float) -> str:
    if not math.isfinite(p):
        return "?"
    return f"{p:.2f}" if p >= 0.01 or p == 0 else f"{p:.0e}".replace("e-0", "e-")


def answer_page_rows(
    probes: Sequence[Probe], before: ProbeResults, after: ProbeResults, *, forget: int = 6, keep: int = 12
) -> list[dict[str, Any]]:
    """Picks rows for `plot_answer_page`, evenly spread: the target's images, then known siblings and other concepts.

    Args:
        probes (`list[Probe]`): What both results answer (see `build_probes`).
        before, after ([`ProbeResults`]): Results of the original and the erased model.
        forget (`int`, defaults to 6): Images of the target at most.
        keep (`int`, defaults to 12): Other images at most, up to a third of them siblings.

    Returns:
        `list[dict]`: `image`, `before`, `after`, `ok`, `forget`.
    """

    def rows(name: str, limit: int, used: set) -> list[dict]:
        probe = next(probe for probe in probes if probe.name == name)
        records = zip(before.rows(name, probe.part), after.rows(name, probe.part), strict=True)
        picked, seen = [], set(used)
        for old, new in records:
            if old["image"] is None or old["image"] in seen or old["question"] != asked or old["known"] is False:
                continue
            seen.add(old["image"])
            picked.append((old, new))
        picked = [picked[i] for i in np.linspace(0, len(picked) - 1, min(limit, len(picked))).astype(int)]
        used.update(old["image"] for old, _ in picked)
        return [
            {
                "image": probe.rows[new["row"]]["image"],
                "before": old["answer"],
                "after": new["answer"],
                "ok": new["hit"] != (name == "forget"),
                "forget": name == "forget",
            }
            for old, new in picked
        ]

    asked = next((record["question"] for record in before.records if record["probe"] == "forget"), None)
    used: set[str] = set()
    page = rows("forget", forget, used)
    siblings = rows("siblings", keep // 3, used)
    return page + siblings + rows("retain", keep - len(siblings), used)


def _sections(rows: Sequence[dict[str, Any]], concept: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows about the target and others, each part with its title; parts without rows are left out."""
    target = f"“{short(concept, 30)}”" if concept else "the target"
    sections = [(f"To be forgotten: images of {target}", [row for row in rows if row["forget"]])]
    sections.append(("To be kept: other images", [row for row in rows if not row["forget"]]))
    return [(title, part[:MAX_IMAGES]) for title, part in sections if part]


def plot_answer_page(
    rows: Sequence[dict[str, Any]], path: str | os.PathLike, *, concept: str = "", dpi: int = 150
) -> None:
    """Draws images with the answers before and after, the target's in one section and the kept ones in another.

    Args:
        rows (`list[dict]`): `image`, `before`, `after` (answers), `ok` (did the erasure do what it should here),
            `forget` (is it an image of the target); see `answer_page_rows`.
        path (`str` or `os.PathLike`): PNG file to write.
        concept (`str`, *optional*): Named in the title.
        dpi (`int`, defaults to 150): Dots per inch.
    """
    sections = _sections(rows, concept)
    with styled():
        if not sections:
            return _empty(path, "no answers", dpi)
        columns = min(8, max(4, max(len(part) for _, part in sections)))
        if len(rows) <= 24:
            columns = min(columns, 6)
        size, cell, line, header, margin = 1.05, 1.5, 1.68, 0.42, 0.25
        height = margin + 0.4 + sum(header + math.ceil(len(part) / columns) * line for _, part in sections)
        page = _Page(2 * margin + columns * cell - (cell - size) + 0.35, height)
        y = margin
        for title, part in sections:
            page.text(margin, y, title, fontsize=12, weight="bold")
            y += header
            for i, row in enumerate(part):
                x, top = margin + i % columns * cell, y + i // columns * line
                colour = (ERASED if row["forget"] else KEEP) if row["ok"] else BAD
                mark = "" if row["ok"] else "✗ "
                page.image(x, top, size, row["image"], edge=colour)
                page.text(x, top + size + 0.05, short(row["before"] or "(empty)", 18), fontsize=8.5, color="#777777")
                after = f"{mark}→ {short(row['after'] or '(empty)', 16 - len(mark))}"
                page.text(x, top + size + 0.23, after, fontsize=8.5, color=colour, weight="bold")
            y += math.ceil(len(part) / columns) * line
        page.text(margin, page.height - 0.32, "grey: before", fontsize=8.5, color="#777777")
        legend = [(0.95, "→ erased", ERASED), (1.75, "→ kept", KEEP), (2.4, "✗ → not as it should be", BAD)]
        for x, label, colour in legend:
            page.text(margin + x, page.height - 0.32, label, fontsize=8.5, color=colour, weight="bold")
        save_figure(page.figure, path, dpi)


def plot_probe_bars(report: ErasureReport, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Draws every score before and after as a pair of bars, what should fall above what should stay.

    Args:
        report ([`ErasureReport`]): The report.
        path (`str` or `os.PathLike`): PNG file to write.
        dpi (`int`, defaults to 150): Dots per inch.
    """
    with styled():
        figure = Figure(figsize=(8, 7.4), layout="constrained")
        axes = figure.add_subplot()
        ticks, labels = [], []
        for place, (key, entry) in enumerate(KEYS.items()):
            falls = entry.better == "lower"
            y = place + (0 if falls else 0.5)  # A gap between what should fall and what should stay.
            colour = FORGET if falls else KEEP
            for scores, offset, fill in ((report.before, -0.19, BEFORE), (report.after, 0.19, colour)):
                value = scores[key]["value"]
                axes.barh(y + offset, value or 0, height=0.36, color=fill)
                text = "not asked" if value is None else f"{value:.3f}"
                axes.text((value or 0) + 0.012, y + offset, text, va="center", fontsize=8, color=INK)
            ticks.append(y)
            labels.append(f"{entry.bar}\n(n = {report.after[key]['n']:,})")
        axes.set_yticks(ticks, labels)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.1), xlabel="share of answers")
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_title(f"Erasing “{short(report.concept, 40)}”", loc="left", fontsize=12, weight="bold")
        handles = [
            Patch(color=BEFORE, label="before"),
            Patch(color=FORGET, label="after (should be 0)"),
            Patch(color=KEEP, label="after (should stay)"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        save_figure(figure, path, dpi)


def plot_spectrum(null_space, path: str | os.PathLike, *, layer: str = "", dpi: int = 150) -> None:
    """Draws a layer's spectrum on retained data (log scale) with the filter its constraint applies (twin axis).

    Args:
        null_space ([`NullSpace`] or `tuple`): The layer's null space, or `(eigenvalues, filter)`, `(d,)` each:
            descending eigenvalues of C with mean 1, and the factor in [0, 1] an update keeps along each eigenvector.
        path (`str` or `os.PathLike`): PNG file to write.
        layer (`str`, *optional*): The layer's name, for the title.
        dpi (`int`, defaults to 150): Dots per inch.

    Raises:
        ValueError: If the two differ in length, are empty, or hold NaN or infinities.
    """
    if isinstance(null_space, (tuple, list)):
        eigenvalues, filters = null_space
    else:
        eigenvalues, filters = null_space.eigenvalues, null_space.spectrum_filters()
    eigenvalues, filters = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (eigenvalues, filters))
    if len(eigenvalues) != len(filters) or len(eigenvalues) == 0:
        raise ValueError(
            f"got {len(eigenvalues)} eigenvalues and {len(filters)} filter values; expected equally many, at least 1."
        )
    if not (np.isfinite(eigenvalues).all() and np.isfinite(filters).all()):
        raise ValueError("the spectrum holds NaN or infinities; fit the null space on finite activations.")
    with styled(axes__spines__right=True):
        figure = Figure(figsize=(7, 4.1), layout="constrained")
        left = figure.add_subplot()
        index = np.arange(1, len(eigenvalues) + 1)
        # Rounding leaves zero or slightly negative eigenvalues where the data have no energy: show them at the floor.
        floor = max(float(eigenvalues.max()), 1e-30) * 1e-9
        left.plot(index, np.maximum(eigenvalues, floor), color=KEEP, linewidth=1.8)
        left.set_yscale("log")
        left.set_xlim(0.5, len(index) + 0.5)
        left.set(xlabel="direction (eigenvector of C, by energy)", ylabel="eigenvalue λ (mean = 1)")
        left.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        left.yaxis.label.set_color(KEEP)
        left.grid(color="#eeeeee", linewidth=0.7)
        right = left.twinx()
        right.plot(index, filters, color=FORGET, linewidth=1.8, linestyle="--")
        right.fill_between(index, filters, color=FORGET, alpha=0.08, linewidth=0)
        # A strict constraint lets little through anywhere: what counts is its shape.
        top = 1.0 if filters.max() > 0.5 else max(float(filters.max()), 1e-6)
        right.set(ylim=(-0.02 * top, 1.05 * top), ylabel="share of the update that passes")
        right.yaxis.label.set_color(FORGET)
        title = f"Retained spectrum and filter\n{_short_layer(layer)}" if layer else "Retained spectrum and filter"
        left.set_title(title, loc="left", fontsize=11)
        handles = [
            Line2D([], [], color=KEEP, linewidth=1.8, label="retained energy λ (left)"),
            Line2D([], [], color=FORGET, linewidth=1.8, linestyle="--", label=_filter_label(null_space)),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=1, frameon=False)
        save_figure(figure, path, dpi)


def _filter_label(null_space) -> str:
    """What the filter is, and why it is flat at the end: beyond the eigenvectors that are kept it has one value."""
    kind = FITTED.get(getattr(null_space, "constraint", ""))
    if kind is None or kind.formula is None:
        return "filter (right)"
    label = f"filter {kind.formula(null_space)} (right)"
    kept = len(null_space.filters)
    return label if null_space.outside == 1 else f"{label}; {null_space.outside:.2g} in all beyond the {kept} kept"


def _short_layer(name: str, width: int = 80) -> str:
    """A layer's name is told by its end."""
    return name if len(name) <= width else "…" + name[-(width - 1) :]
