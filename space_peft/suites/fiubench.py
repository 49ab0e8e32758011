"""FIUBench (Ma et al., ICLR 2025): 400 fictitious faces with private facts.

Fields and rules are those of the dataset `gray311/FIUBench` and of SaFoLab-WISC/FIUBench (read at commit 8e12cdd); none of its
code is used. Where ours differs is in docs/suites.md.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..records.safe_json import parse_json
from .schema import IMAGE_TEXT, Protocol, Subject, Suite, SuiteQuestion, check_choice
from .sources import Record, ZippedPicture, is_local, read_table


HUB_ID = "gray311/FIUBench"
SHARES = ("forget1", "forget5", "forget10")
# As the official evaluation: the first rows only.
ROWS = 400
RETAINED = ("retain5", "retain15", "retain")
PROTOCOL = Protocol(prompts={}, paraphrases=True)
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_REMEDY = "Expected the file of FIUBench."


def load_fiubench(
    source: str | os.PathLike = HUB_ID,
    split: str = "forget5",
    *,
    retain: str = "retain5",
    images: str | os.PathLike | None = None,
    revision: str | None = None,
) -> Suite:
    """Reads FIUBench.

    Args:
        source (`str` or `os.PathLike`, defaults to the dataset on the Hub): Hub id, or a folder with `full.json`,
            `split.json` and the pictures, in folders or in ZIP archives.
        split (`str`, defaults to `"forget5"`): Which people are forgotten: `"forget1"`, `"forget5"` or `"forget10"`.
        retain (`str`, defaults to `"retain5"`): Which are kept: `"retain5"` or `"retain15"`, or `"retain"` for all that are in
            none of the forget splits.
        images (`str` or `os.PathLike`, *optional*): Folder of the pictures, if they are elsewhere.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Returns:
        [`Suite`]: With the splits "forget" and "retain".

    Raises:
        FileNotFoundError: If a file or a picture is missing.
        ValueError: If a row is not as it should be; the message names file and row.
    """
    check_choice(split, SHARES, "`split`")
    check_choice(retain, RETAINED, "`retain`")
    files = _local(Path(source)) if is_local(source) else _on_hub(str(source), revision)
    if "split.json" not in files:
        raise FileNotFoundError(f"expected 'split.json' in {str(source)!r}; it has {list(files)[:12]}.")
    ids = _splits(files["split.json"])
    rows = _rows(source, revision, files, _finder(files if images is None else _local(Path(images))))
    named = {row.text("unique_id"): (row, pictures) for row, pictures in rows}
    if missing := [part for part in (split, retain) if part != "retain" and part not in ids]:
        raise ValueError(f"{files['split.json']} has no {missing[0]!r}; it has {list(ids)}.")
    forgotten = {id for share in SHARES for id in ids.get(share, ())}
    wanted = {
        "forget": ids[split],
        "retain": [id for id in named if id not in forgotten] if retain == "retain" else ids[retain],
    }
    for part, members in wanted.items():
        if missing := [id for id in members if id not in named]:
            raise ValueError(
                f"{files['split.json']} has {missing[0]!r} in {part!r}, which is not among the first {ROWS} rows of full.json "
                f"({len(missing)} are missing)."
            )
    subjects = {part: tuple(_subject(*named[id]) for id in members) for part, members in wanted.items()}
    return Suite("fiubench", subjects, PROTOCOL, source=f"{source} ({split}, {retain})")


def _local(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder with full.json, split.json and pictures, got {str(folder)!r}.")
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _on_hub(repo: str, revision: str | None) -> dict[str, Path]:
    from huggingface_hub import snapshot_download

    # It has no configs: rows, splits and pictures are files of their own kinds, which `load_dataset` would read as one table.
    kinds = ["full.json", "split.json", "*.zip", *(f"*{suffix}" for suffix in _PICTURES)]
    return _local(Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=kinds)))


def _splits(path: Path) -> dict[str, Sequence[str]]:
    content = Record(parse_json(path.read_bytes(), where=str(path), remedy=_REMEDY), str(path))
    return {name: content.texts(name) for name in (*SHARES, *RETAINED) if name in content}


def _finder(files: dict[str, Path]) -> Callable[[Record], Any]:
    """What finds the picture of a row: by its path, or by its name alone where that is one file's."""
    places: dict[str, list] = {}
    for name, path in files.items():
        if path.suffix.lower() == ".zip" or name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                inside: list[tuple[str, ZippedPicture | Path]] = [
                    (member, ZippedPicture(path, member)) for member in archive.namelist()
                ]
        else:
            inside = [(name, path)]
        for place, picture in inside:
            if place.lower().endswith(_PICTURES):
                places.setdefault(PurePosixPath(place).name, []).append((place, picture))

    def find(row: Record):
        wanted = PurePosixPath(row.text("image_path"))
        found = places.get(wanted.name, [])
        exact = [picture for place, picture in found if str(wanted).endswith(place) or place.endswith(str(wanted))]
        found = exact or [picture for _, picture in found]
        if not found:
            raise FileNotFoundError(
                f"{row.where} names the picture {str(wanted)!r}, and there is no such file; pass the folder of the pictures "
                "as `images`."
            )
        if len(found) > 1:
            row.fail(f"names the picture {str(wanted)!r}, of which there are {len(found)}; keep one of them")
        return found[0]

    return find


def _rows(
    source, revision: str | None, files: dict[str, Path], find: Callable[[Record], Any]
) -> list[tuple[Record, tuple]]:
    if "full.json" in files:
        path = files["full.json"]
        # About a hundred values a person, commas of texts among them.
        raw = parse_json(path.read_bytes(), where=str(path), expected=list, remedy=_REMEDY, max_values=20_000_000)
        records = [Record(row, f"{path}, row {number}") for number, row in enumerate(raw[:ROWS])]
        return [(row, (find(row),)) for row in records]
    table = read_table(source, revision=revision)
    table.require("unique_id", "image", "qa_list", what="FIUBench in Parquet")
    return [(row, table.pictures(number, "image")) for number, row in table][:ROWS]


def _subject(row: Record, pictures: tuple) -> Subject:
    id = row.text("unique_id")
    questions = []
    for asked in row.records("qa_list"):
        questions.append(
            SuiteQuestion(
                asked.text("question"),
                asked.text("answer"),
                "generation",
                IMAGE_TEXT,
                paraphrases=asked.texts("paraphrased_question", optional=True),
                paraphrased_answers=asked.texts("paraphrased_answer", optional=True),
                perturbed_answers=asked.texts("perturbed_answer", optional=True),
                keywords=asked.texts("keywords", optional=True),
                where=asked.where,
            )
        )
    return Subject(row.text("name", id), tuple(questions), id, images=pictures, where=row.where)
