"""The names a target goes by, and which captions of a pool speak of it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from ..names import MAX_NAME_LENGTH, check_concept, mentions


MAX_DESCRIPTION_LENGTH = 2000

# Scripts written without blanks between words: a name's edges cannot be told from its neighbours there.
_UNSPACED_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def check_names(
    concept: str, aliases: Sequence[str], description: str | None
) -> tuple[str, tuple[str, ...], str | None]:
    """Checks what a target is called; aliases equal to the concept or to each other are dropped.

    Args:
        concept (`str`): The name.
        aliases (`list[str]`): Other names.
        description (`str`, *optional*): What it is, in a sentence or two.

    Returns:
        `tuple`: The concept, the aliases and the description, blanks trimmed.

    Raises:
        TypeError: If one is no string, or `aliases` is a single string.
        ValueError: If one is blank or too long.
    """
    concept = _visible(check_concept(concept), "concept")
    if isinstance(aliases, str):
        raise TypeError(
            f"expected `aliases` to be a sequence of names, got the string {aliases!r}: write [{aliases!r}]."
        )
    kept = {concept.casefold(): concept}
    for alias in aliases:
        if not isinstance(alias, str):
            raise TypeError(f"expected every alias to be a string, got {type(alias).__name__}: {alias!r}.")
        alias = " ".join(_visible(alias, "alias").split())
        if len(alias) > MAX_NAME_LENGTH:
            raise ValueError(f"an alias has {len(alias)} characters, more than {MAX_NAME_LENGTH}: {alias[:40]!r}...")
        kept.setdefault(alias.casefold(), alias)
    if description is not None:
        if not isinstance(description, str):
            raise TypeError(f"expected `description` to be a string, got {type(description).__name__}.")
        description = _visible(description, "description").strip()
        if len(description) > MAX_DESCRIPTION_LENGTH:
            raise ValueError(
                f"the description has {len(description)} characters, more than "
                f"{MAX_DESCRIPTION_LENGTH}; a sentence or two "
                "about how the concept looks is what the text encoder can use."
            )
    return concept, tuple(kept.values())[1:], description


def names_target(caption: str | None, names: Sequence[str]) -> bool:
    """Whether a caption speaks of the target, read more widely than an answer is.

    One target image among the anchors would break the promise of a source-free erasure, one image too few costs
    nothing. So beyond `names.mentions` (whole words, any case, composed or decomposed Unicode) this takes hyphens and
    underscores for blanks, knows the English plural endings, and looks inside runs of scripts without blanks.

    Args:
        caption (`str`, *optional*): A caption of the pool.
        names (`list[str]`): The concept and its aliases, taken literally.
    """
    if not caption:
        return False
    # Tried first as it is, so that a name made of such characters ("C--") is still found.
    if mentions(caption, names):
        return True
    spaced = _spaced(caption)
    plurals = [_spaced(name) + ending for name in names for ending in ("", "s", "es")]
    if mentions(spaced, plurals):
        return True
    return any(_unspaced(name) and name in unicodedata.normalize("NFKC", caption) for name in names)


def _visible(text: str, what: str) -> str:
    if not any(unicodedata.category(character)[0] not in "ZC" for character in text):
        raise ValueError(
            f"the {what} has no visible character, got {text[:40]!r}; expected a name such as 'Eiffel Tower'."
        )
    return text


def _spaced(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text).strip()


def _unspaced(name: str) -> bool:
    return any(unicodedata.name(character, "").startswith(_UNSPACED_SCRIPTS) for character in name)
