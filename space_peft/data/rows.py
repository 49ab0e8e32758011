"""Rows as users give them: which kinds of datasets are taken, and what of a row would be left unread."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import datasets
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.utils.data import default_collate

from .pictures import refers_to_media


_MEDIA = tuple(
    getattr(datasets, name) for name in ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh", "Array2D", "Array3D", "Array4D", "Array5D")
    if hasattr(datasets, name)
)  # fmt: skip
# What makes batches of retained rows; for errors.
COLLATOR = (
    "`DataLoader(rows, batch_size=8, collate_fn=lambda rows: encode_conversations(processor, rows))`, with "
    "`from space_peft.modeling.prompts import encode_conversations`"
)
_JSON = getattr(datasets, "Json", None)  # not in older versions


def check_kind(rows: Any, what: str) -> None:
    """Refuses what cannot be read by number, as often as needed.

    Args:
        rows (`datasets.Dataset`, `list` or `torch.utils.data.Dataset`): As given.
        what (`str`): What the rows were passed as, for errors.

    Raises:
        TypeError: If it is something else: a dictionary of splits, an iterable dataset, a generator, a path.
    """
    if isinstance(rows, (DatasetDict, IterableDatasetDict)):
        split = next(iter(rows), "train")
        raise TypeError(
            f"got a {type(rows).__name__} as {what}; pass one of its splits, e.g. `{what.split()[-1]}[{split!r}]`."
        )
    if isinstance(rows, (IterableDataset, torch.utils.data.IterableDataset)):
        raise TypeError(
            f"got an {type(rows).__name__} as {what}; its rows are read by number and more than once, which needs random "
            "access. Store a part of it: `Dataset.from_list(list(rows.take(10_000)), features=rows.features)`."
        )
    sized = isinstance(rows, (Dataset, torch.utils.data.Dataset)) and hasattr(rows, "__len__")
    if not sized and (isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Sequence)):
        raise TypeError(
            f"got {'the text ' + repr(rows[:80]) if isinstance(rows, str) else 'a ' + type(rows).__name__} as {what}; "
            "expected a `datasets.Dataset` (`load_dataset`, `Dataset.from_dict`, `Dataset.from_pandas`) or a list of dicts."
        )


def check_rows(rows: Any, what: str) -> Any:
    """Returns rows that pass `check_kind` and give Python objects and PIL images.

    A format of a dataset ("torch", "numpy", "pandas", ...) is taken off, because it makes arrays of images; transforms and
    a choice of columns stay.

    Args:
        rows (`datasets.Dataset`, `list` or `torch.utils.data.Dataset`): As given.
        what (`str`): What the rows were passed as, for errors.

    Raises:
        TypeError: See `check_kind`.
    """
    check_kind(rows, what)
    if isinstance(rows, Dataset) and rows.format["type"] not in (None, "custom"):
        shown = rows.format["columns"]
        rows = rows.with_format(None)
        rows = rows if set(shown) == set(rows.column_names) else rows.select_columns(shown)
    return rows


def check_loader(dataloader: Iterable[Mapping]) -> None:
    """Refuses datasets where batches are expected, and loaders that make no batches of them.

    Raises:
        TypeError: If it gives rows or names of splits instead of batches, or torch's own collator is to put rows together
            that no processor has encoded.
    """
    if isinstance(dataloader, (str, bytes, Mapping, Dataset, IterableDataset)):
        raise TypeError(
            f"got a {type(dataloader).__name__} where batches of retained rows are expected; put its rows into a loader: "
            "`DataLoader(rows, batch_size=8, collate_fn=collator)`"
            + (", one split of them." if isinstance(dataloader, Mapping) else ".")
        )
    if getattr(dataloader, "collate_fn", None) is default_collate:
        rows: Any = getattr(dataloader, "dataset", None)
        sized = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
        row = rows[0] if sized and len(rows) else {"input_ids": None}
        if not isinstance(row, Mapping) or not {"input_ids", "inputs_embeds"} & set(row):
            got = (
                f"with the keys {sorted(map(str, row))}"
                if isinstance(row, Mapping)
                else f"of type {type(row).__name__}"
            )
            raise TypeError(
                f"the loader has no `collate_fn`, and its rows ({got}) were encoded by no processor, so it cannot make "
                f"batches of them. Pass one: {COLLATOR}."
            )


def check_batch(batch: Any, number: int) -> None:
    """Refuses what is no batch of token ids `(rows, length)`: a row that no collator has seen, lists.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch is a {type(batch).__name__}; expected a dict of tensors.")
    ids = batch.get("input_ids")
    if ids is not None and not (isinstance(ids, torch.Tensor) and ids.ndim == 2):
        got = f"of shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else f"a {type(ids).__name__}"
        raise TypeError(
            f"`input_ids` of batch {number} is {got}; expected a tensor (rows, length). Put the rows into a loader: "
            "`DataLoader(rows, batch_size=8, collate_fn=collator)`."
        )


def check_all_read(dataloader: Iterable[Mapping], batches: int, expected: int | None) -> None:
    """Refuses a loader that ended early: a `StopIteration` within a row's transform or a collator ends it in silence.

    Args:
        dataloader (iterable): What was read to its end.
        batches (`int`): That it gave.
        expected (`int`, *optional*): As many as it says it has.

    Raises:
        RuntimeError: If there were fewer.
    """
    estimated = isinstance(getattr(dataloader, "dataset", None), torch.utils.data.IterableDataset)
    if expected is not None and 0 < batches < expected and not estimated:
        raise RuntimeError(
            f"the loader of retained rows ended after {batches} of {expected} batches; look for a StopIteration (a `next` "
            "without a default) in its dataset, transform or collator."
        )


def unread_media(features: Mapping[str, Any], read: Collection[str]) -> str | None:
    """The first column of a dataset that holds pictures, sounds, films, arrays or bytes, and is not read."""
    return next((name for name, feature in features.items() if name not in read and _holds_media(feature)), None)


def _holds_media(feature: Any, depth: int = 0) -> bool:
    if isinstance(feature, _MEDIA):
        return True
    if isinstance(feature, Mapping):
        return any(_holds_media(part) for part in feature.values())
    if isinstance(feature, (list, tuple)):
        return any(_holds_media(part, depth + 1) for part in feature)
    if hasattr(feature, "feature"):  # List, LargeList, Sequence
        return _holds_media(feature.feature, depth + 1)
    return getattr(feature, "dtype", None) in ("binary", "large_binary", "binary_view") or depth >= 3


def holds_text(feature: Any) -> bool:
    """Whether a column of a dataset holds strings, maybe in lists."""
    return _holds(feature, lambda part: getattr(part, "dtype", None) in ("string", "large_string", "string_view"))


def holds_json(feature: Any) -> bool:
    """Whether a column of a dataset holds values of any kind, which are stored as JSON."""
    return _JSON is not None and _holds(feature, lambda part: isinstance(part, _JSON))


def _holds(feature: Any, wanted: Callable[[Any], bool]) -> bool:
    if isinstance(feature, Mapping):
        return any(_holds(part, wanted) for part in feature.values())
    if isinstance(feature, (list, tuple)):
        return any(_holds(part, wanted) for part in feature)
    return wanted(feature) or hasattr(feature, "feature") and _holds(feature.feature, wanted)


def unread_media_of(row: Mapping[str, Any], read: Collection[str], *, addresses: bool) -> str | None:
    """The same for one row, whose values are looked at.

    Args:
        row (`dict`): The row.
        read (`list[str]`): Columns that are read.
        addresses (`bool`): Whether texts count that are the path or URL of a picture, film or sound.
    """
    for name, value in row.items():
        if name not in read and _is_media(value, addresses):
            return name
    return None


def _is_media(value: Any, addresses: bool, depth: int = 0) -> bool:
    if value is None or isinstance(value, (bool, int, float)):
        return depth >= 3  # numbers in three or more dimensions: pixels
    if isinstance(value, str):
        return addresses and refers_to_media(value)
    if isinstance(value, Mapping):
        return any(_is_media(part, addresses) for part in value.values())
    if isinstance(value, (list, tuple)):
        return any(
            _is_media(part, addresses, depth + 1) for part in value if depth >= 2 or not isinstance(part, (int, float))
        )
    if hasattr(value, "ndim"):
        return value.ndim >= 2 or depth + value.ndim >= 3
    return isinstance(value, (bytes, bytearray)) or type(value).__module__.split(".")[0] not in _PLAIN_MODULES


# Of dates, numbers, paths. Anything else is an object that a decoder made: an image, a sound, a film.
_PLAIN_MODULES = ("builtins", "datetime", "decimal", "uuid", "pathlib", "numpy", "pandas", "enum")
