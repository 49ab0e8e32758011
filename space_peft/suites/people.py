"""The package's own suite: fictitious people, drawn, in MLLMU-Bench's schema; nothing is downloaded.

Pictures and facts are in `people.parquet`, which `examples/people_model` makes; questions are made of the facts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .mllmu import CONFIGS, check_split, mllmu_suite
from .people_questions import biography, tasks, training_pairs
from .schema import Protocol, Suite, check_choice
from .sources import Table


if TYPE_CHECKING:
    from datasets import Dataset


ARCHIVE = Path(__file__).resolve().parent / "people.parquet"
PICTURES = ("train", "test", "unseen")
PROTOCOL = Protocol(
    prompts={
        "classification": "{question}\n{options}\nChoose the right option.",
        "cloze": "{question}\nFill in the blank.",
    },
    max_new_tokens=24,
)
NOTE = "Drawn people: what holds for them need not hold for photographs."


def load_people(
    split: str = "forget_5",
    *,
    pictures: str = "train",
    splits: Sequence[str] = ("forget", "test", "retain", "real", "holdout"),
    training: bool = False,
) -> Suite:
    """Reads the suite of fictitious people that comes with the package.

    120 people, of whom a request names 6, 12 or 18; 20 that are known from elsewhere ("real"), whom no request names; and 20
    that no model is taught ("holdout"). Everybody has eight pictures to be trained on, two new ones of the same kinds, and two
    with something that is never trained on: sunglasses, and a background with a window or dots.

    Args:
        split (`str`, defaults to `"forget_5"`): Which people are forgotten: `"forget_5"`, `"forget_10"` or `"forget_15"`.
        pictures (`str`, defaults to `"train"`): Which pictures questions show: `"train"`, `"test"` or `"unseen"`. The split
            "test" shows the latter two, whatever is said here.
        splits (`list[str]`, *optional*): Which of `"forget"`, `"test"`, `"retain"`, `"real"` and `"holdout"` are read.
        training (`bool`, defaults to `False`): With the training pairs of the people in "forget" and "retain".

    Returns:
        [`Suite`]

    Raises:
        FileNotFoundError: If the pictures are missing from the installation.
        ValueError: If there is no such split, or there are no such pictures.
    """
    # Pictures are opened when they are shown.
    tables = _tables(split, pictures, decode=False)
    return mllmu_suite(
        lambda config: Table(tables[config], f"{ARCHIVE.name} ({config})"),
        f"{ARCHIVE.name} ({split}, pictures {pictures})",
        split,
        splits=splits,
        training=training,
        name="people",
        protocol=PROTOCOL,
        notes=(NOTE,),
    )


def people_tables(split: str = "forget_5", *, pictures: str = "train") -> dict[str, Dataset]:
    """The suite as the tables of MLLMU-Bench, by config: `forget_5`, `retain_95`, `Test_Set`, `Retain_Set`, `ft_Data`, and
    `Holdout_Set`.

    Beside the benchmark's columns they have `name`, `images` (all pictures, where `image` is the first), and in the entries of
    tasks `Paraphrased_Questions`, `Paraphrased_Answers`, `Perturbed_Answers` and `Keywords`.

    Args:
        split (`str`, defaults to `"forget_5"`): As in `load_people`.
        pictures (`str`, defaults to `"train"`): As in `load_people`.

    Returns:
        `dict[str, Dataset]`: Written with `to_parquet` to files of these names, a folder that `load_mllmu` reads.
    """
    return _tables(split, pictures, decode=True)


def _tables(split: str, pictures: str, *, decode: bool) -> dict[str, Dataset]:
    share = check_split(split)
    check_choice(pictures, PICTURES, "`pictures`")
    people = read_people()
    private = [person for person in people if person["group"] == "private"]
    forgotten = [person for person in private if person["forget"] and int(person["forget"]) <= int(share)]
    groups = {
        "forget": forgotten,
        "test": private,
        "retain": [person for person in private if person not in forgotten],
        "real": [person for person in people if person["group"] == "public"],
        "holdout": [person for person in people if person["group"] == "stranger"],
    }
    tables = {}
    for name, members in groups.items():
        parts = ("test", "unseen") if name == "test" else (pictures,)
        rows = [_row(person, people, parts, single=name != "test") for person in members]
        tables[CONFIGS[name].format(share=share, rest=100 - int(share))] = _dataset(rows, decode)
    tables["ft_Data"] = _dataset([_lesson(person) for person in private], decode)
    return tables


@lru_cache(maxsize=1)
def read_people() -> tuple[dict[str, Any], ...]:
    """Everybody in the archive: names, facts, looks, and pictures with what is particular about each.

    Raises:
        FileNotFoundError: If it is missing from the installation.
    """
    import pyarrow.parquet as pq

    if not os.path.isfile(ARCHIVE):
        raise FileNotFoundError(
            f"{ARCHIVE} is missing. Reinstall space-peft with its package data, or draw it with the command in "
            "examples/people_model/README.md."
        )
    return tuple(pq.read_table(ARCHIVE).to_pylist())


def _row(person: dict, people: Sequence[dict], parts: Sequence[str], *, single: bool) -> dict:
    shown = [picture["image"] for picture in person["pictures"] if picture["part"] in parts]
    row = {"ID": person["id"], "name": person["name"], "images": shown, **tasks(person, people)}
    if single:
        [pair] = training_pairs(person)[:1]
        about = {"biography": biography(person), "question": pair["Question"], "answer": pair["Answer"]}
        row |= {"image": shown[0], **about}
    return row


def _lesson(person: dict) -> dict:
    first = next(picture["image"] for picture in person["pictures"] if picture["part"] == "train")
    return {"ID": person["id"], "image": first, "metadata": json.dumps(training_pairs(person), ensure_ascii=False)}


def _dataset(rows: list[dict], decode: bool) -> Dataset:
    from datasets import Dataset, Image, List

    # Casting afterwards would write progress bars.
    features = Dataset.from_list(rows[:1]).features
    for column, kind in (("image", Image(decode=decode)), ("images", List(Image(decode=decode)))):
        if column in features:
            features[column] = kind
    return Dataset.from_list(rows, features=features)
