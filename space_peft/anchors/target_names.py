"""The names a target goes by."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ..names import MAX_NAME_LENGTH, check_concept


MAX_DESCRIPTION_LENGTH = 2000


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
    concept = check_concept(concept)
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


def _visible(text: str, what: str) -> str:
    if not any(unicodedata.category(character)[0] not in "ZC" for character in text):
        raise ValueError(
            f"the {what} has no visible character, got {text[:40]!r}; expected a name such as 'Eiffel Tower'."
        )
    return text
