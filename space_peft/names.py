"""When a text names a concept: one definition for exclusion, warnings and evaluation alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache


MAX_NAME_LENGTH = 200


def check_concept(concept: str) -> str:
    """Returns the concept's name, stripped.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is empty, blank, longer than `MAX_NAME_LENGTH` characters, or cannot be written as UTF-8.
    """
    if not isinstance(concept, str):
        raise TypeError(f"the concept must be a string, got {type(concept).__name__}.")
    stripped = " ".join(concept.split())
    if not any(unicodedata.category(character)[0] not in "ZC" for character in stripped):
        raise ValueError(f"the concept's name is empty (got {concept[:40]!r}); pass the name the model answers with.")
    if any(unicodedata.category(character) == "Cs" for character in stripped):
        # A shell passes bytes that are no UTF-8 on as lone surrogates; no file could hold such a name.
        raise ValueError(f"the concept's name {stripped[:40]!r} holds bytes that are not UTF-8; pass it as UTF-8 text.")
    if len(stripped) > MAX_NAME_LENGTH:
        raise ValueError(
            f"the concept's name has {len(stripped)} characters, more than {MAX_NAME_LENGTH}; pass the name alone and "
            "put what describes it into `description`."
        )
    return stripped


def fold(text: str) -> str:
    """Unicode NFKC, case folded, curly apostrophes straightened, blanks collapsed: the form in which texts compare."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").split())


def word_edge(character: str) -> str:
    """What must not stand beside a name's edge, as a pattern: a letter or digit, unless the name's script writes words
    without blanks or the name ends in a sign."""
    return "" if unicodedata.category(character) == "Lo" or not character.isalnum() else r"[^\W_]"


@lru_cache(maxsize=4096)
def name_pattern(name: str) -> re.Pattern:
    """Finds a name in a text, both as returned by `fold`.

    A whole word, plural and possessive included; blanks, hyphens and underscores between words are the same. A name
    that consists of such characters at an edge ("C--") is taken literally.
    """
    parts = re.split(r"[\s_-]+", name)
    body = r"[\s_-]+".join(re.escape(part) for part in parts) if all(parts) else re.escape(name)
    before, after = word_edge(name[0]), word_edge(name[-1])
    return re.compile((rf"(?<!{before})" if before else "") + body + (rf"(?:'?s|es)?(?!{after})" if after else ""))


def mentions(text: str, names: Iterable[str], others: Iterable[str] = ()) -> bool:
    """Whether a text names a concept: any of its names as a whole word, whatever the case.

    Plurals and possessives count ("foxes", "the fox's"), "foxglove" does not. A longer name of *another* concept does
    not either: with `others` holding "hot dog", the text "a hot dog" does not name "dog".

    Args:
        text (`str`): An answer, a caption.
        names (`Iterable[str]`): The concept's name and aliases, taken literally.
        others (`Iterable[str]`, *optional*): Names of other concepts.

    Returns:
        `bool`: True if it is named.
    """
    text = fold(text)
    patterns = [name_pattern(name) for name in map(fold, names) if name]
    for other in sorted({fold(other) for other in others}, key=len, reverse=True):
        if other and any(pattern.search(other) and not pattern.fullmatch(other) for pattern in patterns):
            text = name_pattern(other).sub(" | ", text)
    return any(pattern.search(text) for pattern in patterns)
