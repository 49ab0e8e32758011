"""MLLMU-Bench (Liu et al., NAACL 2025): fictitious people and celebrities, three tasks, by picture and in words.

Columns and rules are those of the dataset `MLLMMU/MLLMU-Bench` and of `eval.py` in franciscoliu/MLLMU-Bench (read at commit
0e3098e); none of its code is used. Where ours differs is in docs/suites.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..records.safe_json import parse_json
from .schema import IMAGE_TEXT, LETTERS, TEXT_ONLY, Protocol, Subject, Suite, SuiteQuestion
from .sources import Record, Table, read_table


HUB_ID = "MLLMMU/MLLMU-Bench"
SHARES = ("5", "10", "15")
TASKS = ("Classification_Task", "Generation_Task", "Mask_Task")
PROTOCOL = Protocol(
    prompts={
        "classification": "{question}\n{options}\nJust give ONE letter representing the answer directly.",
        "cloze": "{question}\nPlease **ONLY** provide the correct answer that should replace the [Blank].",
        "generation": "{question}\nAnswer the question based on your trained knowledge in one sentence accurately in ENGLISH.",
    },
    rouge="f",
    paraphrases=False,
)
# By kind: of how many people the questions are examples in the official code.
SHOTS = {"classification": 1, "cloze": 2}
_TYPES = {"Image_Textual": IMAGE_TEXT, "Pure_Text": TEXT_ONLY}
_BLANK = re.compile("_{2,}")
_WHAT = "MLLMU-Bench"


def load_mllmu(
    source: str | os.PathLike = HUB_ID,
    split: str = "forget_5",
    *,
    revision: str | None = None,
    splits: Sequence[str] = ("forget", "test", "retain", "real"),
    few_shot: bool = False,
    training: bool = False,
) -> Suite:
    """Reads MLLMU-Bench, or a set of one's own in its schema.

    Such a set may have what the benchmark lacks: a column `name`, and in the entries of `Generation_Task` and `Mask_Task` lists
    `Perturbed_Answers` and `Paraphrased_Answers`, without which there is no truth ratio.

    Args:
        source (`str` or `os.PathLike`, defaults to the dataset on the Hub): Hub id, or a folder with a folder of Parquet
            files (or one file) for each of `forget_5`, `retain_95`, `Test_Set` and `Retain_Set`.
        split (`str`, defaults to `"forget_5"`): Which people are forgotten: `"forget_5"`, `"forget_10"` or `"forget_15"`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        splits (`list[str]`, *optional*): Which of `"forget"`, `"test"` (the forgotten people in other pictures), `"retain"`
            and `"real"` (celebrities) are read. `"holdout"` (`Holdout_Set`) is for sets of one's own in this schema.
        few_shot (`bool`, defaults to `False`): With examples, as the official code: all choices of one person, and all blanks
            of two, stand with their answers before those of the others, and are not asked. The model must take many pictures.
        training (`bool`, defaults to `False`): With the training pairs of the people in "forget" and "retain" (`ft_Data`).

    Returns:
        [`Suite`]

    Raises:
        FileNotFoundError: If a folder lacks one of them.
        ValueError: If a column is missing or a row is not as it should be; the message names file and row.
    """
    share = split.removeprefix("forget_")
    if split == share or share not in SHARES:
        raise ValueError(f"`split` must be one of {[f'forget_{n}' for n in SHARES]}, got {split!r}.")
    configs = {
        "forget": split,
        "test": "Test_Set",
        "retain": f"retain_{100 - int(share)}",
        "real": "Retain_Set",
        "holdout": "Holdout_Set",
    }
    if unknown := [name for name in splits if name not in configs]:
        raise ValueError(f"`splits` may hold {list(configs)}, got {unknown[0]!r}.")
    subjects = {}
    forgotten: set[str] = set()
    if "test" in splits or "forget" in splits:
        subjects["forget"] = _subjects(read_table(source, split, revision=revision), "image")
        forgotten = {subject.id for subject in subjects["forget"]}
    for name in ("test", "retain", "real", "holdout"):
        if name in splits:
            table = read_table(source, configs[name], revision=revision)
            # The test set has all people; those of the request are asked about.
            subjects[name] = _subjects(
                table, "images" if name == "test" else "image", only=forgotten if name == "test" else None
            )
    if "test" in splits and (missing := forgotten - {subject.id for subject in subjects["test"]}):
        raise ValueError(
            f"{source}: {sorted(missing)[0]!r} of {split!r} is not in 'Test_Set' ({len(missing)} people are missing there)."
        )
    if "forget" not in splits:
        subjects.pop("forget", None)
    if training:
        pairs = _pairs(read_table(source, "ft_Data", revision=revision))
        for name in ("forget", "retain"):
            subjects[name] = tuple(_taught(subject, pairs) for subject in subjects.get(name, ()))
    protocol = replace(PROTOCOL, shots=SHOTS) if few_shot else PROTOCOL
    return Suite("mllmu", subjects, protocol, source=f"{source} ({split})")


def _subjects(table: Table, column: str, only: set[str] | None = None) -> tuple[Subject, ...]:
    table.require("ID", column, *TASKS, what=f"{_WHAT} with the column {column!r}")
    subjects = []
    for number, row in table:
        id = row.text("ID")
        if only is not None and id not in only:
            continue
        questions = _choices(row.record(TASKS[0]))
        questions += _free(row, "Mask_Task", "cloze") + _free(row, "Generation_Task", "generation")
        subjects.append(
            # The benchmark has no names of its own, and questions in words say it; the id stands for it.
            Subject(row.text("name", id), questions, id, images=table.pictures(number, column), where=row.where)
        )
    return tuple(subjects)


def _pairs(table: Table) -> dict[str, tuple[SuiteQuestion, ...]]:
    """Questions about a person's picture and their answers, by id."""
    table.require("ID", "image", "metadata", what=f"{_WHAT}'s ft_Data")
    pairs = {}
    for _, row in table:
        parsed = parse_json(row.text("metadata").encode(), where=f"{row.where}, metadata", expected=list)
        pairs[row.text("ID")] = tuple(
            SuiteQuestion(
                pair.text("Question"), pair.text("Answer"), "generation", IMAGE_TEXT, task="training", where=pair.where
            )
            for number, content in enumerate(parsed)
            for pair in [Record(content, f"{row.where}, metadata[{number}]")]
        )
    return pairs


def _taught(subject: Subject, pairs: Mapping[str, tuple[SuiteQuestion, ...]]) -> Subject:
    if not pairs.get(subject.id):
        raise ValueError(f"{subject.where}: {subject.id!r} has no training pairs in 'ft_Data'.")
    return replace(subject, training=pairs[subject.id])


def _choices(task: Record) -> tuple[SuiteQuestion, ...]:
    questions = []
    for key, modality in (("Image_Textual_Questions", IMAGE_TEXT), ("Pure_Text_Questions", TEXT_ONLY)):
        for asked in task.records(key, optional=True):
            options = asked.record("Options")
            # A struct in Arrow has every letter that any row has; those without a text are not options of this one.
            texts = {letter: options.text(letter) for letter in LETTERS if letter in options}
            if list(texts) != list(LETTERS[: len(texts)]):
                options.fail(f"has the letters {list(texts)}; expected A, B, C, ... without a gap")
            letter = asked.text("Correct_Answer").strip().upper()
            if letter not in texts:
                asked.fail(f"has the right answer {letter!r}; expected one of the letters {list(texts)}")
            questions.append(
                SuiteQuestion(
                    asked.text("Question"),
                    texts[letter],
                    "classification",
                    modality,
                    options=tuple(texts.values()),
                    where=asked.where,
                )
            )
    return tuple(questions)


def _free(row: Record, task: str, kind: str) -> tuple[SuiteQuestion, ...]:
    questions = []
    for asked in row.records(task, optional=True):
        type_ = asked.text("Type")
        if type_ not in _TYPES:
            asked.fail(f"is of type {type_!r}; expected one of {list(_TYPES)}")
        question = SuiteQuestion(
            asked.text("Question"),
            asked.text("Ground_Truth"),
            kind,
            _TYPES[type_],
            paraphrased_answers=asked.texts("Paraphrased_Answers", optional=True),
            perturbed_answers=asked.texts("Perturbed_Answers", optional=True),
            where=asked.where,
        )
        if kind == "cloze":
            question = replace(question, question=_BLANK.sub("[Blank]", question.question))
        questions.append(question)
    return tuple(questions)
