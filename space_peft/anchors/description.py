"""What a target is, in a sentence or two, for a text encoder."""

from __future__ import annotations

import unicodedata


MAX_DESCRIPTION_LENGTH = 2000


def check_description(description: str | None) -> str | None:
    """Returns the description, blanks trimmed.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is blank or too long.
    """
    if description is None:
        return None
    if not isinstance(description, str):
        raise TypeError(f"expected `description` to be a string, got {type(description).__name__}.")
    if not any(unicodedata.category(character)[0] not in "ZC" for character in description):
        raise ValueError(f"the description has no visible character, got {description[:40]!r}; leave it out.")
    description = description.strip()
    if len(description) > MAX_DESCRIPTION_LENGTH:
        raise ValueError(
            f"the description has {len(description)} characters, more than {MAX_DESCRIPTION_LENGTH}; a sentence or two "
            "about how the concept looks is what the text encoder can use."
        )
    return description
