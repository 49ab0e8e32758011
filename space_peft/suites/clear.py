"""CLEAR (Dontsov et al., ACL 2025 Findings): fictitious authors of TOFU with faces, captions and names.

Columns and rules are those of the dataset `therem/CLEAR` and of `mm/` in somvy/multimodal_unlearning (read at commit bb14c96);
none of its code is used. Its known faults, and what is done instead, are in docs/suites.md.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

from ..evaluation.metrics import normalize_answer
from .metrics import says
from .schema import IMAGE_TEXT, TEXT_ONLY, Protocol, Subject, Suite, SuiteQuestion
from .sources import Record, Table, read_table


HUB_ID = "therem/CLEAR"
SHARES = ("01", "05", "10")
REAL = ("real_faces", "real_world")
CAPTION_PROMPTS = (
    "What can you see in this picture?",
    "Tell me about the content of this image",
    "Can you give a description of the image?",
    "What is depicted in the image?",
    "Explain what you observe in the picture.",
    "Describe the image in detail.",
    "What is the main subject of this image?",
    "Can you describe the scene or objects in the image?",
    "What is happening in this image?",
)
NAME_PROMPT = "The name of the person on the image is"
# Questions are put as they are.
PROTOCOL = Protocol(prompts={}, max_new_tokens=300, paraphrases=False)
_PERTURBED = ("image", "caption", "name", "perturbed_captions", "paraphrased_caption", "perturbed_names")


def load_clear(
    source: str | os.PathLike = HUB_ID,
    split: str = "forget05",
    *,
    revision: str | None = None,
    splits: Sequence[str] = ("forget", "retain", "real"),
    text: bool = True,
    seed: int = 0,
) -> Suite:
    """Reads CLEAR.

    Args:
        source (`str` or `os.PathLike`, defaults to the dataset on the Hub): Hub id, or a folder with a folder of Parquet
            files (or one file) for each config.
        split (`str`, defaults to `"forget05"`): Which people are forgotten: `"forget01"`, `"forget05"` or `"forget10"`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        splits (`list[str]`, *optional*): Which of `"forget"`, `"retain"` and `"real"` are read. There is no "test".
        text (`bool`, defaults to `True`): With the questions in words about the forgotten people (`forget05+tofu`).
        seed (`int`, defaults to 0): Of which of nine prompts asks for each caption.

    Returns:
        [`Suite`]

    Raises:
        FileNotFoundError: If a folder lacks one of the configs.
        ValueError: If a column is missing or a row is not as it should be; the message names file and row.
    """
    if split.removeprefix("forget") not in SHARES or not split.startswith("forget"):
        raise ValueError(f"`split` must be one of {[f'forget{n}' for n in SHARES]}, got {split!r}.")
    if unknown := [name for name in splits if name not in ("forget", "retain", "real")]:
        raise ValueError(f"`splits` may hold 'forget', 'retain' and 'real', got {unknown[0]!r}.")
    subjects: dict[str, tuple[Subject, ...]] = {}
    notes: tuple[str, ...] = ()
    if "forget" in splits:
        people = _people(read_table(source, f"{split}_perturbed", revision=revision), seed)
        if text:
            notes = _add_words(people, read_table(source, f"{split}+tofu", revision=revision))
        subjects["forget"] = _built(people)
    if "retain" in splits:
        people = _people(read_table(source, "retain_perturbed", revision=revision), seed)
        subjects["retain"] = _built(people)
    if "real" in splits:
        subjects["real"] = tuple(
            _real(row, number, table.pictures(number, "image"), config)
            for config in REAL
            for table in [_real_table(source, config, revision)]
            for number, row in table
        )
    return Suite("clear", subjects, PROTOCOL, source=f"{source} ({split}, seed {seed})", notes=notes)


def _people(table: Table, seed: int) -> dict[str, dict]:
    """Pictures and questions by name: a row is one picture of a person."""
    table.require(*_PERTURBED, what="A perturbed config of CLEAR")
    people: dict[str, dict] = {}
    for number, row in table:
        name = row.text("name")
        person = people.setdefault(name, {"images": [], "questions": [], "where": row.where})
        pictures = table.pictures(number, "image")
        if not pictures:
            row.fail("has no picture in 'image'; expected one")
        place = len(person["images"])
        person["images"] += pictures
        # Of the row, not of a running generator; the same one asks for right and wrong captions.
        prompt = CAPTION_PROMPTS[random.Random(f"{seed}/{name}/{place}").randrange(len(CAPTION_PROMPTS))]
        caption = row.text("caption")
        person["questions"] += [
            SuiteQuestion(
                prompt,
                caption,
                "caption",
                IMAGE_TEXT,
                paraphrased_answers=row.texts("paraphrased_caption"),
                perturbed_answers=_wrong(row, "perturbed_captions", caption),
                image=place,
                where=row.where,
            ),
            SuiteQuestion(
                NAME_PROMPT,
                name,
                "cloze",
                IMAGE_TEXT,
                task="name",
                perturbed_answers=_wrong(row, "perturbed_names", name),
                image=place,
                where=row.where,
            ),
        ]
    return people


def _wrong(row: Record, key: str, right: str) -> tuple[str, ...]:
    """The wrong answers of a list that may hold the right one as well, which must not be counted as wrong."""
    wrong = tuple(text for text in row.texts(key) if normalize_answer(text) != normalize_answer(right))
    if not wrong:
        row.fail(f"has no wrong answer in {key!r}")
    return wrong


def _add_words(people: dict[str, dict], table: Table) -> tuple[str, ...]:
    """Questions in words, given to the person whose name they or their answers say: the rows have no name of their own."""
    table.require("caption", "question", "answer", what="A config '+tofu' of CLEAR")
    unnamed = 0
    for number, row in table:
        if table.pictures(number, "image") or "question" not in row:
            continue  # One of the pictures, which are asked about already.
        question, answer = row.text("question"), row.text("answer")
        named = [name for name in people if says(f"{question} {answer}", name)]
        if len(named) != 1:
            unnamed += 1
        owner = people.setdefault(
            named[0] if len(named) == 1 else "(questions that name no one person)",
            {"images": [], "questions": [], "where": row.where},
        )
        owner["questions"].append(
            SuiteQuestion(question, answer, "generation", TEXT_ONLY, task="words", where=row.where)
        )
    if not unnamed:
        return ()
    return (f"{unnamed} questions in words name nobody, or several people; they are kept together under one subject.",)


def _built(people: dict[str, dict]) -> tuple[Subject, ...]:
    return tuple(
        Subject(name, tuple(parts["questions"]), images=tuple(parts["images"]), where=parts["where"])
        for name, parts in people.items()
    )


def _real_table(source: str | os.PathLike, config: str, revision: str | None) -> Table:
    table = read_table(source, config, revision=revision)
    table.require("image", "question", "answer", "options", what="The config of CLEAR")
    return table


def _real(row: Record, number: int, pictures: tuple, config: str) -> Subject:
    if not pictures:
        row.fail("has no picture in 'image'; expected one")
    answer = row.text("answer")
    question = SuiteQuestion(
        row.text("question"),
        answer,
        "generation",
        IMAGE_TEXT,
        task=config.replace("_", " "),
        perturbed_answers=_wrong(row, "options", answer),
        where=row.where,
    )
    # One row is one question; several may be about one person, whom nothing names.
    return Subject(answer, (question,), f"{config} {number}", images=pictures, where=row.where)
