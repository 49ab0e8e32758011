"""What a model knows of one split of a suite: one JSON, one table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records.io import write_json
from ..records.safe_json import read_json
from ..records.versions import collect_versions
from ..statistics.intervals import interval_text
from .scoring import SHARES


KEYS = ("suite", "split", "fingerprint", "seed", "settings", "versions", "seconds", "notes", "scores", "rows")


@dataclass(frozen=True)
class SuiteReport:
    """Figures of one model on one split of a suite, with every answer behind them.

    Args:
        suite (`str`): The suite's name.
        split (`str`): Which of its splits.
        fingerprint (`str`): Of what was asked; reports of other models are compared only where it is the same.
        rows (`list[dict]`): One a question: what was asked, said, and how likely it was.
        scores (`list[dict]`): The figures: `modality`, `task`, `metric`, `value`, `n`, and `low`, `high` for shares.
        seed (`int`): Of which picture is shown.
        settings (`dict`, *optional*): What else was chosen.
        versions (`dict`, *optional*): By default `collect_versions()`.
        seconds (`float`): Wall-clock time.
        notes (`tuple[str, ...]`, *optional*): The suite's.
    """

    suite: str
    split: str
    fingerprint: str
    rows: Sequence[Mapping[str, Any]]
    scores: Sequence[Mapping[str, Any]]
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=collect_versions)
    seconds: float = 0.0
    notes: Sequence[str] = ()

    def value(self, metric: str, *, task: str | None = None, modality: str | None = None) -> float | None:
        """One figure.

        Args:
            metric (`str`): E.g. "accuracy".
            task (`str`, *optional*): E.g. "cloze"; may be left out where only one task has this metric.
            modality (`str`, *optional*): `"image+text"`, `"text"` or `"all"`; by default "all", or the only one there is.

        Raises:
            ValueError: If there is no such figure, or more than one.
        """
        found = [
            cell
            for cell in self.scores
            if cell["metric"] == metric and task in (None, cell["task"]) and modality in (None, cell["modality"])
        ]
        if modality is None and any(cell["modality"] == "all" for cell in found):
            found = [cell for cell in found if cell["modality"] == "all"]
        if len(found) != 1:
            there = [(cell["modality"], cell["task"]) for cell in self.scores if cell["metric"] == metric]
            raise ValueError(
                f"expected one figure {metric!r} for task {task!r} and modality {modality!r}, found {len(found)}; it is there "
                f"for {there}."
            )
        return found[0]["value"]

    def check_same(self, fingerprint: str, what: str) -> None:
        """Refuses a report of other questions.

        Raises:
            ValueError: If this report's fingerprint is another.
        """
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"`{what}` is a report of other questions ({self.suite}, {self.split}, seed {self.seed}, "
                f"{len(self.rows)} rows, fingerprint {self.fingerprint[:12]}; here {fingerprint[:12]}). Evaluate that model "
                "with the same suite, split and seed."
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {key: getattr(self, key) for key in KEYS}

    def to_table(self, *, markdown: bool = False) -> str:
        """The figures as a table: aligned text, or Markdown.

        In brackets are exact 95 % intervals of shares. They take rows for independent; several questions about one person are
        not, so that a share is known less well than they say.
        """
        rows = [["modality", "task", "metric", "value", "n"]]
        for cell in self.scores:
            value = "-" if cell["value"] is None else f"{cell['value']:.3f}"
            if cell["metric"] in SHARES and cell["value"] is not None:
                value += f" ({interval_text(cell['value'], cell['n'])})"
            rows.append([cell["modality"], cell["task"], cell["metric"], value, str(cell["n"])])
        if markdown:
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            return "\n".join([lines[0], "|---|---|---|---:|---:|", *lines[1:]])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        rule = "-" * max(len(line) for line in lines)
        title = f"{self.suite}, {self.split}: {len(self.rows)} questions"
        return "\n".join([title, rule, lines[0], rule, *lines[1:], rule])

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the JSON file, all or nothing. It holds every answer: whoever reads it reads what the model said of people.

        Args:
            path (`str` or `os.PathLike`): The file.
        """
        write_json(path, self.to_dict())
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> SuiteReport:
        """Reads a report.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is no report of a suite.
        """
        content = read_json(path, kind="report of a suite")
        if missing := [key for key in KEYS if key not in content]:
            raise ValueError(f"{path} is not a report of a suite: it lacks {missing}.")
        return cls(**{key: content[key] for key in KEYS})
