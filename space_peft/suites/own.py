"""A user's own suite: one subject a line of a JSON lines file, or a row of a dataset with the same columns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..records.safe_json import parse_json
from .schema import SPLITS, Protocol, Subject, Suite, SuiteQuestion, check_choice
from .sources import Record, is_local, read_table


_SUBJECT = ("name", "split", "questions", "id", "aliases", "images")
_QUESTION = (
    *("question", "answer", "kind", "modality", "task", "options", "paraphrases", "paraphrased_answers"),
    *("perturbed_answers", "keywords", "image"),
)


def load_own(source: str | os.PathLike, *, revision: str | None = None, protocol: Protocol | None = None) -> Suite:
    """Reads a suite of one's own.

    A subject is an object with `name`, `split` (`"forget"`, `"test"`, `"retain"`, `"real"` or `"holdout"`) and `questions`;
    `id`, `aliases` and `images` are optional. A question has `question`, `answer`, `kind` and `modality`, and what else
    [`SuiteQuestion`] has. docs/suites.md shows ten subjects.

    Args:
        source (`str` or `os.PathLike`): A `.jsonl` file, whose `images` are paths relative to its folder; a Parquet file or
            folder, or a dataset on the Hub, whose `images` are pictures.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        protocol ([`Protocol`], *optional*): How questions are put.

    Returns:
        [`Suite`]

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not JSON, or a subject or question is not as it should be; the message names file and line.
    """
    path = Path(source)
    rows: list[tuple[Record, tuple[Any, ...]]]
    if path.suffix == ".jsonl" and is_local(path):
        rows = [(record, _paths(record, path.parent)) for record in _lines(path)]
    else:
        table = read_table(source, revision=revision)
        table.require("name", "split", "questions", what="A suite of one's own")
        if "images" in table.columns and "images" not in table.images:
            raise ValueError(f"{table.label} has no pictures in its column 'images'; cast it to `List(Image())`.")
        rows = [(record, table.pictures(number, "images")) for number, record in table]
    subjects: dict[str, list[Subject]] = {}
    for record, images in rows:
        split = record.text("split")
        check_choice(split, SPLITS, f"{record.where}: `split`")
        subjects.setdefault(split, []).append(_subject(record, images))
    return Suite(path.stem if is_local(path) else str(source), subjects, protocol or Protocol(), source=str(source))


def _lines(path: Path) -> list[Record]:
    records = []
    # Bytes, and split at line feeds only: a text may hold other signs that `splitlines` takes for the end of a line.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            records.append(Record(parse_json(line, where=where, remedy="Expected one subject a line."), where))
    if not records:
        raise ValueError(f"{path} holds no subject; expected one a line.")
    return records


def _paths(record: Record, folder: Path) -> tuple[Path, ...]:
    paths = tuple(folder / name for name in record.texts("images", optional=True))
    if missing := [path for path in paths if not path.is_file()]:
        record.fail(f"names the picture {str(missing[0])!r}, and there is no such file")
    return paths


def _known(record: Record, keys: tuple[str, ...], what: str) -> None:
    # A misspelt "perturbed_answer" would otherwise be read as none.
    if unknown := [key for key in record.content if key not in keys]:
        record.fail(f"has {unknown[0]!r}, which would not be read; {what} has {list(keys)}")


def _subject(record: Record, images: tuple) -> Subject:
    _known(record, _SUBJECT, "a subject")
    return Subject(
        record.text("name"),
        tuple(_question(asked) for asked in record.records("questions")),
        record.text("id", record.text("name")),
        record.texts("aliases", optional=True),
        images,
        where=record.where,
    )


def _question(record: Record) -> SuiteQuestion:
    _known(record, _QUESTION, "a question")
    lists = ("options", "paraphrases", "paraphrased_answers", "perturbed_answers", "keywords")
    return SuiteQuestion(
        record.text("question"),
        record.text("answer"),
        record.text("kind"),
        record.text("modality"),
        record.content.get("task", ""),
        image=record.index("image") if "image" in record else None,
        where=record.where,
        **{name: record.texts(name, optional=True) for name in lists},
    )
