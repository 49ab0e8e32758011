"""Names, captions and answers come from anywhere: text that stays text where it is shown.

No file name is ever made from a name; there is nothing to escape there.
"""

from __future__ import annotations

import re
import unicodedata


MAX_SHOWN = 200
# What ends, starts or nests something in Markdown; a backslash takes that away.
_BACKSLASH = frozenset("`*_{}[]#!|~^=")
# A backslash would not do: the Hub renders `$$` and `\\(` before it reads Markdown, and HTML knows no backslash.
_ENTITIES = {"\\": "&#92;", "$": "&#36;", "<": "&lt;", ">": "&gt;", "&": "&amp;"}
_JOINERS = "\u200c\u200d"


def plain_line(text: object, limit: int | None = MAX_SHOWN) -> str:
    """One line that shows what it holds, for a terminal or to be escaped further.

    Line breaks and blanks become one blank. Control characters, lone surrogates and invisible format characters (bidi
    overrides, zero-width blanks) become `<U+202E>` and the like: a name cannot look like another one. Joiners between
    letters that need them (Persian, emoji) stay.

    Args:
        text (`object`): Shown as `str(text)`.
        limit (`int`, *optional*, defaults to 200): Longest result, its "…" included; `None` for any.
    """
    text = " ".join(str(text).split())
    characters = []
    for i, character in enumerate(text):
        category = unicodedata.category(character)
        joins = character in _JOINERS and 0 < i < len(text) - 1 and not (text[i - 1] + text[i + 1]).isascii()
        if category in ("Cc", "Cf", "Cs") and not joins:
            character = f"<U+{ord(character):04X}>"
        characters.append(character)
    line = "".join(characters)
    return line if limit is None or len(line) <= limit else line[: limit - 1].rstrip() + "…"


def markdown_text(text: object, limit: int | None = MAX_SHOWN) -> str:
    """Text for a line or a table cell of a Markdown document, as GitHub, the Hub and CommonMark render it.

    Whatever the text holds, it renders as itself (see `plain_line`): no emphasis, link, image, HTML, formula, heading,
    list, table cell, and no address that a renderer would make a link of.

    Args:
        text (`object`): Shown as `str(text)`.
        limit (`int`, *optional*, defaults to 200): See `plain_line`; counts characters before escaping.
    """
    line = plain_line(text, limit)
    escaped = []
    for i, character in enumerate(line):
        before, after = line[i - 1] if i else "", line[i + 1 : i + 2]
        if character in _ENTITIES:
            character = _ENTITIES[character]
        elif character in _BACKSLASH or _starts_block(line, i) or _makes_address(before, character, after):
            character = f"\\{character}"
        elif character == "@":
            # E-mail addresses are looked for after escapes are resolved; a word joiner is invisible and in none.
            character = "@\u2060"
        escaped.append(character)
    return "".join(escaped)


def _starts_block(line: str, i: int) -> bool:
    """Whether a list or an underline would start here: "- x", "+ x", "1. x", "1) x"."""
    return line[i] in "-+" and i == 0 or line[i] in ".)" and line[:i].isdigit() and not line[i + 1 : i + 2].strip()


def _makes_address(before: str, character: str, after: str) -> bool:
    """Whether renderers look for an address here: www.x, x.com, http://x."""
    if character == ":":
        return after not in ("", " ")
    return character == "." and after not in ("", " ") and (before.isalpha() or after.isalpha())


def code_span(text: object, limit: int | None = MAX_SHOWN, *, cell: bool = False) -> str:
    """A Markdown code span that holds the text and nothing beside it.

    Args:
        text (`object`): Shown as `str(text)`.
        limit (`int`, *optional*, defaults to 200): See `plain_line`.
        cell (`bool`, defaults to `False`): Whether it stands in a table, where `|` ends a cell even in code.
    """
    line = plain_line(text, limit)
    if cell:
        line = line.replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if not line or line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{pad}{line}{pad}{fence}"
