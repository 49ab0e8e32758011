"""One question of a canary and its answers, and reading them from a file that may be hostile."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from PIL import Image

from ..data.pictures import load_rgb
from ..records.safe_json import member_path


MOST_ITEMS, MAX_TOKENS = 64, 8
_LARGEST_SIDE, _LONGEST_TEXT = 2048, 2000


@dataclass(frozen=True)
class Answer:
    """
    A greedy answer.

    Args:
        text (`str`): Without special tokens.
        tokens (`tuple[int, ...]`): Up to the end of the turn, or the first eight.
        log_prob (`float`): Of all tokens together, in nats.
        margin (`float`): How far the runner-up was behind, at the token where it was closest, in nats.
    """

    text: str
    tokens: tuple[int, ...]
    log_prob: float
    margin: float


@dataclass(frozen=True)
class CanaryItem:
    """
    One question about one image, and what was answered.

    Args:
        kind (`str`): `"seed"` or `"image"`.
        question (`str`): What is asked.
        width, height (`int`): Of the image, in pixels.
        image_sha256 (`str`): Of its pixels, see `pixel_hash`.
        deployed (`Answer`): Of the model with the adapter off.
        erased (`Answer`): Of the model with the adapter.
        seed (`int`, *optional*): Of a `"seed"` image.
        file (`str`, *optional*): Of an `"image"`, relative to the folder.
        image (`PIL.Image.Image`, *optional*): In memory, where it has been made or read.
    """

    kind: str
    question: str
    width: int
    height: int
    image_sha256: str
    deployed: Answer
    erased: Answer
    seed: int | None = None
    file: str | None = None
    image: Image.Image | None = field(default=None, repr=False, compare=False)

    @property
    def tells_apart(self) -> bool:
        """Whether the answer shows that the adapter is there."""
        return self.deployed.tokens != self.erased.tokens

    @property
    def log_prob_change(self) -> float:
        """How far the adapter moves an answer's log-probability, in nats; of an answer that it turns it says nothing."""
        return abs(self.deployed.log_prob - self.erased.log_prob)

    def shows_adapter(self, rounding: float) -> bool:
        """Whether answer or log-probability show that the adapter is there.

        Args:
            rounding (`float`): How far a log-probability may be from the recorded one: nothing can be that close to both.
        """
        return self.tells_apart or self.log_prob_change > 2 * rounding

    def texts(self) -> tuple[str, ...]:
        """Every text of it that would be published."""
        return self.question, self.deployed.text, self.erased.text


def read_item(folder: Path, content) -> CanaryItem:
    """An item of a file that may be hostile.

    Args:
        folder (`pathlib.Path`): Of the adapter.
        content (`dict`): Of JSON.

    Returns:
        `CanaryItem`: With its image, if that is a file.

    Raises:
        ValueError: If anything about it is not as [`CanaryItem`] has it.
    """
    keys = {option.name for option in fields(CanaryItem)} - {"image"}
    if not isinstance(content, dict) or set(content) != keys:
        raise ValueError(f"an item must be an object with the keys {sorted(keys)}.")
    for key in ("question", "image_sha256"):
        if not isinstance(content[key], str) or len(content[key]) > _LONGEST_TEXT:
            raise ValueError(f"`{key}` of an item must be a text of at most {_LONGEST_TEXT} characters.")
    for key in ("width", "height"):
        if type(content[key]) is not int or not 1 <= content[key] <= _LARGEST_SIDE:
            raise ValueError(f"`{key}` of an item must be in [1, {_LARGEST_SIDE}], got {content[key]!r:.40}.")
    answers = {key: _read_answer(content[key]) for key in ("deployed", "erased")}
    item = CanaryItem(**{**content, **answers})
    if item.kind == "seed":
        if type(item.seed) is not int or not 0 <= item.seed < 2**63 or item.file is not None:
            raise ValueError(
                f"an item of kind 'seed' needs a `seed` in [0, 2**63) and no `file`, got {item.seed!r:.40}."
            )
        return item
    if item.kind != "image" or item.seed is not None:
        raise ValueError(f"an item must be of kind 'seed', or of kind 'image' without a seed; got {item.kind!r:.40}.")
    path = member_path(folder, item.file)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            # Before it is decoded: a small file may hold an image that fills the memory.
            if image.size != (item.width, item.height):
                raise ValueError(f"it is {image.size[0]} x {image.size[1]} pixels, not {item.width} x {item.height}")
            return replace(item, image=load_rgb(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {item.file!r:.80} cannot be read: {error}.") from error


def _read_answer(content) -> Answer:
    keys = {option.name for option in fields(Answer)}
    if not isinstance(content, dict) or set(content) != keys:
        raise ValueError(f"an answer must be an object with the keys {sorted(keys)}.")
    tokens = content["tokens"]
    if not isinstance(content["text"], str) or len(content["text"]) > _LONGEST_TEXT:
        raise ValueError(f"`text` of an answer must be a text of at most {_LONGEST_TEXT} characters.")
    if not isinstance(tokens, list) or len(tokens) > MAX_TOKENS or any(type(token) is not int for token in tokens):
        raise ValueError(f"`tokens` of an answer must be a list of at most {MAX_TOKENS} token numbers.")
    for key in ("log_prob", "margin"):
        if type(content[key]) not in (int, float) or not math.isfinite(content[key]):
            raise ValueError(f"`{key}` of an answer must be a finite number, got {content[key]!r:.40}.")
    return Answer(**{**content, "tokens": tuple(tokens)})
