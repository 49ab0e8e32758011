"""Finished runs of a benchmark, kept in a file: an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path


class KeptRows:
    """
    The finished runs that were made with the same settings.

    Args:
        output (`Path`, *optional*): The benchmark's results; the file is `.rows.jsonl` beside them. `None`: none is kept.
        made_with: What makes a run the same, plain values by name.

    Attributes:
        rows (`list[dict]`): Without what they were made with.
    """

    def __init__(self, output: Path | None, **made_with):
        self._path = None if output is None else output.with_suffix(".rows.jsonl")
        self._made_with = made_with
        lines = self._path.read_text().splitlines() if self._path is not None and self._path.exists() else []
        found = [json.loads(line) for line in lines]
        self.rows = [row for row in found if [row.pop(name, None) for name in made_with] == list(made_with.values())]

    def add(self, new: list[dict]) -> None:
        """Takes up runs that have just finished."""
        self.rows += new
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.writelines(json.dumps({**row, **self._made_with}) + "\n" for row in new)
