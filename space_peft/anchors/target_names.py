"""The names a target goes by."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ..data.names import check_aliases, check_concept


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
    aliases = check_aliases(aliases, concept=concept)
    if description is not None:
        if not isinstance(description, str):
            raise TypeError(f"expected `description` to be a string, got {type(description).__name__}.")
        if not any(unicodedata.category(character)[0] not in "ZC" for character in description):
            raise ValueError(f"the description has no visible character, got {description[:40]!r}; leave it out.")
        description = description.strip()
        if len(description) > MAX_DESCRIPTION_LENGTH:
            raise ValueError(
                f"the description has {len(description)} characters, more than "
                f"{MAX_DESCRIPTION_LENGTH}; a sentence or two "
                "about how the concept looks is what the text encoder can use."
            )
    return concept, aliases, description
