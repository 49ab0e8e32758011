"""VLM-UnBench (arXiv 2604.03114): visual concepts, four choices by digit, scored by the digit's likelihood.

The rows are those that `vqa_gen` in zhangyun04/ULBench writes (read at commit 32516e4, MIT); pictures are the user's.
"""

from __future__ import annotations

import os
from pathlib import Path

from datasets import get_dataset_config_names

from ..records.safe_json import parse_json
from .schema import IMAGE_TEXT, Protocol, Subject, Suite, SuiteQuestion
from .sources import Record, StoredPicture, is_local, read_table


CHOICES = 4
# Which of our splits a file is; `train_retain` is for training only.
FILES = {"train_forget": "forget", "test_forget": "test", "test_retain": "retain"}
PROTOCOL = Protocol(
    prompts={"classification": "Q: {question}\n\n{options}\n\nReply with a single digit 0, 1, 2, or 3.\nAnswer:"},
    labels=tuple("0123"),
    choose="probability",
    paraphrases=False,
)
_COLUMNS = ("id", "image", "question", "choices", "answer_index", "forgetting_level", "concept_axis", "meta")
_NAMES = ("forget_concept", "class_name", "synset")


def load_vlm_unbench(
    source: str | os.PathLike, images: str | os.PathLike | None = None, *, revision: str | None = None
) -> Suite:
    """Reads explicit splits of VLM-UnBench.

    Args:
        source (`str` or `os.PathLike`): A folder with `test_forget.jsonl` and, if there are, `test_retain.jsonl` and
            `train_forget.jsonl`; or a Hub id or Parquet folder with configs of these names, whose `image` is a picture.
        images (`str` or `os.PathLike`, *optional*): Folder that the paths in `image` are relative to; by default `source`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Returns:
        [`Suite`]: The concepts of `train_forget` as "forget", of `test_forget` as "test", of `test_retain` as "retain".

    Raises:
        FileNotFoundError: If `test_forget` or a picture is missing.
        ValueError: If a row is not as it should be; the message names file and row.
    """
    path = Path(source)
    stored = () if is_local(source) else get_dataset_config_names(str(source), revision=revision)
    subjects: dict[str, tuple[Subject, ...]] = {}
    for part, split in FILES.items():
        file = path / f"{part}.jsonl"
        if file.is_file():
            subjects[split] = _subjects(_lines(file), part, Path(images if images is not None else path))
        elif part in stored or (path / part).is_dir() or (path / f"{part}.parquet").is_file():
            table = read_table(source, part, revision=revision)
            table.require(*_COLUMNS, what="VLM-UnBench")
            rows = [(row, table.pictures(number, "image")) for number, row in table]
            subjects[split] = _subjects(rows, part, None if images is None else Path(images))
        elif part == "test_forget":
            raise FileNotFoundError(
                f"expected {file}, or {part!r} as a config or a folder of Parquet files, in {str(source)!r}."
            )
    return Suite("vlm_unbench", subjects, PROTOCOL, source=str(source))


def _lines(file: Path) -> list[tuple[Record, tuple]]:
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            rows.append((Record(parse_json(line, where=where), where), ()))
    if not rows:
        raise ValueError(f"{file} holds no row; expected one question a line.")
    return rows


def _subjects(
    rows: list[tuple[Record, tuple[StoredPicture, ...]]], part: str, images: Path | None
) -> tuple[Subject, ...]:
    found: dict[str, dict] = {}
    for row, stored in rows:
        if row.text("target_split", "all") not in ("all", part):
            row.fail(f"is of the split {row.text('target_split')!r}; expected {part!r} or 'all' here")
        meta = row.record("meta")
        name = next((meta.text(key) for key in _NAMES if key in meta), None)
        if name is None:
            meta.fail(f"names no concept; expected one of {list(_NAMES)}")
        subject = found.setdefault(name, {"images": [], "questions": [], "where": row.where})
        picture = stored[0] if stored else _picture(row, images)
        subject["questions"].append(_question(row, len(subject["images"])))
        subject["images"].append(picture)
    return tuple(
        Subject(name, tuple(parts["questions"]), images=tuple(parts["images"]), where=parts["where"])
        for name, parts in found.items()
    )


def _picture(row: Record, images: Path | None) -> Path:
    if images is None:
        row.fail("has the path of a picture; pass the folder that it is relative to as `images`")
    path = images / row.text("image")
    if not path.is_file():
        raise FileNotFoundError(
            f"{row.where} names the picture {row.text('image')!r}, and there is no file {str(path)!r}; pass its folder as "
            "`images`."
        )
    return path


def _question(row: Record, image: int) -> SuiteQuestion:
    choices, number = row.texts("choices"), row.index("answer_index")
    if len(choices) != CHOICES or number >= CHOICES:
        row.fail(f"has {len(choices)} choices and the answer {number}; expected {CHOICES}, counted from 0")
    return SuiteQuestion(
        row.text("question"),
        choices[number],
        "classification",
        IMAGE_TEXT,
        task=row.text("concept_axis"),
        options=choices,
        image=image,
        where=row.where,
    )
