"""Beside an `attacks.json`: which erasure its attacks were made on, and with what."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attacks.kinds import KINDS
from ..attacks.report import AttackReport
from ..records.folder import ATTACKS_NAME, ATTACKS_RUN_NAME
from ..records.io import write_json
from ..records.measured import other_weights
from ..records.safe_json import read_json
from .erased import ErasedModel


def outcome(report: AttackReport, name: str) -> str:
    """What came of an attack, in a line.

    Args:
        report ([`AttackReport`]): That has it.
        name (`str`): Its key.
    """
    entry = report.attacks[name]
    compared = [f"{key} {entry[key]:.2f}" for key in ("before", "control") if entry[key] is not None]
    return f"{KINDS[name].label}: {entry['value']:.2f}" + (f" ({', '.join(compared)})" if compared else "")


@dataclass(frozen=True)
class AttackRun:
    """
    What an earlier call left in a folder.

    Args:
        output (`pathlib.Path`): The folder.
        report ([`AttackReport`], *optional*): Its attacks.
        noted (`dict`): What is noted of them: `erased`, the model; `job`, what those in `done` were made with.
    """

    output: Path
    report: AttackReport | None
    noted: dict[str, Any]

    @classmethod
    def read(cls, output: str | os.PathLike, concept: str) -> AttackRun:
        """Reads a folder, which may not be there.

        Args:
            output (`str` or `os.PathLike`): The folder.
            concept (`str`): The erased name.

        Raises:
            ValueError: If it holds attacks on the erasure of something else, or damaged ones.
        """
        folder = Path(output)
        report = AttackReport.load(folder) if (folder / ATTACKS_NAME).exists() else None
        if report is not None and report.concept != concept:
            raise ValueError(
                f"{folder} holds attacks on the erasure of {report.concept!r}, not {concept!r}; choose another folder."
            )
        path = folder / ATTACKS_RUN_NAME
        noted = read_json(path, kind="job of attacks", remedy="Remove it.") if report and path.is_file() else {}
        return cls(folder, report, noted)

    def of_the_same(self, erased: ErasedModel) -> AttackReport | None:
        """The attacks there are, if they were made on this model; says so if they were not, or nobody knows.

        Args:
            erased ([`ErasedModel`]): The model.
        """
        if self.report is None:
            return None
        model = self.noted.get("erased")
        other = ATTACKS_NAME in other_weights(self.output) if model is None else model != erased.identity()
        if other:
            print(f"The attacks in {self.output} were made on another model; they are replaced.", file=sys.stderr)
            return None
        if model is None:
            print(
                f"There is no record of which model the other attacks in {self.output} were made on.", file=sys.stderr
            )
        return self.report

    def of_the_same_job(self, job: dict) -> AttackReport | None:
        """Those of the attacks there are that were made with the same.

        Args:
            job (`dict`): Everything that results depend on, as JSON gives it back.
        """
        if self.report is None:
            return None
        if self.noted.get("job") != job:
            print(
                f"The attacks in {self.output} were made with other settings or on something else, so they are made again.",
                file=sys.stderr,
            )
            return None
        kept = {name: entry for name, entry in self.report.attacks.items() if name in self.noted.get("done", ())}
        return AttackReport(self.report.concept, kept) if kept else None

    def void(self) -> None:
        """Before something else takes the place of the attacks there are: none of it may be taken for them."""
        if self.noted:
            write_json(self.output / ATTACKS_RUN_NAME, {**self.noted, "job": None, "done": []})

    def note(self, erased: ErasedModel, job: dict | None, done: Iterable[str]) -> None:
        """Notes what the attacks of the folder were made with. What is not in `done` is made again by the next call.

        Args:
            erased ([`ErasedModel`]): The model.
            job (`dict`, *optional*): See [`of_the_same_job`].
            done (`list[str]`): Names of the attacks that were made with it.
        """
        content = {"erased": erased.identity(), "job": job, "done": sorted(done)}
        write_json(self.output / ATTACKS_RUN_NAME, content)
