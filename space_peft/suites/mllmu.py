"""MLLMU-Bench (Liu et al., NAACL 2025): fictitious people and celebrities, three tasks, by picture and in words.

Columns and rules are those of the dataset `MLLMMU/MLLMU-Bench` and of `eval.py` in franciscoliu/MLLMU-Bench (read at commit
0e3098e); none of its code is used. Where ours differs is in docs/suites.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
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
# By split: the table that holds it.
CONFIGS = {
    "forget": "forget_{share}",
    "test": "Test_Set",
    "retain": "retain_{rest}",
    "real": "Retain_Set",
    "holdout": "Holdout_Set",
}
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

    Such a set may have what the benchmark lacks: a column `name`; several pictures in a column `images`, which is read instead
    of `image`; and in the entries of `Generation_Task` and `Mask_Task` lists `Perturbed_Answers` and `Paraphrased_Answers`,
    without which there is no truth ratio, `Paraphrased_Questions` and `Keywords`.

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
    return mllmu_suite(
        lambda config: read_table(source, config, revision=revision),
        f"{source} ({split})",
        split,
        splits=splits,
        few_shot=few_shot,
        training=training,
        name="mllmu",
        protocol=PROTOCOL,
    )


def check_split(split: str) -> str:
    """The share of a split in per cent.

    Raises:
        ValueError: If it is none of those that there are.
    """
    share = split.removeprefix("forget_")
    if split == share or share not in SHARES:
        raise ValueError(f"`split` must be one of {[f'forget_{n}' for n in SHARES]}, got {split!r}.")
    return share


def mllmu_suite(
    read: Callable[[str], Table],
    source: str,
    split: str,
    *,
    splits: Sequence[str],
    few_shot: bool = False,
    training: bool = False,
    name: str,
    protocol: Protocol,
    notes: tuple[str, ...] = (),
) -> Suite:
    """A suite of tables in MLLMU-Bench's schema, wherever they are.

    Args:
        read (callable): Gives a table by its config.
        source (`str`): What they are, for errors and reports.
        split, splits, few_shot, training (*optional*): As in `load_mllmu`.
        name (`str`): Of the suite.
        protocol ([`Protocol`]): How questions are put.
        notes (`tuple[str, ...]`, *optional*): Of the suite.

    Returns:
        [`Suite`]
    """
    share = check_split(split)
    if unknown := [name for name in splits if name not in CONFIGS]:
        raise ValueError(f"`splits` may hold {list(CONFIGS)}, got {unknown[0]!r}.")
    configs = {key: config.format(share=share, rest=100 - int(share)) for key, config in CONFIGS.items()}
    subjects = {}
    forgotten: set[str] = set()
    if "test" in splits or "forget" in splits:
        subjects["forget"] = _subjects(read(configs["forget"]), "image")
        forgotten = {subject.id for subject in subjects["forget"]}
    for key in ("test", "retain", "real", "holdout"):
        if key in splits:
            table = read(configs[key])
            # The test set has all people; those of the request are asked about.
            subjects[key] = _subjects(
                table, "images" if key == "test" else "image", only=forgotten if key == "test" else None
            )
    if "test" in splits and (missing := forgotten - {subject.id for subject in subjects["test"]}):
        raise ValueError(
            f"{source}: {sorted(missing)[0]!r} of {split!r} is not in 'Test_Set' ({len(missing)} people are missing there)."
        )
    if "forget" not in splits:
        subjects.pop("forget", None)
    if training:
        pairs = _pairs(read("ft_Data"))
        for key in ("forget", "retain"):
            subjects[key] = tuple(_taught(subject, pairs) for subject in subjects.get(key, ()))
    return Suite(name, subjects, replace(protocol, shots=SHOTS) if few_shot else protocol, source=source, notes=notes)


def _subjects(table: Table, column: str, only: set[str] | None = None) -> tuple[Subject, ...]:
    table.require("ID", column, *TASKS, what=f"{_WHAT} with the column {column!r}")
    if "images" in table.columns:
        column = "images"
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
            paraphrases=asked.texts("Paraphrased_Questions", optional=True),
            keywords=asked.texts("Keywords", optional=True),
            paraphrased_answers=asked.texts("Paraphrased_Answers", optional=True),
            perturbed_answers=asked.texts("Perturbed_Answers", optional=True),
            where=asked.where,
        )
        if kind == "cloze":
            blanked = [_BLANK.sub("[Blank]", text) for text in (question.question, *question.paraphrases)]
            question = replace(question, question=blanked[0], paraphrases=tuple(blanked[1:]))
        questions.append(question)
    return tuple(questions)
