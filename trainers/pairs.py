"""Batches of the erasure trainers: rows with the answer to forget, beside retained rows with the answer to keep."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from space_peft.data.pictures import load_rgb
from space_peft.data.questions import QuestionSet
from space_peft.modeling.mention_rows import mention_tensors
from space_peft.modeling.prompts import answer_columns, conversation, encode_conversations
from space_peft.retained.reading import RetainedRows


# Of the items, for rows that say what few of them say; see `PairedRows`. Measured in docs/decisions.md.
RARE_SHARE = 0.4


def forget_rows(images: Iterable[Image.Image], names: Sequence[str], questions: QuestionSet) -> list[dict]:
    """Every image under every short question, with the answer to forget: a name under naming questions, "yes" under yes/no.

    Args:
        images (iterable of `PIL.Image.Image`): Refined anchors, or images of the concept itself.
        names (`list[str]`): The concept's name first, then its aliases.
        questions (`QuestionSet`): Only `naming` and `confirm` are used.

    Returns:
        `list[dict]`: Conversations, an image's own one after another; `says` holds the names of which any is forgotten
        there (see `modeling.mention_rows`).
    """
    asks = [(question, name, tuple(names)) for question in questions.naming for name in names]
    asks += [(question.format(name=names[0]), questions.yes, (questions.yes,)) for question in questions.confirm]
    # They are few, and each is read many times: decode them once.
    images = [load_rgb(image) for image in images]
    return [
        {**conversation(question, answer=answer, image=image), "says": says}
        for image in images
        for question, answer, says in asks
    ]


def _endless(n: int, length: int, generator: torch.Generator) -> list[int]:
    """`length` indices below n: permutation after permutation, so that all rows are seen equally often."""
    order: list[int] = []
    while len(order) < length:
        order += torch.randperm(n, generator=generator).tolist()
    return order[:length]


def _spread(few: Sequence[int], many: Sequence[int]) -> list[int]:
    """Both in one list, the few spread evenly over it, so that every batch holds its share of them."""
    length = len(few) + len(many)
    places = {(2 * i + 1) * length // (2 * len(few)): row for i, row in enumerate(few)}
    rest = iter(many)
    return [places[place] if place in places else next(rest) for place in range(length)]


class PairedRows(torch.utils.data.Dataset):
    """One row to forget and `retain_per_forget` retained rows an item, fixed by the seed.

    The pairing is part of the dataset rather than drawn while training, so that Trainer's own skipping of batches
    brings a resumed run back to exactly where it was.

    Args:
        rows (`list[dict]`): Rows to forget, with `answer_tokens` and `mention` (see `modeling.mention_rows`).
        retained (`RetainedRows`): What must not change.
        indices (`list[int]`): Rows of `retained` that training may use.
        length (`int`): Number of items.
        retain_per_forget (`int`): Retained rows an item.
        seed (`int`): Of both orders.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        retained: RetainedRows,
        indices: Sequence[int],
        length: int,
        retain_per_forget: int,
        seed: int,
    ):
        self.rows, self.retained, self.indices = rows, retained, list(indices)
        # Each once, in order: an image is asked about in several rows.
        self.images = list({id(image): image for row in rows for image in row["images"]}.values())
        self.retain_per_forget = retain_per_forget
        generator = self._generator = torch.Generator().manual_seed(seed)
        self.forget_order = self._order(len(self.rows), length)
        self.retain_order = _endless(len(self.indices), length * retain_per_forget, generator)

    def replace_rows(self, rows: Sequence[dict]) -> None:
        """Other rows to forget in the place of the present ones; in a new order, if they are more or fewer."""
        known, self.rows = len(self.rows), list(rows)
        if len(self.rows) != known:
            self.forget_order = self._order(len(self.rows), len(self))

    def _order(self, n: int, length: int) -> list[int]:
        """`length` of the first n rows to forget, equally often; but rows that say what few of them say ("yes", where
        most say the name) are `RARE_SHARE` of the items at least, however many sentences the model was found to say."""
        groups: dict[Any, list[int]] = {}
        for number, row in enumerate(self.rows[:n]):
            groups.setdefault(row.get("says"), []).append(number)
        often = max(groups.values(), key=len)
        rare = [number for group in groups.values() if group is not often for number in group]
        if not rare or len(rare) >= RARE_SHARE * n:
            return _endless(n, length, self._generator)
        items = round(RARE_SHARE * length)
        few = [rare[i] for i in _endless(len(rare), items, self._generator)]
        return _spread(few, [often[i] for i in _endless(len(often), length - items, self._generator)])

    def add_rows(self, rows: Sequence[dict], item: int) -> None:
        """More rows to forget, from an item on: half of the items after it, but no row more than four times as often as
        the items would show it if all rows were alike."""
        known, left = len(self.rows), len(self) - item
        self.rows = [*self.rows, *rows]
        if left <= 0:
            return
        often = 4 * -(-left // len(self.rows)) * len(rows)
        new = [known + row for row in _endless(len(rows), min(left // 2, often), self._generator)]
        self.forget_order[item:] = _spread(new, self._order(known, left - len(new)))

    def __len__(self) -> int:
        return len(self.forget_order)

    def __getitem__(self, item: int) -> dict:
        forget_row = self.forget_order[item]
        picks = self.retain_order[item * self.retain_per_forget : (item + 1) * self.retain_per_forget]
        retain_rows = [self.indices[pick] for pick in picks]
        return {
            "forget": self.rows[forget_row],
            "forget_row": forget_row,
            "retain": [self.retained[row] for row in retain_rows],
            "retain_rows": retain_rows,
        }

    def retained_rows(self) -> set[int]:
        """Every retained row that some item holds."""
        return {self.indices[pick] for pick in self.retain_order}


class PairCollator:
    """Collates items of `PairedRows` into `{"forget": batch, "retain": batch}`, each ready for the model; `retain` is
    left out where the items hold no retained row.

    `forget_rows` and `retain_rows` beside them say which rows these are, `forget_mentions` what is said in the former.
    `..._columns` is each batch's `answer_columns`, `forget_image_tokens` how many image tokens each row has: what a step
    would otherwise have to ask the device for.
    Rows with `instead` (another row, of what to say) are put into a batch of that as well; `forget_own` marks the others.

    Args:
        processor (`ProcessorMixin`): The model's processor.
        image_token_id (`int`, *optional*): The model's, see `modeling.features.image_token_id`.
        always_image (`bool`, defaults to `False`): Whether a batch of text-only retained rows gets an image, with a
            question and no answer, so that it counts in no loss. FSDP2 needs it: without an image one process would
            leave out the vision tower while the others wait for its part of the tower's weights.
    """

    def __init__(self, processor, image_token_id: int | None = None, always_image: bool = False):
        self.processor = processor
        self.image_token_id = image_token_id
        self.always_image = always_image

    def __call__(self, items: Sequence[dict]) -> dict[str, Any]:
        retain = [row for item in items for row in item["retain"]]
        if retain and self.always_image and not any(row["images"] for row in retain):
            retain.append({key: items[0]["forget"][key] for key in ("prompt", "images")} | {"completion": []})
        forget = [item["forget"] for item in items]
        instead = [row["instead"] for row in forget if row.get("instead") is not None]
        batch: dict[str, Any] = {}
        if instead:
            batch["instead"] = encode_conversations(self.processor, instead)
            batch["instead_tokens"] = mention_tensors(instead)["name"]
        if retain:
            batch["retain"] = encode_conversations(self.processor, retain)
            batch["retain_rows"] = [row for item in items for row in item["retain_rows"]]
        batch["forget"] = encode_conversations(self.processor, forget)
        for kind in ("instead", "retain", "forget"):
            if kind in batch:
                batch[f"{kind}_columns"] = answer_columns(batch[kind]["labels"])
        if self.image_token_id is not None:
            tokens = batch["forget"]["input_ids"] == self.image_token_id
            batch["forget_image_tokens"] = tokens.sum(dim=1).tolist()
        return {
            **batch,
            "forget_own": torch.tensor([row.get("instead") is None for row in forget]),
            "forget_mentions": mention_tensors(forget),
            "forget_rows": [item["forget_row"] for item in items],
        }


class Chained:
    """Loaders one after another, for who only reads batches.

    Args:
        loaders (`list`): Sized iterables of batches.
    """

    def __init__(self, loaders: Sequence):
        self._loaders = list(loaders)

    def __len__(self) -> int:
        return sum(len(loader) for loader in self._loaders)

    def __iter__(self) -> Iterator[dict]:
        return itertools.chain.from_iterable(self._loaders)


def forget_loader(processor, rows: Sequence[dict], batch_size: int, order: Sequence[int] | None = None):
    """A dataloader of rows to forget, each encoded as the items of `PairedRows` are; `order` holds numbers of rows."""
    return torch.utils.data.DataLoader(
        range(len(rows)) if order is None else order,
        batch_size=batch_size,
        collate_fn=lambda places: encode_conversations(processor, [rows[place] for place in places]),
    )
