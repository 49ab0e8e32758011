"""Rows of a suite from the Hub, from Parquet or JSON files, or from a folder, each row knowing where it stands."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import datasets
import pyarrow.compute as pc
from datasets import Dataset, load_dataset
from PIL import Image

from ..data.pictures import open_picture


_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}


class Record:
    """A part of a row: reads its values, and says what was expected where one is missing.

    Args:
        content (`dict`): The values. What is None counts as missing: Arrow fills up structs with it.
        where (`str`): File, row and path in it.
    """

    def __init__(self, content, where: str):
        self.where = where
        if not isinstance(content, Mapping):
            self.fail(f"is {_kind(content)}; expected an object with named values")
        self.content = {key: value for key, value in content.items() if value is not None}

    def fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.where} {problem}.")

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def get(self, key: str):
        """A value that must be there."""
        if key not in self.content:
            self.fail(f"has no {key!r}; it has {sorted(self.content)}")
        return self.content[key]

    def text(self, key: str, default: str | None = None) -> str:
        """A text that is not blank; `default` if it is missing and one is given."""
        if default is not None and key not in self.content:
            return default
        value = self.get(key)
        if not isinstance(value, str) or not value.strip():
            self.fail(f"has {_kind(value)} as {key!r}; expected a text that is not blank")
        return value

    def texts(self, key: str, *, optional: bool = False) -> tuple[str, ...]:
        """Texts in a list; one alone will do."""
        if optional and key not in self.content:
            return ()
        value = self.get(key)
        value = [value] if isinstance(value, str) else value
        if isinstance(value, Mapping) or not isinstance(value, Sequence):
            self.fail(f"has {_kind(value)} as {key!r}; expected a list of texts")
        for number, text in enumerate(value):
            if not isinstance(text, str) or not text.strip():
                self.fail(f"has {_kind(text)} as {key!r}[{number}]; expected a text that is not blank")
        return tuple(value)

    def index(self, key: str) -> int:
        """A number from 0."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.fail(f"has {_kind(value)} as {key!r}; expected a whole number from 0")
        return value

    def record(self, key: str) -> Record:
        """An object within this one."""
        return Record(self.get(key), f"{self.where}, {key}")

    def records(self, key: str, *, optional: bool = False) -> list[Record]:
        """Objects in a list."""
        if optional and key not in self.content:
            return []
        value = self.get(key)
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            self.fail(f"has {_kind(value)} as {key!r}; expected a list of objects")
        return [Record(part, f"{self.where}, {key}[{number}]") for number, part in enumerate(value)]


def _kind(value) -> str:
    return f"the {type(value).__name__} {value!r:.60}"


@dataclass(frozen=True)
class StoredPicture:
    """A picture in a dataset, read when it is shown: a suite of thousands of them needs no memory for them.

    Args:
        rows (`datasets.Dataset`): With pictures that are not decoded.
        row (`int`): Which row.
        column (`str`): Which column.
        place (`int`, *optional*): Which of several in it.
    """

    rows: Dataset
    row: int
    column: str
    place: int | None = None

    def open(self) -> Image.Image:
        """Reads it.

        Raises:
            ValueError: If it does not open.
        """
        value = self.rows[self.row][self.column]
        return open_picture(value if self.place is None else value[self.place])


@dataclass(frozen=True)
class ZippedPicture:
    """A picture in a ZIP archive, read when it is shown.

    Args:
        archive (`pathlib.Path`): The archive.
        name (`str`): Of its member.
    """

    archive: Path
    name: str

    def open(self) -> Image.Image:
        """Reads it.

        Raises:
            ValueError: If it does not open.
        """
        with zipfile.ZipFile(self.archive) as archive:
            return open_picture(archive.read(self.name))


class Table:
    """A dataset read as records.

    Args:
        rows (`datasets.Dataset`): The rows.
        label (`str`): File, folder or Hub id, for errors.
    """

    def __init__(self, rows: Dataset, label: str):
        self.label = label
        self.images = [name for name, kind in rows.features.items() if _holds_pictures(kind)]
        for name in self.images:
            rows = _undecoded(rows, name)
        self._pictures = {name: rows.select_columns(name) for name in self.images}
        self._texts = rows.remove_columns(self.images)
        self.columns = rows.column_names
        if len(rows) == 0:
            raise ValueError(f"{label} has no rows; expected at least one.")

    def require(self, *columns: str, what: str) -> None:
        """Refuses rows without a column.

        Raises:
            ValueError: If one of the columns is missing.
        """
        if missing := [name for name in columns if name not in self.columns]:
            raise ValueError(
                f"{self.label} has no column {missing[0]!r}; it has {self.columns}. {what} has the columns {list(columns)}."
            )

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        for number, row in enumerate(self._texts if self._texts.column_names else [{}] * self._texts.num_rows):
            yield number, Record(row, self.where(number))

    def where(self, number: int) -> str:
        return f"{self.label}, row {number}"

    def pictures(self, row: int, column: str) -> tuple[StoredPicture, ...]:
        """The pictures that a row has in a column: none where it is None, all of a list."""
        if column not in self._pictures:
            return ()
        rows = self._pictures[column]
        # Asks Arrow; reading the row would read every byte of its pictures.
        cell = rows.data.column(column).slice(row, 1)
        if not cell.is_valid()[0].as_py():
            return ()
        if str(cell.type).startswith(("list", "large_list", "fixed_size_list")):
            count = pc.list_value_length(cell)[0].as_py()
            return tuple(StoredPicture(rows, row, column, place) for place in range(count))
        return (StoredPicture(rows, row, column),)


def _holds_pictures(kind) -> bool:
    if isinstance(kind, datasets.Image):
        return True
    if isinstance(kind, (datasets.List, datasets.LargeList)):
        return _holds_pictures(kind.feature)
    # Files without the metadata of `datasets` have the same struct, by another name.
    return isinstance(kind, dict) and set(kind) == {"bytes", "path"}


def _undecoded(rows: Dataset, name: str) -> Dataset:
    kind = rows.features[name]
    if not getattr(getattr(kind, "feature", kind), "decode", True):
        return rows
    if isinstance(kind, datasets.Image):
        return rows.cast_column(name, datasets.Image(decode=False))
    if isinstance(kind, (datasets.List, datasets.LargeList)) and isinstance(kind.feature, datasets.Image):
        return rows.cast_column(name, type(kind)(datasets.Image(decode=False)))
    return rows


def read_table(
    source: str | os.PathLike, config: str | None = None, *, revision: str | None = None, file: str | None = None
) -> Table:
    """Reads rows through `datasets.load_dataset`.

    Args:
        source (`str` or `os.PathLike`): A Parquet, JSON or JSON lines file; a folder: a clone of a dataset, or one with a
            folder or a file for each config; or a dataset on the Hub.
        config (`str`, *optional*): Which part of it; a file has one only.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        file (`str`, *optional*): A file of a folder or of a dataset on the Hub, where that has no configs.

    Raises:
        FileNotFoundError: If a file or folder, or a config in a folder, is not there.
        ValueError: If the file is of no kind that is read here, or there are no rows.
    """
    path = Path(source)
    if path.is_file():
        return Table(_from_files([path]), str(path))
    if path.is_dir():
        files = _in_folder(path, config, file)
        return Table(_from_files(files), str(files[0] if len(files) == 1 else files[0].parent))
    if path.suffix in _KINDS or path.is_absolute() or str(source).startswith("."):
        raise FileNotFoundError(f"there is no file or folder {str(source)!r}.")
    if file is not None:
        # Of a repository without configs `datasets` would read all files as one table.
        rows = load_dataset(str(source), data_files=file, split="train", revision=revision)
    else:
        rows = load_dataset(str(source), config, split="train", revision=revision)
    part = config or file
    return Table(rows, f"{source} ({part})" if part else str(source))


def is_local(source: str | os.PathLike) -> bool:
    """Whether a source is a file or a folder that exists."""
    return Path(source).exists()


def _in_folder(folder: Path, config: str | None, file: str | None) -> list[Path]:
    if file is not None:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"there is no file {file!r} in {str(folder)!r}; it has {_listed(folder)}.")
        return [folder / file]
    if config is None:
        files = [path for path in sorted(folder.iterdir()) if path.suffix == ".parquet"]
        files = files or sorted((folder / "data").glob("*.parquet"))
    elif (folder / config).is_dir():
        files = sorted((folder / config).rglob("*.parquet"))
    else:
        files = [path for path in (folder / f"{config}{suffix}" for suffix in _KINDS) if path.is_file()][:1]
    if not files:
        wanted = f"the folder {config!r} with Parquet files, or {config}.parquet" if config else "Parquet files"
        raise FileNotFoundError(f"expected {wanted} in {str(folder)!r}; it has {_listed(folder)}.")
    return files


def _listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())[:12]


def _from_files(files: Sequence[Path]) -> Dataset:
    kind = _KINDS.get(files[0].suffix)
    if kind is None:
        raise ValueError(f"{str(files[0])!r} is not a file that can be read here; expected one of {sorted(_KINDS)}.")
    try:
        return load_dataset(kind, data_files=[str(path) for path in files], split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{files[0]} cannot be read as {kind}: {error.__cause__ or error}.") from error
