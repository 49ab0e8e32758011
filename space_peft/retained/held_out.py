"""Which retained rows are held out: whole images and whole texts, so that no row measured on was seen under another question."""

from __future__ import annotations

import itertools
import json
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..data.pictures import load_rgb
from ..data.seed_images import pixel_hash
from ..statistics.intervals import exact_upper_bound
from .reading import RetainedRows, split_retained


@dataclass(frozen=True)
class HeldOut:
    """
    Which retained rows a certificate was measured on: the second part of `split(rows)`.

    Args:
        rows (`int`): Number of retained rows there were.
        share (`float`): Of the distinct images and of the distinct texts that was held out.
        seed (`int`): Of the choice.
        groups (`int`, defaults to 0): Number of distinct images and texts there were. 0 in certificates of version 0.1.0,
            which held out single rows: their images were among the fitted ones.
    """

    rows: int
    share: float
    seed: int
    groups: int = 0

    def split(self, retained: RetainedRows) -> tuple[list[int], list[int]] | None:
        """Fitted and held-out rows of the data it was made from.

        Args:
            retained ([`RetainedRows`]): The data.

        Returns:
            `tuple[list[int], list[int]]`: Both in ascending order; `None` if these are other data.
        """
        if len(retained) != self.rows:
            return None
        if not self.groups:
            return split_retained(self.rows, self.share, self.seed)
        keys = content_keys(retained)
        return split_by_content(keys, self.share, self.seed) if len(set(keys)) == self.groups else None


def content_keys(retained: RetainedRows, rows: Iterable[int] | None = None) -> list[tuple[str, str]]:
    """What each row is about: `("image", key)`, the same for rows that share an image, or `("text", key)`.

    Images are the same if their pixels are, whatever file they came from; rows that share one directly or over others
    (several images a row) have one key. A row without an image is about the text of its prompt, whatever the case and
    blanks: the same question with another answer shows the model the same inputs.

    Args:
        retained ([`RetainedRows`]): The data; images are decoded.
        rows (iterable of `int`, *optional*): Which of its rows; all by default.

    Returns:
        `list[tuple[str, str]]`: In the order of `rows`.

    Raises:
        ValueError: If an image does not decode; the message names the row.
    """
    rows = range(len(retained)) if rows is None else rows
    return _keys((f"retained row {row}", retained[row]) for row in rows)


def first_seen(given: RetainedRows, retained: RetainedRows, rows: Iterable[int]) -> tuple[int, str] | None:
    """The first of the given rows that is about an image or a text that some retained rows are about as well.

    Args:
        given ([`RetainedRows`]): Rows that should be others.
        retained ([`RetainedRows`]): The data.
        rows (iterable of `int`): Which of its rows.

    Returns:
        `tuple[int, str]`: Number of the row, and what it shares, "image" or "text"; `None` if all are others.
    """
    new = ((f"row {row}", given[row]) for row in range(len(given)))
    keys = _keys(itertools.chain(new, ((f"retained row {row}", retained[row]) for row in rows)))
    old = set(keys[len(given) :])
    return next(((row, key[0]) for row, key in enumerate(keys[: len(given)]) if key in old), None)


def _keys(rows: Iterable[tuple[str, dict]]) -> list[tuple[str, str]]:
    known: dict[int, tuple[weakref.ref, str]] = {}  # Rows of a list often share image objects.
    parents: dict[str, str] = {}  # By image: another of its group, nearer to the one that names it.

    def root(image: str) -> str:
        while (other := parents.setdefault(image, image)) != image:
            parents[image] = parents.setdefault(other, other)
            image = other
        return image

    keys: list[tuple[str, str]] = []
    for where, row in rows:
        hashes = []
        for image in row["images"]:
            reference, pixels = known.get(id(image), (None, ""))
            if reference is None or reference() is not image:
                try:
                    pixels = pixel_hash(load_rgb(image))
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{where}: {error}") from error
                known[id(image)] = weakref.ref(image), pixels
            hashes.append(pixels)
        for other in hashes[1:]:
            parents[root(other)] = root(hashes[0])
        keys.append(("image", hashes[0]) if hashes else ("text", prompt_key(row)))
    return [(kind, root(key) if kind == "image" else key) for kind, key in keys]


def prompt_key(row: dict) -> str:
    """The text of a conversation's prompt, up to case and blanks."""
    turns = [
        [message["role"], *(" ".join(block.get("text", "").split()).casefold() for block in message["content"])]
        for message in row["prompt"]
    ]
    return json.dumps(turns, ensure_ascii=False)


def split_by_content(keys: Iterable[tuple[str, str]], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows for fitting and training, and rows held out, which share no image and no text; a function of its arguments.

    Of the images, and of the texts, `share` is held out: one at least, where there are two and anything is held out at
    all. With a single image, of which nothing could be held out, nothing is: what it is held out for looks at images.

    Args:
        keys (iterable of `tuple[str, str]`): Of the rows, see [`content_keys`].
        share (`float`): In [0, 1).
        seed (`int`): Of the choice.

    Returns:
        `tuple[list[int], list[int]]`: Numbers of rows, both in ascending order.
    """
    keys = list(keys)
    distinct = dict.fromkeys(keys)
    by_kind = {kind: [key for key in distinct if key[0] == kind] for kind in ("image", "text")}
    chosen: set[tuple[str, str]] = set()
    if round(share * len(distinct)) and len(by_kind["image"]) != 1:
        generator = torch.Generator().manual_seed(seed)
        for own in by_kind.values():
            count = max(0, min(max(1, round(share * len(own))), len(own) - 1))
            chosen |= {own[place] for place in torch.randperm(len(own), generator=generator)[:count].tolist()}
    rows = range(len(keys))
    return [row for row in rows if keys[row] not in chosen], [row for row in rows if keys[row] in chosen]


# None of so many changed says that less than 14 % of all do (with 95 % confidence).
NEEDED = 20


def warn_if_few(distinct: int, held_out: int, share: float, images: int = 0) -> None:
    """Warns of a certificate that is measured on too few images and texts, or on none.

    Args:
        distinct (`int`): Number of distinct images and texts that the retained rows are about.
        held_out (`int`): Of them that are held out.
        share (`float`): That was asked for; 0 asks for no certificate.
        images (`int`, defaults to 0): Of the distinct ones, how many are images.
    """
    if share == 0 or held_out >= NEEDED:
        return
    if held_out == 0 and images == 1:
        what = (
            "there will be no certificate, because only one of them is an image, which is needed for fitting. Retain more "
            "images, or none"
        )
    elif held_out == 0:
        what = "there will be no certificate, because none of them is held out"
    else:
        what = (
            f"the certificate will be measured on {held_out}, which say little: if none of them changes, up to "
            f"{exact_upper_bound(0, held_out):.0%} of those like them still may"
        )
    warnings.warn(
        f"the retained rows are about {distinct} distinct images and texts; {what}. It takes {NEEDED} (whole images and "
        f"texts are held out, with all of their rows): retain {-(-NEEDED // share):.0f} of them, raise `certificate_share` "
        f"(now {share:g}), or set it to 0 to do without.",
        stacklevel=5,
    )
