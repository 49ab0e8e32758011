"""All attacks on one erasure in one JSON file, one table and one picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records.folder import ATTACKS_NAME, ATTACKS_PICTURE_NAME
from ..records.io import write_json
from ..records.safe_json import read_json
from ..records.versions import collect_versions
from ..statistics.intervals import MOST_TRIALS, interval_text
from .kinds import KINDS
from .results import AttackResult


_KEYS = ("value", "control", "before", "n", "meaning", "details")


@dataclass(frozen=True)
class AttackReport:
    """What attacks on an erasure found; beside `report.json`.

    Args:
        concept (`str`): What was erased.
        attacks (`dict[str, dict]`): By attack (a key of `KINDS`), what `AttackResult.to_dict` returns: `value`,
            `control` and `before` in [0, 1] or None, `n`, `meaning`, `details`. Lower values mean a deeper erasure;
            a value that is no higher than its control means that the attack found nothing.
        versions (`dict`, *optional*): By default `collect_versions()`.
    """

    concept: str
    attacks: dict[str, dict[str, Any]]
    versions: dict[str, str | None] = field(default_factory=collect_versions)

    def __post_init__(self):
        if not isinstance(self.concept, str) or not self.concept:
            raise ValueError(f"`concept` must be the erased name, got {self.concept!r}.")
        if not isinstance(self.attacks, dict) or not self.attacks:
            raise ValueError(f"`attacks` must hold at least one of {list(KINDS)}, got {self.attacks!r}.")
        for name, entry in self.attacks.items():
            _check_entry(name, entry)

    def updated(self, other: AttackReport) -> AttackReport:
        """This report with another's attacks added; where both hold one, the other's counts.

        Raises:
            ValueError: If the other is about another concept.
        """
        if other.concept != self.concept:
            raise ValueError(f"one report is about {self.concept!r}, the other about {other.concept!r}.")
        return AttackReport(self.concept, {**self.attacks, **other.attacks}, other.versions)

    @classmethod
    def from_results(cls, concept: str, results: Iterable[AttackResult]) -> AttackReport:
        """Collects results, one of a kind at most.

        Args:
            concept (`str`): What was erased.
            results (`Iterable[AttackResult]`): What the attacks returned.

        Returns:
            [`AttackReport`]
        """
        attacks: dict[str, dict] = {}
        for result in results:
            if result.name in attacks:
                raise ValueError(f"got two results of {result.name!r}; a report holds one of each.")
            # Through JSON, so that a report is the same before it is saved and after it is loaded.
            attacks[result.name] = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        return cls(concept, attacks)

    def to_dict(self) -> dict[str, Any]:
        """The content of `attacks.json`."""
        return {"concept": self.concept, "attacks": self.attacks, "versions": self.versions}

    def too_weak(self) -> list[str]:
        """The attacks that fail on the deployed model as well, so that their result is no success of the erasure."""
        return [name for name, kind in KINDS.items() if name in self.attacks and kind.says_nothing(self.attacks[name])]

    def to_table(self, *, markdown: bool = False) -> str:
        """Value, control and value before the erasure of each attack: aligned text, or Markdown; and which say nothing."""
        weak = self.too_weak()
        rows = [["attack", "before", "after", "control", "n"]]
        for name, kind in KINDS.items():
            if name in self.attacks:
                entry = self.attacks[name]
                cells = {key: _cell(entry[key]) for key in ("before", "value", "control")}
                if kind.is_share:
                    cells["value"] += f" (95 %: {interval_text(entry['value'], entry['n'])})"
                if name in weak:
                    cells["value"] += " (says nothing)"
                rows.append([kind.label, *cells.values(), str(entry["n"])])
        if markdown:
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            lines = [lines[0], "|---|---:|---:|---:|---:|", *lines[1:]]
        else:
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            lines = [
                "  ".join(
                    cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))
                ).rstrip()
                for row in rows
            ]
        notes = [
            f"{KINDS[name].label}: this does not find {self.concept!r} in the deployed model either, before anything was erased. "
            f"That it finds nothing after says nothing: {KINDS[name].stronger}."
            for name in weak
        ]
        return "\n".join([*lines, *(f"\n{note}" for note in notes)])

    def save(self, folder: str | os.PathLike, *, picture: bool = True) -> Path:
        """Writes `pictures/attacks.png` and `attacks.json`, each whole or not at all.

        Args:
            folder (`str` or `os.PathLike`): Created if missing.
            picture (`bool`, defaults to `True`): Whether to draw the picture.

        Returns:
            `pathlib.Path`: Path of `attacks.json`.
        """
        folder = Path(folder)
        if picture:
            plot_attacks(self, folder / ATTACKS_PICTURE_NAME)
        write_json(folder / ATTACKS_NAME, self.to_dict())
        return folder / ATTACKS_NAME

    @classmethod
    def load(cls, path: str | os.PathLike) -> AttackReport:
        """Reads a report from its file or folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is not a report of attacks: keys missing or unknown, values out of range.
        """
        path = Path(path)
        path = path / ATTACKS_NAME if path.is_dir() else path
        content = read_json(path, kind="report of attacks", remedy="Run the attacks again, or download the file again.")
        expected = {"concept", "attacks", "versions"}
        if not isinstance(content, dict) or set(content) != expected:
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} is not a report of attacks: expected the keys {sorted(expected)}, got {found}.")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def plot_attacks(report: AttackReport, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Draws every attack of a report.

    Args:
        report ([`AttackReport`]): The report, made or loaded.
        path (`str` or `os.PathLike`): PNG file to write, whole or not at all.
        dpi (`int`, defaults to 150): Dots per inch.
    """
    from .plots import draw_attacks  # matplotlib, for those who draw

    draw_attacks(report.concept, report.attacks, path, dpi=dpi)


def _check_entry(name: str, entry: Any) -> None:
    if name not in KINDS:
        raise ValueError(f"`attacks` holds the unknown {name!r}; expected some of {list(KINDS)}.")
    if not isinstance(entry, dict) or set(entry) != set(_KEYS):
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"`attacks.{name}` must have the keys {list(_KEYS)}, got {found}.")
    for key in ("value", "control", "before"):
        value = entry[key]
        if value is None and key != "value":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"`attacks.{name}.{key}` must be a number in [0, 1], got {value!r}.")
        if not -1e-6 <= value <= 1 + 1e-6:
            raise ValueError(f"`attacks.{name}.{key}` must be in [0, 1], got {value!r}.")
    if isinstance(entry["n"], bool) or not isinstance(entry["n"], int) or not 1 <= entry["n"] <= MOST_TRIALS:
        raise ValueError(f"`attacks.{name}.n` must be a number of rows, at least 1, got {entry['n']!r:.40}.")
    if not isinstance(entry["meaning"], str) or not entry["meaning"]:
        raise ValueError(f"`attacks.{name}.meaning` must be a sentence, got {entry['meaning']!r}.")
    if not isinstance(entry["details"], dict):
        raise ValueError(f"`attacks.{name}.details` must be a dictionary, got {type(entry['details']).__name__}.")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
