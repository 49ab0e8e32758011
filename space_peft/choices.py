"""The words that settings take, for the library and its command line. Imports nothing slow."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args


ConstraintName = Literal["soft", "hard", "none"]


class Asked(NamedTuple):
    """
    What a configuration has to know of a constraint; what it does is in `null_space/constraints.py`.

    Args:
        knob (`str`, *optional*): The setting that says how strict it is.
        capped (`bool`): Whether `max_rank="auto"` is a number of eigenvectors, and not as many as it takes.
        acts (`bool`, defaults to `True`): Whether it keeps anything off, so that an adapter must be attached to null spaces.
    """

    knob: str | None
    capped: bool
    acts: bool = True


CONSTRAINTS: dict[str, Asked] = {
    "soft": Asked("strength", capped=True),
    "hard": Asked("energy", capped=False),
    "none": Asked(None, capped=False, acts=False),
}
InputKind = Literal["token", "pooled"]
INPUT_KINDS: tuple[InputKind, ...] = get_args(InputKind)
RefinementMethod = Literal["fourier", "pixels"]
REFINEMENT_METHODS: tuple[RefinementMethod, ...] = get_args(RefinementMethod)
Target = Literal["vision", "language", "all"]
TARGETS: tuple[Target, ...] = get_args(Target)
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)
DeviceName = Literal["cuda", "cpu"]
DEVICES: tuple[DeviceName, ...] = get_args(DeviceName)


def nearest(word: str, words: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Those of some words that a mistyped one may have meant, the nearest first; in whatever case it is written.

    Args:
        word (`str`): That is none of them.
        words (`list[str]`): Those that there are.
        most (`int`, defaults to 1): How many to return.
        cutoff (`float`, defaults to 0.6): How near, as [`difflib.get_close_matches`] has it.
    """
    by_lower = {known.lower(): known for known in words}
    return [by_lower[near] for near in difflib.get_close_matches(word.lower(), by_lower, n=most, cutoff=cutoff)]


def did_you_mean(word: object, words: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """ "did you mean 'erase'?", or nothing, if no word is near.

    Args:
        word, words, most, cutoff: See [`nearest`].
    """
    near = nearest(word, words, most=most, cutoff=cutoff) if isinstance(word, str) else []
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""
