"""How a name can be written, and the token sequences a tokenizer writes it with.

`space_peft.data.names.find_mentions` finds every form that is listed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

from .names import (
    APOSTROPHES,
    HYPHENS,
    check_concept,
    clean_name,
    dots_may_go,
    name_pieces,
    number_forms,
    without_accents,
)
from .written_tokens import Writing


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_FORMS = 64
_APOSTROPHE = re.compile(f"[{APOSTROPHES}]")
# What a name's blanks, and its hyphens and other separators, are written as; None leaves them.
_SEPARATIONS = ((None, None), (None, " "), ("", ""), (None, ""), (None, "\u2011"), ("-", None), (None, "\u2013"))
# A line may begin with one of these, and a name directly behind it.
_MARKS = ('"', "\u201c", "'", "(", "*")
_INITIALS = (None, (". ", "."), (".", "."), ("", ""))  # As given, "J. K.", "J.K.", "JK".


def _title(text: str) -> str:
    return re.sub(rf"(^|[\s{HYPHENS[1:]}-])(\w)", lambda match: match[1] + match[2].upper(), text)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:].lower()


_CASES: tuple[tuple[int, Callable[[str], str]], ...] = (
    (0, str),
    (1, str.lower),
    (1, _capitalised),
    (1, _title),
    (2, str.upper),
)


def _spelling(name: str, separation: tuple, initials: tuple | None, apostrophe: str | None) -> str:
    """A name with other separators, initials and apostrophes; None leaves them as given."""
    pieces, written = name_pieces(name), []
    for i, (kind, text) in enumerate(pieces):
        if kind == "separator":
            other = separation[0 if text.isspace() or not text else 1]
            digits = pieces[i - 1][1][-1].isdecimal() and pieces[i + 1][1][0].isdecimal()
            if other is not None and not (digits and not other):  # "7-11" is not "711".
                text = other
            elif not text and initials is not None:
                text = " "  # "J.K.Rowling" as "JK Rowling".
        elif kind == "initials" and initials is not None and (initials[0] or dots_may_go(pieces)):
            text = initials[0].join(filter(str.isalpha, text)) + initials[1]
        elif kind == "abbreviation" and initials == ("", "") and dots_may_go(pieces):
            text = text[:-1]
        written.append(text)
    name = "".join(written)
    if apostrophe is not None and len(name) > 1:  # One at an edge is part of the name.
        name = name[0] + _APOSTROPHE.sub(apostrophe, name[1:-1]) + name[-1]
    return name


@lru_cache(maxsize=4096)
def written_forms(name: str) -> tuple[str, ...]:
    """How a name can be written.

    In singular and plural; as given, in lower case, capitalised, in Title Case and in capitals; with hyphens, blanks or
    nothing between its words; with initials with and without dots and blanks; with a straight, a curly or no apostrophe;
    without its accents. The more a form differs from the name as given, the later it comes.

    Args:
        name (`str`): One name of a concept. Inflected forms of languages other than English are names of their own.

    Returns:
        `tuple[str, ...]`: At most `MAX_FORMS` distinct forms, the name as given first.

    Raises:
        TypeError: If the name is no string.
        ValueError: If it is no name (see `check_concept`).
    """
    given = check_concept(name)
    cleaned = clean_name(given)
    accents: tuple[Callable[[str], str], ...] = (str, without_accents)
    ways = product(
        enumerate(number_forms(cleaned) if cleaned else ()),  # "\u2122" alone leaves nothing.
        _CASES,
        enumerate(accents),
        enumerate(_SEPARATIONS),
        enumerate((None, "'", "\u2019", "")),
        enumerate(_INITIALS),
    )
    spelled: dict[str, int] = {given: -1}
    for (a, number), (b, case), (c, accented), (d, separation), (e, apostrophe), (f, initials) in ways:
        # The case is set first: "EiffelTower" is the Title Case of "eiffel tower", joined.
        form = _spelling(accented(case(number)), separation, initials, apostrophe)
        spelled[form] = min(spelled.get(form, 99), a + b + c + d + e + f)
    return tuple(sorted(spelled, key=spelled.__getitem__)[:MAX_FORMS])


def surface_forms(names: str | Iterable[str], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """Every token sequence with which a tokenizer writes one of the `written_forms` of the names.

    At the start of an answer and inside it, behind a blank and without one, and with a quotation mark, bracket or asterisk
    before it where a token holds both. A sequence with the unknown token writes no name and is left out. A name that is an
    added token ("<bo>") is that one token, special or not.

    Args:
        names (`str` or `Iterable[str]`): The concept's name, or its names.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.

    Returns:
        `tuple[tuple[int, ...], ...]`: Distinct sequences of token ids, most usual first.

    Raises:
        TypeError: If a name is no string.
        ValueError: If there is no name, or the tokenizer can write no form of one of them.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise ValueError("there is no name to write as tokens; pass the concept's name, or a list of its names.")
    unknown, writing = getattr(tokenizer, "unk_token_id", None), Writing(tokenizer)
    found: dict[tuple[int, ...], None] = {}
    for name in names:
        forms = written_forms(name)
        ways = [sequence for form in forms for sequence in _sequences(form, writing)]
        ways += [writing.merged(mark, form) for form in forms for mark in _MARKS]
        sequences = [sequence for sequence in ways if sequence and unknown not in sequence]
        if not sequences:
            raise ValueError(
                f"the tokenizer can write no form of the name {name!r}: each one holds its unknown token. Pass the name "
                "the model answers with, or one in the tokenizer's vocabulary, and add further ones as `aliases`."
            )
        found.update(dict.fromkeys(sequences))
    return tuple(found)


def _sequences(form: str, writing: Writing) -> list[tuple[int, ...]]:
    """One form at a text's start, behind a blank, and directly behind another character."""
    behind_blank = writing.behind(f" {form}") or writing.alone(f" {form}")
    return [writing.alone(form), behind_blank, writing.behind(form)]
