"""Retained data in TRL's formats, read as conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .names import mentions
from .prompts import answer_text, encode_conversations


FORMATS = (
    "`messages`, or `prompt` and `completion` (strings or lists of messages), with `images` or `image` for rows that "
    "have one"
)


# What chat templates know; many drop a message or a block of any other kind without a word.
ROLES = ("system", "user", "assistant", "tool")
BLOCKS = ("text", "image")
OTHER_NAMES = {"human": "user", "gpt": "assistant"}


def _check_message(message: dict, content: list[dict]) -> None:
    role = message["role"]
    if role not in ROLES:
        rename = f"; rename {role!r} to {OTHER_NAMES[role]!r}" if role in OTHER_NAMES else ""
        raise ValueError(f"a message has the role {role!r}; expected one of {ROLES}{rename}.")
    for block in content:
        if block.get("type") not in BLOCKS:
            raise ValueError(
                f"a message has a block of type {block.get('type')!r}; expected one of {BLOCKS}. Put pictures in the "
                "column `images`, and a block of type 'image' where each is shown."
            )


def _clean_messages(messages, n_images: int) -> list[dict]:
    """Messages with structured content; without image blocks, the row's images go before the first user text."""
    cleaned = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        # Arrow gives every block of a column the same keys and fills up with None.
        content = [{k: v for k, v in block.items() if v is not None} for block in content]
        _check_message(message, content)
        cleaned.append({"role": message["role"], "content": content})
    placed = sum(block["type"] == "image" for message in cleaned for block in message["content"])
    if n_images and not placed:
        first = next((message for message in cleaned if message["role"] == "user"), None)
        if first is None:
            raise ValueError("a retained row has images but no user turn to show them in.")
        first["content"] = [{"type": "image"}] * n_images + first["content"]
    elif placed != n_images:
        raise ValueError(f"a retained row has {n_images} images but {placed} image placeholders in its messages.")
    return cleaned


def _check_answer(completion: list[dict]) -> None:
    if not answer_text({"completion": completion}).strip():
        raise ValueError("a retained row has an empty answer, so there is nothing to keep; fill it in or drop the row.")


def to_conversation(row: dict) -> dict:
    """One row of a TRL dataset as `space_peft.prompts.conversation` makes them.

    Args:
        row (`dict`): With `messages`, or `prompt` and `completion`; `images` (list), `image`, or neither.

    Returns:
        `dict`: `prompt`, `completion` (lists of messages) and `images`.

    Raises:
        ValueError: If the row is in none of these formats, or has no assistant turn to keep.
    """
    images = row.get("images")
    if images is not None and row.get("image") is not None:
        raise ValueError("a retained row has both `images` and `image`, and one would be dropped; keep one column.")
    if images is None:
        images = [] if row.get("image") is None else [row["image"]]
    if row.get("messages") is not None:
        messages = _clean_messages(row["messages"], len(images))
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise ValueError("the last message of a retained row must be the assistant's: it is the answer to keep.")
        _check_answer(messages[-1:])
        return {"prompt": messages[:-1], "completion": messages[-1:], "images": list(images)}
    if row.get("prompt") is None or not row.get("completion"):
        raise ValueError(f"a retained row has the columns {sorted(row)}; expected {FORMATS}.")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    completion = _clean_messages(completion, 0)
    _check_answer(completion)
    return {
        "prompt": _clean_messages(prompt, len(images)),
        "completion": completion,
        "images": list(images),
    }


def load_rows(place: str) -> Dataset:
    """Retained rows for the command line.

    Args:
        place (`str`): A folder that `Dataset.save_to_disk` wrote, a JSON, JSON lines or Parquet file, or a dataset on the
            Hub; the split "train" unless another is named as in "org/name:validation".

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If it is none of these.
    """
    if Path(place).is_dir():
        loaded = load_from_disk(place)
        return loaded["train"] if isinstance(loaded, DatasetDict) else loaded
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(place).suffix)
    if kind is not None:
        return load_dataset(kind, data_files=place, split="train")
    name, _, split = place.partition(":")
    return load_dataset(name, split=split or "train")


def split_retained(rows: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """How version 0.1.0 held out rows for a certificate, to check one of it; see [`split_by_content`] for today's way.

    Args:
        rows (`int`): Number of retained rows.
        share (`float`): Of them that is held out, in [0, 1); at least one row is left.
        seed (`int`): Of the choice.

    Returns:
        `tuple[list[int], list[int]]`: Both in ascending order.
    """
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(round(share * rows), rows - 1)
    return sorted(order[count:]), sorted(order[:count])


def _undecoded(rows: Dataset | Sequence[dict]):
    """Every row; of a plain `Dataset` with its images as they are stored, so that checking decodes none."""
    if not isinstance(rows, Dataset) or rows.format["type"] is not None:
        yield from (rows[index] for index in range(len(rows)))
        return
    known = [c for c in ("messages", "prompt", "completion", "images", "image") if c in rows.column_names]
    stored = rows.select_columns(known or rows.column_names).with_format("arrow")
    for index in range(len(stored)):
        yield stored[index].to_pylist()[0]


class RetainedRows(torch.utils.data.Dataset):
    """A retained dataset whose items are conversations; images are decoded when a row is read, not before.

    Args:
        rows (`datasets.Dataset` or `list[dict]`): In one of TRL's formats; text-only rows are allowed.

    Raises:
        ValueError: If there are no rows, or any row is in no known format; the message names the row.
    """

    def __init__(self, rows: Dataset | Sequence[dict]):
        if rows is None or len(rows) == 0:
            raise ValueError(
                "the retained dataset is empty: without it nothing defines what must not change. Pass rows with "
                f"{FORMATS}."
            )
        for index, row in enumerate(_undecoded(rows)):
            try:
                to_conversation(row)
            except ValueError as error:
                raise ValueError(f"retained row {index}: {error}") from error
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return to_conversation(self.rows[int(index)])

    def has_image(self) -> list[bool]:
        """Whether each row shows an image; reads no image."""
        if not isinstance(self.rows, Dataset):
            return [bool(row.get("images")) or row.get("image") is not None for row in self.rows]
        columns = [column for column in ("images", "image") if column in self.rows.column_names]
        table = self.rows.select_columns(columns).with_format("arrow") if columns else None
        if table is None:
            return [False] * len(self.rows)
        shown = [[bool(value) for value in table[:][column].to_pylist()] for column in columns]
        return [any(row) for row in zip(*shown)]

    def count_target(self, names: Sequence[str]) -> int:
        """How many rows show an image and answer with one of `names`: those would protect what shall be forgotten.

        Text-only rows do not count: knowledge in words about the concept is to be kept.
        """
        rows = self.rows
        if isinstance(rows, Dataset):
            rows = rows.select_columns([c for c in rows.column_names if c in ("messages", "prompt", "completion")])
        count = 0
        for index, shown in enumerate(self.has_image()):
            if not shown:
                continue
            row = rows[index]
            turns = row.get("completion") or row["messages"][-1:]
            turns = [{"role": "assistant", "content": turns}] if isinstance(turns, str) else turns
            count += mentions(answer_text({"completion": _clean_messages(turns, 0)}), names)
        return count


def retained_loader(processor, retained: RetainedRows, indices: Sequence[int], batch_size: int):
    """A dataloader of encoded retained rows, for fitting and for the certificate.

    Text-only rows come first: in one batch with images, which take many tokens, they would be mostly padding.
    """
    shown = retained.has_image()
    return torch.utils.data.DataLoader(
        torch.utils.data.Subset(retained, sorted(indices, key=lambda index: (shown[index], index))),
        batch_size=batch_size,
        collate_fn=lambda rows: encode_conversations(processor, rows),
    )
