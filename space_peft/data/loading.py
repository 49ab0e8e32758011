"""Rows and pictures from wherever a user has them: the one way for pools, retained rows and pictures to test with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from PIL import Image

from ..records.places import DATA_FILES, EXPECTED_DATA, data_file_kind, dataset_on_hub, refuse_missing


# Columns whose texts are the paths of pictures.
PICTURE_COLUMNS = ("image", "images")
# What `imagefolder` reads beside the pictures, by its name without the suffix.
_METADATA = "metadata"
_SAVED = ("state.json", "dataset_dict.json")


def load_rows(place: str) -> Dataset:
    """Rows of a folder, a file or the Hub, with pictures where there are paths of some.

    Args:
        place (`str`): One of these:

            - a folder that `Dataset.save_to_disk` wrote; of several splits "train";
            - a folder of pictures, maybe with a `metadata.jsonl` or `metadata.csv` whose `file_name` says of which picture a
              line is. Without it the names of folders in it are the column `label`;
            - a Parquet, JSON, JSON lines or CSV file, or a folder of files of one such kind, all of which are read. Texts in
              the columns `image` and `images` are paths, relative to the file (or to the current folder);
            - a dataset on the Hub; the split "train" unless another is named as in "org/name:validation". Of a dataset with
              several configurations, "org/name/configuration".

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If it is none of these, cannot be read, or a picture is not there; the message says what was found.
    """
    path = Path(place)
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        return _with_pictures(_read(path, data_file_kind(place), data_files=str(path)), path.parent)
    name, _, split = place.partition(":")
    repository, configuration = dataset_on_hub(name)
    refuse_missing(repository)
    return load_dataset(repository, configuration, split=split or "train")


def _from_folder(folder: Path) -> Dataset:
    if any((folder / name).is_file() for name in _SAVED):
        saved = load_from_disk(folder)
        if isinstance(saved, DatasetDict) and "train" not in saved:
            raise ValueError(
                f"the folder {str(folder)!r} holds the splits {list(saved)}, and no 'train'; give the folder of one of them, "
                f"such as {str(folder / next(iter(saved), 'test'))!r}."
            )
        return saved["train"] if isinstance(saved, DatasetDict) else saved
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    pictures = [path for path in files if path.suffix.lower() in Image.registered_extensions()]
    tables = [path for path in files if path.suffix.lower() in DATA_FILES]
    if pictures:
        if others := [path for path in tables if path.stem != _METADATA]:
            raise ValueError(
                f"the folder {str(folder)!r} holds {len(pictures)} pictures, and {others[0].relative_to(folder)}, which would "
                "not be read. Give that file itself (its columns `image` or `images` may be paths of pictures), call it "
                f"{_METADATA}{others[0].suffix} (with a column `file_name`), or take it out."
            )
        # All files: by itself it takes "test_1.png" for a picture of another split.
        return _read(folder, "imagefolder", data_dir=str(folder), data_files={"train": "**"})
    kinds = {path.suffix.lower() for path in tables}
    if len({DATA_FILES[kind] for kind in kinds}) != 1:
        found = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in _suffixes(files).items())
        raise ValueError(
            f"the folder {str(folder)!r} holds no picture, and no data files of one kind (found: {found or 'nothing'}); "
            f"expected {EXPECTED_DATA}."
        )
    rows = _read(folder, DATA_FILES[kinds.pop()], data_files=[str(path) for path in tables])
    return _with_pictures(rows, folder)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _suffixes(files: Sequence[Path]) -> dict[str, int]:
    return dict(Counter(path.suffix.lower() for path in files).most_common(5))


def _read(place: Path, kind: str, **options: Any) -> Dataset:
    try:
        return load_dataset(kind, split="train", **options)
    except (DatasetsError, ValueError, StopIteration) as error:
        # Of an empty file each kind, and each version, says something else.
        empty = not any(path.stat().st_size for path in [place, *place.rglob("*")] if path.is_file())
        why = "it is empty" if empty else error.__cause__ or error
        raise ValueError(f"{str(place)!r} cannot be read as {kind}: {why}.") from error


def _with_pictures(rows: Dataset, folder: Path) -> Dataset:
    """The same rows with images where the columns for them hold paths, or files as `datasets` stores them."""
    for column in PICTURE_COLUMNS:
        feature = rows.features.get(column)
        several = hasattr(feature, "feature")
        inner = feature.feature if several else feature
        if isinstance(inner, Value) and inner.dtype in ("string", "large_string"):
            given = list(rows[column])
            # Not by `map`, whose result is kept: a picture may have been moved since.
            found = [_found(value, folder, row) for row, value in enumerate(given)]
            rows = rows.remove_columns(column).add_column(column, found)
        elif not _holds_files(inner):
            continue
        rows = rows.cast_column(column, datasets.List(datasets.Image()) if several else datasets.Image())
    return rows


def _holds_files(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")


def _found(value: Any, folder: Path, row: int) -> Any:
    """Where the pictures of a row are."""
    if isinstance(value, list):
        return [_found(part, folder, row) for part in value]
    if not value:
        return None  # An empty cell of a CSV file, too.
    if "://" in value or value.startswith("data:"):
        raise ValueError(
            f"row {row}: the picture is the URL {value[:80]!r}, and nothing is downloaded here; save it first."
        )
    for path in (folder / value, Path(value)):
        if path.is_file():
            return str(path)
    raise ValueError(
        f"row {row}: there is no picture {value[:200]!r} in {str(folder)!r}; expected a path relative to the file, or an "
        "absolute one."
    )
