"""One erasure in one JSON file and one table: what was forgotten and what was kept."""

from __future__ import annotations

import json
import math
import os
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..records.escape import markdown_text
from ..records.folder import ANSWERS_NAMES, REPORT_NAME, REPORT_TEXT_NAME
from ..records.io import atomic_path, write_json
from ..records.safe_json import read_json
from ..records.versions import collect_versions as collect_versions
from ..statistics.intervals import MOST_TRIALS, interval_text
from .keys import FORGOTTEN, KEYS
from .probes import ProbeResults


_WIDTH = 100


def check_scores(scores: dict[str, dict], where: str) -> None:
    """Refuses scores a reader could misunderstand.

    Raises:
        ValueError: If a key of `KEYS` is missing, a value is not in [0, 1] (NaN included), or an `n` of 0 does
            not go with the value None.
    """
    missing = [key for key in KEYS if key not in scores]
    if missing:
        raise ValueError(f"`{where}` lacks {missing}; expected the keys {list(KEYS)} (see `build_probes`).")
    accuracies = {f"{key}.accuracy": score["accuracy"] for key, score in scores.items() if "accuracy" in score}
    for key, score in {**scores, **accuracies}.items():
        value, n = score.get("value"), score.get("n")
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= MOST_TRIALS:
            raise ValueError(f"`{where}.{key}.n` must be a number of rows (at most {MOST_TRIALS:,}), got {n!r:.40}.")
        if value is None and n > 0 or value is not None and n == 0:
            raise ValueError(f"`{where}.{key}`: value {value!r} does not go with n {n}; n 0 goes with None.")
        if value is not None and not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"`{where}.{key}.value` must be a share in [0, 1], got {value!r}.")


@dataclass(frozen=True)
class ErasureReport:
    """Scores before and after an erasure and what they depend on.

    Args:
        concept (`str`): What was erased.
        before (`dict[str, dict]`): `ProbeResults.scores` of the original model.
        after (`dict[str, dict]`): `ProbeResults.scores` of the erased one.
        seed (`int`, *optional*): Of the run.
        settings (`dict`, *optional*): Everything else that was chosen; JSON values only.
        versions (`dict`, *optional*): By default `collect_versions()`.
        seconds (`dict[str, float]`, *optional*): Wall-clock time of each stage.
    """

    concept: str
    before: dict[str, dict]
    after: dict[str, dict]
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=collect_versions)
    seconds: dict[str, float] = field(default_factory=dict)
    results: tuple[ProbeResults, ProbeResults] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if not isinstance(self.concept, str):
            raise ValueError(f"`concept` must be the erased name, got {self.concept!r}.")
        check_scores(self.before, "before")
        check_scores(self.after, "after")

    @classmethod
    def from_results(cls, concept: str, before: ProbeResults, after: ProbeResults, **kwargs) -> ErasureReport:
        """A report that also saves every answer.

        Args:
            concept (`str`): What was erased.
            before ([`ProbeResults`]): Of the original model.
            after ([`ProbeResults`]): Of the erased one, evaluated with `baseline=before`.
            kwargs (*optional*): `seed`, `settings`, `versions`, `seconds`.

        Returns:
            [`ErasureReport`]
        """
        return cls(concept=concept, before=before.scores, after=after.scores, results=(before, after), **kwargs)

    @property
    def verdict(self) -> Literal["erased", "partly", "failed", "not known before", "unknown"]:
        """How much may be claimed: by how many of the concept's pictures it is still named on."""
        before, after = self.before["forget"]["value"], self.after["forget"]["value"]
        if after is None:
            return "unknown"
        if after <= FORGOTTEN:
            # What the original model does not name either shows nothing.
            return "not known before" if before is not None and before <= FORGOTTEN else "erased"
        return "failed" if before is not None and after >= before else "partly"

    def to_dict(self) -> dict[str, Any]:
        """The content of `report.json`."""
        keys = ("concept", "seed", "settings", "versions", "before", "after", "seconds")
        return {key: getattr(self, key) for key in keys}

    def to_table(self, *, markdown: bool = False) -> str:
        """The figures as a table: text of at most 100 columns, or Markdown, which has the keys of `report.json` as well.

        The last column is the number of rows behind `after`. `retain`, `retain_sentences`, `retain_unseen_style` and
        `siblings` are shares of what the original model knew, hence 1.000 before; its accuracy over all rows stands
        behind, or below. In brackets are exact 95 % intervals ([`exact_interval`]). They take rows for independent:
        several questions about one image are not, so that a share over n images with m questions each is known no better
        than one of n, at worst. Of what has no row, the text has the names alone.
        """
        speech = self._speech()
        if markdown:
            rows = [["probe", "what", "better", "before", "after", "n"]]
            for key, entry in KEYS.items():
                cells = [_cell(self.before[key], measured=not entry.kept), _cell(self.after[key])]
                rows.append([key, entry.label, entry.better, *cells, str(self.after[key]["n"])])
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            table = [lines[0], "|---|---|---|---:|---:|---:|", *lines[1:]]
            return "\n".join(table if speech is None else [*table, "", " ".join(speech)])
        rows = [["", "better", "before", "after", "n"], *(row for key in KEYS for row in self._rows(key))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(widths[i]) if i > 1 else cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip()
            for row in rows
        ]
        rule = "-" * max(map(len, lines))
        title = f"Erasing {self.concept!r}" + ("" if self.seed is None else f" (seed {self.seed})")
        missing = [entry.label for key, entry in KEYS.items() if not self.after[key]["n"]]
        table = [title, rule, lines[0], rule, *lines[1:], rule]
        if missing:
            table += textwrap.wrap(f"Not asked, or not known before: {'; '.join(missing)}.", _WIDTH)
        return "\n".join([*table, *(speech or ()), "In brackets: exact 95 % intervals, as if rows were independent."])

    def _rows(self, key: str) -> list[list[str]]:
        """The lines of a key in the table as text: none without a row, two where accuracy is another share."""
        before, after, entry = self.before[key], self.after[key], KEYS[key]
        rows = []
        if after["n"]:
            cells = [_share(before, measured=not entry.kept), _share(after)]
            rows.append([entry.label, entry.better, *cells, str(after["n"])])
        of_all = [score.get("accuracy") or {"value": None, "n": 0} for score in (before, after)]
        if of_all[1]["n"] and any(
            part["value"] != score["value"] for part, score in zip(of_all, (before, after), strict=True)
        ):
            label = "  of all asked" if rows else f"{entry.label}, of all asked"
            rows.append([label, entry.better, *map(_share, of_all), str(of_all[1]["n"])])
        return rows

    def _speech(self) -> list[str] | None:
        """What `judge_sentences` found, in two lines."""
        before, after = (scores["free_form"] for scores in (self.before, self.after))
        values: list[Any] = [score.get(key) for key in ("perplexity", "repetition") for score in (before, after)]
        if None in values:
            return None
        old, new, old_runs, new_runs = values
        return [
            f"Sentences about the target, read by the original model: perplexity {old:.1f} before, {new:.1f} after;",
            f"runs of three words said again {old_runs:.3f} before, {new_runs:.3f} after.",
        ]

    def sentences(self, limit: int = 4) -> list[tuple[str, str, str]]:
        """Some answers in sentences about the target, each to another prompt: `(prompt, before, after)`.

        Args:
            limit (`int`, defaults to 4): How many.

        Returns:
            `list[tuple[str, str, str]]`: Empty for a report without its answers (one that was loaded).
        """
        if self.results is None:
            return []
        before, after = (results.rows("free_form") for results in self.results)
        pairs: dict[str, tuple[str, str, str]] = {}
        for old, new in zip(before, after, strict=True):
            if old["hit"]:
                pairs.setdefault(old["question"], (old["question"], old["answer"], new["answer"]))
        return list(pairs.values())[:limit]

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `report.json`, `report.md` and, if made from results, `answers_before.jsonl`, `answers_after.jsonl`.

        Each file appears whole or not at all, `report.json` last: where it stands, the others do.

        Args:
            folder (`str` or `os.PathLike`): Created if missing.

        Returns:
            `pathlib.Path`: Path of `report.json`.
        """
        folder = Path(folder)
        json.dumps(self.to_dict(), allow_nan=False)  # Refuse what JSON cannot hold before anything is written.
        if self.results is not None:
            for name, results in zip(ANSWERS_NAMES, self.results, strict=True):
                results.save_answers(folder / name)
        page = f"# Erasing {markdown_text(self.concept)}\n\n{self.to_table(markdown=True)}\n"
        with atomic_path(folder / REPORT_TEXT_NAME) as temporary:
            temporary.write_text(page, encoding="utf-8")
        write_json(folder / REPORT_NAME, self.to_dict())
        return folder / REPORT_NAME

    @classmethod
    def load(cls, path: str | os.PathLike) -> ErasureReport:
        """Reads a report from its file or folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is no erasure report.
        """
        path = Path(path)
        path = path / REPORT_NAME if path.is_dir() else path
        content = read_json(path, kind="erasure report")
        expected = ("concept", "seed", "settings", "versions", "before", "after", "seconds")
        missing = [key for key in expected if key not in content]
        if missing:
            raise ValueError(f"{path} is not an erasure report: it lacks {missing}.")
        try:
            return cls(**{key: content[key] for key in expected})
        except (AttributeError, TypeError) as error:  # Scores that are no objects, values that are no numbers.
            raise ValueError(f"{path} is not an erasure report: {error}.") from error


def _share(score: dict, *, measured: bool = True) -> str:
    if score["value"] is None:
        return "-"
    interval = f" ({interval_text(score['value'], score['n']).replace(' to ', '-')})" if measured else ""
    return f"{score['value']:.3f}{interval}"


def _cell(score: dict, *, measured: bool = True) -> str:
    if score["value"] is None:
        return "-"
    value = f"{score['value']:.3f}" + (f" (95 %: {interval_text(score['value'], score['n'])})" if measured else "")
    accuracy = score.get("accuracy", {})
    if accuracy.get("value") in (None, score["value"]):
        return value
    return f"{value}; all: {accuracy['value']:.3f} ({interval_text(accuracy['value'], accuracy['n'])})"
