"""When a text names a concept: one definition for exclusion, warnings and evaluation alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


MAX_NAME_LENGTH = 200


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_concept(concept: str) -> str:
    """Returns the concept's name, stripped.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is empty, blank, or longer than `MAX_NAME_LENGTH` characters.
    """
    if not isinstance(concept, str):
        raise TypeError(f"the concept must be a string, got {type(concept).__name__}.")
    stripped = " ".join(concept.split())
    if not stripped:
        raise ValueError(f"the concept's name is empty (got {concept!r}); pass the name the model answers with.")
    if len(stripped) > MAX_NAME_LENGTH:
        raise ValueError(
            f"the concept's name has {len(stripped)} characters, more than {MAX_NAME_LENGTH}; pass the name alone and "
            "put what describes it into `description`."
        )
    return stripped


def mentions(text: str, names: Iterable[str]) -> bool:
    """Whether `text` contains one of `names` as whole words, whatever the case and the kind of blanks.

    Args:
        text (`str`): An answer, a caption.
        names (`Iterable[str]`): The concept's name and aliases.

    Returns:
        `bool`: "A fox." mentions "fox"; "foxglove" does not.
    """
    folded = _fold(text)
    # Look-arounds rather than \b: a name may begin or end with a character that is no word character ("C++").
    return any(re.search(rf"(?<!\w){re.escape(_fold(name))}(?!\w)", folded) for name in names if name.strip())
