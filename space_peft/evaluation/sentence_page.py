"""A page of sentences: open prompts about images, answered before and after an erasure."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Any

from ..figures.style import BAD, ERASED, INK, KEEP, save_figure, styled
from ..records.escape import plain_line
from .plots import _empty, _Page, _sections
from .probes import Probe, ProbeResults


def sentence_page_rows(
    probes: Sequence[Probe], before: ProbeResults, after: ProbeResults, *, forget: int = 6, keep: int = 4
) -> list[dict[str, Any]]:
    """Picks rows for `plot_sentence_page`: open prompts about the target's images, then about others.

    Prompts take turns, so that each is shown, and so do images.

    Args:
        probes (`list[Probe]`): What both results answer (see `build_probes`).
        before, after ([`ProbeResults`]): Results of the original and the erased model.
        forget (`int`, defaults to 6): Rows about the target at most.
        keep (`int`, defaults to 4): Rows about other images at most, whose names the original model said.

    Returns:
        `list[dict]`: `image`, `question`, `before`, `after`, `ok`, `forget`.
    """
    page = []
    for name, limit in (("free_form", forget), ("retain_sentences", keep)):
        probe = next((probe for probe in probes if probe.name == name), None)
        if probe is None:
            continue
        records = [
            (old, new)
            for old, new in zip(before.rows(name, probe.part), after.rows(name, probe.part), strict=True)
            if old["known"] is not False and (name != "free_form" or old["hit"])
        ]
        questions = list(dict.fromkeys(old["question"] for old, _ in records))
        chosen: list[tuple[dict, dict]] = []
        for turn in range(min(limit, len(records))):
            # Among the rows of the prompt whose turn it is, one with an image shown least often so far.
            asked = [pair for pair in records if pair[0]["question"] == questions[turn % len(questions)]]
            asked = [pair for pair in asked if pair not in chosen] or [p for p in records if p not in chosen]
            shown = [old["image"] for old, _ in chosen]
            chosen.append(min(asked, key=lambda pair: shown.count(pair[0]["image"])))
        page += [
            {
                "image": probe.rows[new["row"]]["image"],
                "question": old["question"],
                "before": old["answer"],
                "after": new["answer"],
                "ok": new["hit"] != (name == "free_form"),
                "forget": name == "free_form",
            }
            for old, new in chosen
        ]
    return page


def plot_sentence_page(
    rows: Sequence[dict[str, Any]], path: str | os.PathLike, *, concept: str = "", dpi: int = 150
) -> None:
    """Draws images with an open prompt and the sentences that answer it before and after.

    Args:
        rows (`list[dict]`): As `sentence_page_rows` returns them.
        path (`str` or `os.PathLike`): PNG file to write.
        concept (`str`, *optional*): Named in the title.
        dpi (`int`, defaults to 150): Dots per inch.
    """
    sections = _sections(rows, concept)
    with styled():
        if not sections:
            return _empty(path, "no answers", dpi)
        size, margin, header, gap = 0.8, 0.25, 0.42, 0.12
        texts = [[_sentence_lines(row) for row in part] for _, part in sections]
        heights = [[max(size, 0.2 * len(lines)) + 0.18 for lines in part] for part in texts]
        page = _Page(8.2, 2 * margin + 0.3 + sum(header + sum(part) + gap for part in heights))
        y = margin
        for (title, part), lines_of, height_of in zip(sections, texts, heights, strict=True):
            page.text(margin, y, title, fontsize=12, weight="bold")
            y += header
            for row, lines, height in zip(part, lines_of, height_of, strict=True):
                colour = (ERASED if row["forget"] else KEEP) if row["ok"] else BAD
                page.image(margin, y, size, row["image"], edge=colour)
                styles = {
                    "question": {"color": INK, "style": "italic"},
                    "before": {"color": "#777777"},
                    "after": {"color": colour, "weight": "bold"},
                }
                for i, (kind, line) in enumerate(lines):
                    page.text(margin + size + 0.2, y + 0.2 * i, line, fontsize=8.5, **styles[kind])
                y += height
            y += gap
        page.text(margin, page.height - 0.3, "grey: before; coloured: after; ✗: not as it should be", fontsize=8.5)
        save_figure(page.figure, path, dpi)


def _sentence_lines(row: dict[str, Any], width: int = 92) -> list[tuple[str, str]]:
    """A row's text as lines: what was asked, the answer before, the answer after."""
    mark = "→" if row["ok"] else "✗ →"
    lines = []
    for kind, text in (
        ("question", row["question"]),
        ("before", row["before"] or "(empty)"),
        ("after", f"{mark} {row['after'] or '(empty)'}"),
    ):
        wrapped = textwrap.wrap(plain_line(text, 4 * width), width)[:3] or [""]
        lines += [(kind, line.replace("$", r"\$")) for line in wrapped]
    return lines
