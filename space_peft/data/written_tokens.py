"""How a tokenizer writes a text: at a text's start, behind something, and behind a given text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Written before a text so that a tokenizer does not take its first token for a text's beginning.
_PREFIXES = ("\n", ".", ",", ":", "(", '"', "1")


class Writing:
    """The tokens of a text, as they stand in different places, without special tokens of the tokenizer's own.

    SentencePiece writes a text's start as if a blank stood before it, and a blank at a text's start as two. So the tokens
    of a text by itself are not those with which it goes on.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer

    @cached_property
    def _prefixes(self) -> list[tuple[str, tuple[int, ...]]]:
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        own = [(prefix, self.alone(prefix)) for prefix in _PREFIXES]
        return [(prefix, ids) for prefix, ids in own if ids and unknown not in ids]

    def alone(self, text: str) -> tuple[int, ...]:
        """A text by itself."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def after(self, before: str, text: str) -> tuple[int, ...] | None:
        """What a text adds to the tokens of another one; `None` if the two merge, so that no tokens are the text's own."""
        first, whole = self.alone(before), self.alone(before + text)
        return whole[len(first) :] if whole[: len(first)] == first else None

    def behind(self, text: str) -> tuple[int, ...]:
        """A text directly behind a character that is no part of it; none if it merges with each that was tried."""
        for prefix, ids in self._prefixes:
            whole = self.alone(prefix + text)
            if len(whole) > len(ids) and whole[: len(ids)] == ids:  # Else the prefix has merged with the text.
                return whole[len(ids) :]
        return ()

    def merged(self, mark: str, text: str) -> tuple[int, ...]:
        """A text with a mark before it whose tokens merge with the text's: `'"Eiffel'` begins with `'"E'` in Qwen2's; else none."""
        own, whole = self.alone(mark), self.alone(mark + text)
        return () if whole[: len(own)] == own else whole

    def read_behind(self, tokens: Sequence[int]) -> str:
        """The text of tokens that go on from others: a blank that they begin with is part of it."""
        before = list(self._prefixes[0][1]) if self._prefixes else []
        return self._read([*before, *tokens])[len(self._read(before)) :]

    def _read(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
