"""Retained data in TRL's formats, read as conversations."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Features

from ..data.names import mentions
from ..data.pictures import open_picture
from ..data.rows import check_rows, holds_json, holds_text, unread_media, unread_media_of
from ..modeling.prompts import ALIKE, answer_message, answer_text, encode_conversations, text_of


FORMATS = (
    "`messages`, or `prompt` and `completion` (strings or lists of messages), with `images` or `image` for rows that "
    "have one"
)


# Fewer retained rows hold next to nothing: as many as there are anchors of a concept, and each of those is asked about in ten ways.
FEW_ROWS = 32
# Of a token, about.
_CHARACTERS = 4
# What chat templates know; many drop a message or a block of any other kind without a word.
ROLES = ("system", "user", "assistant", "tool")
BLOCKS = ("text", "image")
OTHER_NAMES = {"human": "user", "gpt": "assistant"}
COLUMNS = ("messages", "prompt", "completion", "images", "image")
# What other formats call them: whoever has such a column has answers, which must not be passed over.
_CALLED_OTHERWISE = {
    "conversations": "messages", "conversation": "messages", "question": "prompt", "query": "prompt", "instruction": "prompt",
    "answer": "completion", "answers": "completion", "response": "completion", "output": "completion",
}  # fmt: skip
# Where a block of type "image" holds its picture itself.
_PICTURE_KEYS = ("image", "path")
# As text they would show no picture, or a second one: image tokens of processors, and what data sets write for them.
_PLACEHOLDER = re.compile(
    r"<(?:image|video|image[_ -]?\d+|image_soft_token|start_of_image)>|<\|(?:image|image_\d+|image_pad|video_pad|"
    r"vision_start)\|>|\[IMG\]",
    re.IGNORECASE,
)


def _block(block) -> dict:
    """A block without the keys that Arrow fills up with None: all blocks of a column have the same ones there."""
    if not isinstance(block, Mapping):
        raise ValueError(
            f"a message has the block {block!r:.80}; expected a dict such as {{'type': 'text', 'text': ...}}."
        )
    block = {key: value for key, value in block.items() if value is not None}
    kind = block.get("type")
    if kind not in BLOCKS:
        raise ValueError(
            f"a message has a block of type {kind!r}; expected one of {BLOCKS}. Put pictures in the column `images`, and a "
            "block of type 'image' where each is shown."
        )
    if kind == "text" and not isinstance(block.get("text"), str):
        raise ValueError(
            f"a message has a block of type 'text' with the keys {sorted(block)}; expected a string `text`."
        )
    if kind == "image" and not block.get("text"):
        block.pop("text", None)
    allowed = ("type", "text", "index") if kind == "text" else ("type", "index", *_PICTURE_KEYS)
    if other := [key for key in block if key not in allowed]:
        raise ValueError(
            f"a message has a block of type {kind!r} with {other[0]!r}, which would be dropped; expected the keys "
            f"{allowed}. Put pictures in the column `images`."
        )
    return block


def _message(number: int, message) -> dict:
    if not isinstance(message, Mapping) or message.get("role") is None or message.get("content") is None:
        got = f"the keys {sorted(message)}" if isinstance(message, Mapping) else f"{message!r:.80}"
        if isinstance(message, Mapping) and {"role", "content"} <= set(message):
            got = f"{'content' if message['content'] is None else 'role'} None"
        raise ValueError(f"message {number} has {got}; expected a dict with `role` and `content`.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        rename = f"; rename {role!r} to {OTHER_NAMES[role]!r}" if role in OTHER_NAMES else ""
        raise ValueError(f"a message has the role {role!r}; expected one of {ROLES}{rename}.")
    if other := [key for key in message if key not in ("role", "content") and message[key] not in (None, "", [], {})]:
        raise ValueError(
            f"message {number} has {other[0]!r}, which would be dropped; expected `role` and `content` alone."
        )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"message {number} has content of type {type(content).__name__}; expected a text or blocks.")
    content = [_block(block) for block in content]
    for block in content:
        if block["type"] == "text" and (found := _PLACEHOLDER.search(block["text"])):
            raise ValueError(
                f"a message says {found.group()!r} as text, which shows no picture. Take it out; put the picture in the "
                "column `images`, and a block of type 'image' where it is to stand (or none: before the first user text)."
            )
    return {"role": role, "content": content}


def _clean_messages(messages, images: list) -> tuple[list[dict], list]:
    """Messages with structured content, and the pictures that they show, in order.

    Without image blocks, the row's images go before the first user text.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"the messages are a {type(messages).__name__}; expected a list of dicts.")
    cleaned = [_message(number, message) for number, message in enumerate(messages)]
    placed = [block for message in cleaned for block in message["content"] if block["type"] == "image"]
    held = [next((block[key] for key in _PICTURE_KEYS if key in block), None) for block in placed]
    if any(picture is not None for picture in held):
        if images or any(picture is None for picture in held):
            raise ValueError(
                f"a retained row has {len(images)} images in its column, and blocks that hold some of their own: not all "
                "would be shown. Put all in the column `images`."
            )
        images = held
    elif [block.get("index", place) for place, block in enumerate(placed)] != list(range(len(placed))):
        raise ValueError(
            f"the image blocks have the `index` {[block.get('index') for block in placed]}, but are shown in the order of "
            "`images`; sort `images`, and leave `index` out."
        )
    for block in (block for message in cleaned for block in message["content"]):
        for key in ("index", *_PICTURE_KEYS):
            block.pop(key, None)
    if images and not placed:
        first = next((message for message in cleaned if message["role"] == "user"), None)
        if first is None:
            raise ValueError("a retained row has images but no user turn to show them in.")
        first["content"] = [{"type": "image"}] * len(images) + first["content"]
    elif len(placed) != len(images):
        raise ValueError(
            f"a retained row has {len(images)} images but {len(placed)} image placeholders in its messages."
        )
    return cleaned, images


def _check_answer(completion: list[dict]) -> None:
    if not answer_text({"completion": completion}).strip():
        raise ValueError("a retained row has an empty answer, so there is nothing to keep; fill it in or drop the row.")


def _refuse_missing(row: Mapping, needed: list[str], unanswered: bool) -> None:
    """Refuses a row without what it needs, or whose answer is called otherwise and would be passed over."""
    missing = [name for name in needed if row.get(name) is None]
    renamed = [f"{name!r} to {own!r}" for name, own in _CALLED_OTHERWISE.items() if row.get(name) is not None]
    if not missing and not (unanswered and renamed):
        return
    lacking = f", and no {missing[0]!r}" if missing else ""
    hint = f"; rename {', '.join(renamed)}" if renamed else ""
    if "completion" in missing and not renamed:
        hint = " (no answers? `retained_answers`, `erase` and `space-peft stats` have the model itself give them)"
    raise ValueError(f"a retained row has the columns {sorted(row)}{lacking}; expected {FORMATS}{hint}.")


def _pictures(row: Mapping) -> list:
    """What the columns `images` and `image` hold, as it is."""
    images, image = row.get("images"), row.get("image")
    if images is not None and image is not None:
        raise ValueError("a retained row has both `images` and `image`, and one would be dropped; keep one column.")
    if isinstance(image, (list, tuple)):
        raise ValueError("the column `image` holds a list; name it `images`.")
    if images is None:
        return [] if image is None else [image]
    if isinstance(images, (str, bytes, Mapping)) or not isinstance(images, Sequence):
        raise ValueError(
            f"the column `images` holds a {type(images).__name__}; expected a list, or the column `image`."
        )
    return list(images)


def to_conversation(row: dict, *, opened: Callable = open_picture, unanswered: bool = False) -> dict:
    """One row of a TRL dataset as `space_peft.modeling.prompts.conversation` makes them.

    Args:
        row (`dict`): With `messages`, or `prompt` and `completion`; `images` (list), `image`, or neither. Pictures are
            PIL images, paths or bytes of files, see `data.pictures.open_picture`. Blocks of type "image" may hold
            theirs themselves, as `image` or `path`.
        opened (`Callable`, *optional*): What makes a PIL image of each.
        unanswered (`bool`, defaults to `False`): Whether a row may do without an answer, and one with pictures without a
            question; what is not there is an empty list then.

    Returns:
        `dict`: `prompt`, `completion` (lists of messages) and `images`.

    Raises:
        TypeError: If a picture is of no type that can be opened.
        ValueError: If the row is in none of these formats, has no assistant turn to keep, or holds a picture that would
            not be shown.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"the row is a {type(row).__name__}; expected a dict with {FORMATS}.")
    images = _pictures(row)
    prompt: Any
    completion: Any
    if row.get("messages") is not None:
        messages, images = _clean_messages(row["messages"], images)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError("the last message of a retained row must be the assistant's: it is the answer to keep.")
        prompt, completion = messages[:-1], messages[-1:]
    else:
        prompt, completion = row.get("prompt"), row.get("completion")
        unanswered = unanswered and completion is None
        _refuse_missing(row, ([] if images else ["prompt"]) if unanswered else ["prompt", "completion"], unanswered)
        if isinstance(prompt, str) and (prompt or not unanswered):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if prompt:
            prompt, images = _clean_messages(prompt, images)
        elif not (unanswered and images):
            raise ValueError("a retained row has an empty prompt; fill it in or drop the row.")
        prompt, (completion, _) = prompt or [], _clean_messages(completion or [], [])
    if any(block["type"] == "image" for message in completion for block in message["content"]):
        raise ValueError("a retained row shows an image in its answer; put it in the prompt.")
    if completion or not unanswered:
        _check_answer(completion)
    if unread := unread_media_of(row, COLUMNS, addresses=not images):
        raise ValueError(
            f"the column {unread!r} holds a picture or other media, which is not read and would be dropped; rename it to "
            "`image` (or `images`, for a list), or remove the column."
        )
    return {"prompt": prompt, "completion": completion, "images": [opened(image) for image in images]}


def read_row(rows, index: int, what: str, **options) -> dict:
    """`to_conversation` of one of many rows; errors name the row.

    Args:
        rows (`datasets.Dataset` or `list[dict]`): The rows.
        index (`int`): Which one.
        what (`str`): What a row is called in errors, e.g. "retained row".
        options: See `to_conversation`.

    Raises:
        ValueError: If the row cannot be used.
        RuntimeError: If reading it ended in a `StopIteration`, which would end an epoch in silence.
    """
    try:
        return to_conversation(rows[index], **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} {index}: {error}") from error
    except StopIteration as error:
        raise RuntimeError(f"{what} {index}: reading it raised StopIteration, e.g. in a transform.") from error


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


class _Stored(Sequence):
    """Rows of a dataset with their images as they are stored: reading one decodes none."""

    def __init__(self, rows: Dataset):
        # Texts of other columns may be the address of a picture that would not be shown.
        read = [name for name, kind in rows.features.items() if name in COLUMNS or holds_text(kind)]
        self._rows = rows.select_columns(read or rows.column_names).with_format("arrow")
        # Stored as text, as the messages of a file are whose contents are now texts, now blocks.
        self._json = Features({name: kind for name, kind in rows.features.items() if name in read and holds_json(kind)})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:  # type: ignore[override]  # No slices: nobody asks for them.
        row = self._rows[index].to_pylist()[0]
        return {**row, **self._json.decode_example({name: row[name] for name in self._json})} if self._json else row


def _can_open(picture):
    """Opens a stored picture, but for a remote one, which `datasets` fetches when its row is read."""
    remote = isinstance(picture, dict) and picture.get("bytes") is None and "://" in (picture.get("path") or "")
    return picture if remote else open_picture(picture)


class _Item(NamedTuple):
    """
    What is known of a retained row without reading it again.

    Args:
        row (`int`): Its number in the data.
        said (`dict`, *optional*): What was asked and answered, where the row does not say it.
        answer (`str`, *optional*): Of a row with an image.
        lengths (`tuple[int, int]`): Of prompt and answer, in characters.
    """

    row: int
    said: dict | None
    answer: str | None
    lengths: tuple[int, int]

    @classmethod
    def of(cls, row: int, prompt: list[dict], answer: str, *, shown: bool, said: dict | None = None) -> _Item:
        """Of what is asked and answered; `shown`: whether about an image."""
        return cls(row, said, answer if shown else None, (len(text_of(prompt)), len(answer)))


class RetainedRows(torch.utils.data.Dataset):
    """A retained dataset whose items are conversations; images are decoded when a row is read, not before.

    Making it reads every row once and opens its pictures without decoding them; only a dataset with a transform, whose
    rows are not known before it ran, is decoded as well.

    Args:
        rows (`datasets.Dataset` or `list[dict]`): In one of TRL's formats; text-only rows are allowed. See
            `to_conversation`.
        unanswered (`bool`, defaults to `False`): Whether rows may have no answer, for the model to answer them: see
            `self_distillation.answer_missing`.

    Attributes:
        unanswered (`dict[int, list[dict]]`): Rows without an answer, which cannot be kept, and what they ask: messages, or
            nothing.

    Raises:
        TypeError: If the rows cannot be read by number: a dictionary of splits, an iterable dataset, a path, ...
        ValueError: If there are no rows, any row is in no known format, or a picture of it would not be shown; the
            message names the row.
    """

    def __init__(self, rows: Dataset | Sequence[dict], *, unanswered: bool = False):
        rows = None if rows is None else check_rows(rows, "the retained dataset")
        if rows is None or len(rows) == 0:
            raise ValueError(
                "the retained dataset is empty: without it nothing defines what must not change. Pass rows with "
                f"{FORMATS}."
            )
        self.rows = stored = rows
        options: dict[str, Any] = {"unanswered": unanswered}
        if isinstance(rows, Dataset) and rows.format["type"] is None:
            if (unread := unread_media(rows.features, COLUMNS)) is not None:
                raise ValueError(
                    f"the column {unread!r} of the retained dataset holds a picture, other media or arrays, which are not "
                    "read and would be dropped; rename it to `image` (or `images`, for lists), or remove the column."
                )
            stored, options["opened"] = _Stored(rows), _can_open
        self._items: list[_Item] = []
        self.unanswered: dict[int, list[dict]] = {}
        for index in range(len(stored)):
            row = read_row(stored, index, "retained row", **options)
            self._items.append(_Item.of(index, row["prompt"], answer_text(row), shown=bool(row["images"])))
            if not row["completion"]:
                self.unanswered[index] = row["prompt"]

    @classmethod
    def of(cls, rows: RetainedRows | Dataset | Sequence[dict], *, unanswered: bool = False) -> RetainedRows:
        """Rows that are read already as they are, others read.

        Args:
            rows ([`RetainedRows`], `datasets.Dataset` or `list[dict]`): The rows.
            unanswered (`bool`, defaults to `False`): Whether rows may have no answer.

        Raises:
            ValueError: If one has none, and none may; see also the constructor.
        """
        if not isinstance(rows, cls):
            return cls(rows, unanswered=unanswered)
        if rows.unanswered and not unanswered:
            raise ValueError(
                f"{len(rows.unanswered)} of {len(rows)} retained rows have no answer, which could be kept."
            )
        return rows

    @classmethod
    def none(cls) -> RetainedRows:
        """No rows: where the base model's [`Statistics`] say what must not change."""
        empty = cls.__new__(cls)
        empty.rows, empty._items, empty.unanswered = [], [], {}
        return empty

    def with_answers(self, said: Mapping[int, Sequence[tuple[list[dict], str]]]) -> RetainedRows:
        """The same rows with answers for those that had none.

        Args:
            said (`dict[int, list[tuple[list[dict], str]]]`): By row, the messages of each question asked and its answer. A
                row becomes as many as it was asked; without an answer here it is left out.
        """
        filled = RetainedRows.none()
        filled.rows = self.rows
        for item in self._items:
            if item.row not in self.unanswered:
                filled._items.append(item)
            for prompt, text in said.get(item.row, ()):
                own = {"prompt": prompt, "completion": [answer_message(text)]}
                shown = item.answer is not None
                filled._items.append(_Item.of(item.row, prompt, text, shown=shown, said=own))
        return filled

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict:
        item = self._items[int(index)]
        unanswered = item.said is not None or bool(self.unanswered)
        return {**read_row(self.rows, item.row, "retained row", unanswered=unanswered), **(item.said or {})}

    def has_image(self) -> list[bool]:
        """Whether each row shows an image; reads no row."""
        return [item.answer is not None for item in self._items]

    def length_order(self, rows: Iterable[int]) -> list[int]:
        """An order in which rows of like length are neighbours, those without an image first; reads no row.

        Of a batch, padding is computed as everything else is, and beside images, which take many tokens, a text would be
        mostly padding. As `space_peft.modeling.prompts.length_order`, but by characters.
        """
        shown = self.has_image()

        def key(row: int) -> tuple:
            prompt, answer = self._items[row].lengths
            return shown[row], prompt // (_CHARACTERS * ALIKE), answer, row

        return sorted(rows, key=key)

    def warn_if_few(self, stacklevel: int = 1) -> None:
        """Warns if next to nothing says what must not change: a handful of rows, or none that shows an image.

        Args:
            stacklevel (`int`, defaults to 1): Whose line the warning names: 1 is the caller's.
        """
        rows, images = len(self), sum(self.has_image())
        if rows >= FEW_ROWS and images:
            return
        lacking = "none shows an image" if rows >= FEW_ROWS else f"{images} of them with an image"
        warnings.warn(
            f"the retained dataset has {rows} row{'s' * (rows != 1)}, {lacking}. They alone say what must not change: anything "
            "unlike them may be lost. Hundreds are usual, with images and without. No labels are needed: "
            "`retained_answers(model, processor, images)` asks the model itself, and with `statistics` of the base model no row is.",
            stacklevel=stacklevel + 1,
        )

    def count_target(self, names: Sequence[str]) -> int:
        """How many rows show an image and answer with one of `names`: those would protect what shall be forgotten.

        Text-only rows do not count: knowledge in words about the concept is to be kept.
        """
        return sum(mentions(item.answer, names) for item in self._items if item.answer is not None)


def retained_loader(processor, retained: RetainedRows, indices: Sequence[int], batch_size: int):
    """A dataloader of encoded retained rows, for fitting and for the certificate, in [`RetainedRows.length_order`]."""
    return torch.utils.data.DataLoader(
        torch.utils.data.Subset(retained, retained.length_order(indices)),
        batch_size=batch_size,
        collate_fn=lambda rows: encode_conversations(processor, rows),
    )
