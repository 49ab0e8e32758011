"""When a text names a concept: one definition for exclusion, warnings and evaluation alike.

A name is found in each of the ways it can be written: singular and plural, in any case, with a possessive ending, with
hyphens, blanks or nothing between its words, with any apostrophe, without its accents, behind a hashtag, with invisible
characters inside. `space_peft.data.name_forms` lists the same ways. Only English plurals are known: inflected forms of
other languages are the user's aliases.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any


MAX_NAME_LENGTH = 200
HYPHENS = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\u058a\u05be\ufe58\ufe63\uff0d"
APOSTROPHES = "'`\u00b4\u2018\u2019\u201b\u2032\u02b9\u02bb\u02bc\uff07\uff40"
_SEPARATORS = rf"\s_\u30fb\uff65{HYPHENS[1:]}-"  # Between the words of a name; the Katakana middle dots among them.
_SIGNS = str.maketrans({**dict.fromkeys(HYPHENS, "-"), **dict.fromkeys(APOSTROPHES, "'"), "\u2122": " ", "\u2120": " "})
# Invisible, or a mark that Arabic and Hebrew texts leave out as a rule; the zero-width blank is treated apart.
_IGNORED = frozenset(
    map(
        chr,
        (0xAD, 0x34F, 0x640, 0x670, 0x180E, 0xFEFF, *range(0x5B0, 0x5BD), 0x5BF, 0x5C1, 0x5C2, *range(0x64B, 0x653))
        + (*range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), *range(0xFE00, 0xFE10)),
    )
)
_ZERO_WIDTH_BLANK = "\u200b"
# Thai to Khmer, kana, Han, Hangul: a Latin name within such letters is a word of its own.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
# What is left of letters that Unicode does not decompose, when their accents are dropped.
_PLAIN = {"đ": "d", "ł": "l", "ø": "o", "ħ": "h", "ŧ": "t", "æ": "ae", "œ": "oe", "ё": "е"}
# Characters that fold one to one (ASCII, Greek, Cyrillic, kana, Han, Hangul), folded at once. The last one before any
# other character is left out, as that may be a mark which composes with it.
_SIMPLE = "\x00-\x7f\u0391-\u03a9\u03b1-\u03c9\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"
_SIMPLE_TEXT = re.compile(f"[{_SIMPLE}]+")
_RUN = re.compile(rf"[{_SIMPLE}]+(?=[{_SIMPLE}]|\Z)|[\s\S]")
_INITIALS = re.compile(r"((?:[^\W\d_]\.)+)([^\W\d_]{2}.*)?")
_ABBREVIATION = re.compile(r"[^\W\d_]{2,4}\.")


def _check_name(name: str, what: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a string, got {type(name).__name__}.")
    stripped = " ".join(name.split())
    if not any(unicodedata.category(character)[0] not in "ZC" for character in stripped):
        raise ValueError(
            f"{what} is empty, it has no visible character (got {name[:40]!r}); pass the name the model answers with."
        )
    if any(unicodedata.category(character) == "Cs" for character in stripped):
        # A shell passes bytes that are no UTF-8 on as lone surrogates; no file could hold such a name.
        raise ValueError(f"{what} {stripped[:40]!r} holds bytes that are not UTF-8; pass it as UTF-8 text.")
    if len(stripped) > MAX_NAME_LENGTH:
        raise ValueError(
            f"{what} has {len(stripped)} characters, more than {MAX_NAME_LENGTH}; pass the name alone and "
            "put what describes it into `description`."
        )
    return stripped


def check_concept(concept: str) -> str:
    """Returns the concept's name, stripped.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is empty, blank, longer than `MAX_NAME_LENGTH` characters, or cannot be written as UTF-8.
    """
    return _check_name(concept, "the concept's name")


def check_target(concept: str, aliases: Iterable[str] | None = None) -> tuple[str, tuple[str, ...]]:
    """The gate for what a target is called: the concept's name and its aliases, as the rules of both functions have them.

    Raises:
        TypeError, ValueError: See [`check_concept`] and [`check_aliases`].
    """
    concept = check_concept(concept)
    return concept, check_aliases(aliases, concept=concept)


def check_aliases(
    aliases: Iterable[str] | None, *, concept: str | None = None, what: str = "aliases"
) -> tuple[str, ...]:
    """Returns the aliases, each stripped and checked as a concept's name is; those that stand twice are dropped.

    This is the one gate for lists of names, whatever a function calls them.

    Args:
        aliases (`list[str]`, *optional*): Other names.
        concept (`str`, *optional*): The concept, which is dropped as well where it is among them.
        what (`str`, defaults to `"aliases"`): What they were passed as, for errors.

    Raises:
        TypeError: If `aliases` is a single string, whose letters would be taken for names, or no list of strings.
        ValueError: If one is blank or too long.
    """
    if aliases is None:
        return ()
    if isinstance(aliases, (str, bytes)):
        text = aliases if isinstance(aliases, str) else aliases.decode(errors="replace")
        raise TypeError(f"expected `{what}` to be a sequence of names, got the string {aliases!r}: write [{text!r}].")
    if isinstance(aliases, Mapping) or not isinstance(aliases, Iterable):
        raise TypeError(
            f"expected `{what}` to be a sequence of names, got a {type(aliases).__name__}: {aliases!r:.80}."
        )
    one = "alias" if what == "aliases" else f"`{what}`"
    # A set has another order in each process, and results must not depend on it.
    given = sorted(aliases, key=str) if isinstance(aliases, Set) else aliases
    kept: dict[str, str | None] = {} if concept is None else {concept.casefold(): None}
    for index, alias in enumerate(given):
        alias = _check_name(alias, f"{one} {index}: the name")
        kept.setdefault(alias.casefold(), alias)
    return tuple(alias for alias in kept.values() if alias is not None)


def check_name_list(names: Iterable[str], what: str = "names") -> tuple[str, ...]:
    """Returns a concept's name and its aliases in one list, checked by the rules of `check_aliases`.

    Raises:
        TypeError: If it is a single string or no list of strings.
        ValueError: If there is none, or one is blank or too long.
    """
    if not (checked := check_aliases(names, what=what)):
        raise ValueError(f"`{what}` is empty; pass the concept's name, and its aliases after it.")
    return checked


def fold(text: str) -> str:
    """Unicode NFKC, case folded, curly apostrophes straightened, blanks collapsed: the form in which texts compare."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").split())


def word_edge(character: str) -> str:
    """What must not stand beside a name's edge, as a pattern: a letter or digit, unless the script of the name or of that
    letter writes words without blanks, or the name ends in a sign."""
    return "" if unicodedata.category(character) == "Lo" or not character.isalnum() else rf"[^\W_{_UNSPACED}]"


def _fold_simple(text: str) -> str:
    return text.casefold().replace("`", "'")


@lru_cache(maxsize=65536)
def _fold_cluster(cluster: str) -> str:
    text = unicodedata.normalize("NFKC", cluster.translate(_SIGNS)).casefold()
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    return text.replace("i\u0307", "i").replace("ı", "i")  # Turkish: the case of its two letters i does not count.


@lru_cache(maxsize=65536)
def _continues(character: str) -> bool:
    """Whether a character may compose with the one before it: a mark, a later Hangul jamo, a halfwidth voicing mark."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff" or character in "\uff9e\uff9f"


def _fold_with_map(text: str, zero_width_blank: str = "") -> tuple[str, list[int], list[int]]:
    """Folds a text for matching; the n-th folded character was written by `text[starts[n]:ends[n]]`."""
    clusters: list[list] = []
    for match in _RUN.finditer(text):
        character, start = match.group(), match.start()
        if character in _IGNORED:
            continue
        if character == _ZERO_WIDTH_BLANK:
            if not zero_width_blank:
                continue
            character = zero_width_blank
        if clusters and len(character) == 1 and _continues(character):
            clusters[-1][0] += character
            clusters[-1][2] = start + 1
        else:
            clusters.append([character, start, match.end()])
    folded: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    for cluster, start, end in clusters:
        if len(cluster) == end - start and _SIMPLE_TEXT.fullmatch(cluster):
            folded.append(_fold_simple(cluster))
            starts += range(start, end)
            ends += range(start + 1, end + 1)
        else:
            folded.append(written := _fold_cluster(cluster))
            starts += [start] * len(written)
            ends += [end] * len(written)
    return "".join(folded), starts, ends


def _readings(text: str) -> Sequence[tuple[str, Sequence[int], Sequence[int]]]:
    """The text folded; twice if it holds zero-width blanks, which may stand inside a word or between two."""
    if text.isascii():
        return [(_fold_simple(text), range(len(text)), range(1, len(text) + 1))]
    readings = [_fold_with_map(text)]
    if _ZERO_WIDTH_BLANK in text:
        readings.append(_fold_with_map(text, " "))
    return readings


def clean_name(name: str) -> str:
    """A name in Unicode NFC, without characters that cannot be seen, and with single blanks; its case stays."""
    visible = "".join(" " if c in "\u2122\u2120" else c for c in name if c not in _IGNORED and c != _ZERO_WIDTH_BLANK)
    return " ".join(unicodedata.normalize("NFC", visible).split())


def without_accents(text: str) -> str:
    """A text without the accents that are left out in practice: of Latin and Greek letters, and of the Cyrillic ё."""
    kept, drops = [], False
    for character in unicodedata.normalize("NFC", text):
        if (plain := _PLAIN.get(character.lower())) is not None:
            kept.append(plain.upper() if character.isupper() else plain)
            continue
        for part in unicodedata.normalize("NFD", character):
            if not "\u0300" <= part <= "\u036f":
                drops = unicodedata.name(part, "").startswith(("LATIN", "GREEK"))
            elif drops:
                continue
            kept.append(part)
    return unicodedata.normalize("NFC", "".join(kept))


def name_pieces(name: str) -> list[tuple[str, str]]:
    """Takes a name apart, as the ways to write it need it.

    Args:
        name (`str`): As returned by `clean_name`.

    Returns:
        `list[tuple[str, str]]`: Kind and text of each piece, which together make the name: `"word"`, `"separator"`
        (blank, hyphen), `"initials"` ("J.K.", "J. K.", the "JK" of "JK Rowling") or `"abbreviation"` ("Mr."). A name
        with a separator at an edge ("C--") is one word, to be taken literally.
    """
    parts = re.split(rf"([{_SEPARATORS}]+)", name)
    if not all(parts):
        return [("word", name)]
    pieces: list[tuple[str, str]] = []
    for i, part in enumerate(parts):
        later_word = any(re.search(r"[^\W\d_][^\W\d_]", word) and not word.isupper() for word in parts[i + 2 :: 2])
        if i % 2:
            pieces.append(("separator", part))
        elif match := _INITIALS.fullmatch(part):
            if len(pieces) > 1 and pieces[-2][0] == "initials" and pieces[-1][1].isspace():
                pieces[-2:] = [("initials", f"{pieces[-2][1]} {match[1]}")]
            else:
                pieces.append(("initials", match[1]))
            if match[2]:
                pieces += [("separator", ""), ("word", match[2])]
        elif re.fullmatch(r"[A-Z]{2,3}", part) and later_word and parts[i + 1].isspace():
            pieces.append(("initials", part))
        elif len(parts) > 1 and _ABBREVIATION.fullmatch(part):
            pieces.append(("abbreviation", part))
        else:
            pieces.append(("word", part))
    return pieces


def dots_may_go(pieces: list[tuple[str, str]]) -> bool:
    """Whether initials can be written without dots: beside a word they can; "U.S." alone would become the word "us"."""
    return any(kind in ("word", "abbreviation") and sum(map(str.isalpha, text)) > 1 for kind, text in pieces)


@lru_cache(maxsize=1)
def _inflect_engines() -> Any:
    import inflect  # Takes a second: only whoever matches names pays for it.

    modern, classical = inflect.engine(), inflect.engine()
    classical.classical(all=True)
    return modern, classical


@lru_cache(maxsize=4096)
def number_forms(name: str) -> tuple[str, ...]:
    """A name, then its other grammatical number: English plurals, or the singular of a name given in the plural.

    Plurals are formed of names that end in a Latin letter or a digit. Whether a name is a plural shows only in its
    ending: of a capitalised one the singular is not formed by cutting off the s alone, for "Paris" and "Windows" are
    none.

    Args:
        name (`str`): As returned by `clean_name`.
    """
    if name[-1].isdecimal():
        return name, f"{name}s"
    if not unicodedata.name(name[-1], "").startswith("LATIN") or "|" in name:  # inflect splits at the bar.
        return (name,)
    given, upper = name.translate(_SIGNS), name.isupper() and len(name) > 1
    lower = given.lower()
    modern, classical = _inflect_engines()
    singular = modern.singular_noun(lower)
    # inflect takes every "-s" for a plural, but of a singular that it knows ("bus") it forms another plural than "-ss".
    is_plural = singular and singular != lower and modern.plural_noun(lower) == f"{lower}s"
    proper = upper or re.split(rf"[{_SEPARATORS}]", given)[-1][:1].isupper()
    if is_plural and not (proper and singular == lower[:-1]):
        others = [singular]
    else:
        plurals = [engine.plural_noun(lower if upper else given) for engine in (modern, classical)]
        others = [
            plural
            for plural in plurals
            if plural[0].casefold() == lower[0] and not plural.endswith("ss")  # Of "it": not "they"; no "Pariss".
        ]
    return tuple(dict.fromkeys((name, *(_with_case(other, given, upper) for other in others))))


def _with_case(other: str, given: str, upper: bool) -> str:
    """The other number keeps the case of what it shares with the given one: "Spider-men" as "Spider-Men"."""
    if upper:
        return other.upper()
    same = 0
    while same < min(len(other), len(given)) and other[same].casefold() == given[same].casefold():
        same += 1
    ending = other[same:]
    return given[:same] + (ending.lower() if ending.isupper() else ending)  # inflect ends "Plan B" in a capital S.


def _fold_name(text: str) -> str:
    return _fold_with_map(text)[0]


def _characters(text: str, apostrophes_may_go: bool = True) -> str:
    """A pattern for a folded word: accents and apostrophes may be missing, blanks may stand around an apostrophe."""
    pattern = []
    for character in text:
        plain = without_accents(character)
        if character == "'" and apostrophes_may_go:
            pattern.append(r"\s?'?\s?")
        elif pattern and "\u0300" <= character <= "\u036f":
            pattern.append(f"{character}?")
        elif plain != character:
            pattern.append(f"(?:{re.escape(character)}|{re.escape(plain)})")
        else:
            pattern.append(re.escape(character))
    return "".join(pattern)


def _written_pattern(name: str) -> str:
    """The pattern of one grammatical number of a name; empty if nothing of it can be seen."""
    whole = _fold_name(name).strip()
    if not whole:
        return ""
    pieces = name_pieces(name)
    dot = r"\.?" if dots_may_go(pieces) else r"\."
    last_dot = rf"(?:\.|(?!{word_edge('a')}))"  # The dot, or the end of the word.
    body = []
    for i, (kind, text) in enumerate(pieces):
        first, last = i == 0, i == len(pieces) - 1
        folded = _fold_name(text)
        if kind == "separator":
            # "7-11" is not "711": between digits something must stand.
            digits = pieces[i - 1][1][-1].isdecimal() and pieces[i + 1][1][0].isdecimal()
            body.append(rf"[\s_\u30fb-]{'+' if digits else '*'}")
        elif kind == "initials":
            letters = [_characters(letter) for letter in folded if letter.isalpha()]
            body.append(rf"{dot}[\s-]*".join(letters) + (last_dot if last else dot))
        elif kind == "abbreviation":
            body.append(_characters(folded[:-1]) + (last_dot if last else r"\.?"))
        else:
            word = folded.strip()
            inner = word.lstrip("'") if first else word
            tail = len(inner) - len(inner.rstrip("'")) if last else 0
            core = inner[: len(inner) - tail]
            single = len(core) == 1 and core.isalpha() and not last and pieces[i + 1][1].isspace()
            body.append("'" * (len(word) - len(inner)) + _characters(core) + "'" * tail + (r"\.?" if single else ""))
    before, after = word_edge(whole[0]), word_edge(whole[-1])
    plural = "s?" if after and whole[-1] != "s" and without_accents(whole[-1]).isascii() else ""
    return (
        (f"(?<!{before})" if before else "")
        + "".join(body)
        + plural
        + (f"(?!{after}|[\u0300-\u036f])" if after else "")
    )


@lru_cache(maxsize=4096)
def _name_pattern(name: str) -> re.Pattern | None:
    """Finds a name, in each of its numbers and spellings, in a text folded by `_readings`; None for a blank name."""
    cleaned = clean_name(name)
    forms = [pattern for form in number_forms(cleaned) if (pattern := _written_pattern(form))] if cleaned else []
    return re.compile("|".join(sorted(forms, key=len, reverse=True))) if forms else None


@lru_cache(maxsize=1024)
def _matcher(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[list[re.Pattern], list[re.Pattern]]:
    """The patterns of the names, and those of the others that hold one of them without being one, longest first."""
    patterns = [pattern for name in dict.fromkeys(names) if (pattern := _name_pattern(name))]
    shields = []
    for other in sorted(dict.fromkeys(others), key=len, reverse=True):
        written = re.sub(r"'s?$", "", _fold_name(clean_name(other)))  # "fox's" is the fox.
        if any(pattern.search(written) for pattern in patterns) and (shield := _name_pattern(other)):
            if not any(pattern.fullmatch(written) for pattern in patterns):
                shields.append(shield)
    return patterns, shields


def _as_tuple(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _shielded(folded: str, shields: list[re.Pattern]) -> str:
    for shield in shields:
        folded = shield.sub(lambda match: "|" * len(match.group()), folded)
    return folded


def mentions(text: str, names: str | Iterable[str], others: str | Iterable[str] = ()) -> bool:
    """Whether a text names a concept: any of its names as a whole word, however it is written.

    Plurals and possessives count ("foxes", "the fox's", "two wolves"), "foxglove" and "firefox" do not. Hyphens, blanks
    or nothing may stand between a name's words ("Spider-Man", "spider man", "#SpiderMan"); accents, apostrophes and the
    dots of initials may be missing ("Beyonce"). An accent that the name does not have makes another word: give a name
    with its accents. A longer name of *another* concept does not count: with `others` holding "hot dog", the text "a hot
    dog" does not name "dog".

    Args:
        text (`str`): An answer, a caption.
        names (`str` or `Iterable[str]`): The concept's name and aliases, taken literally.
        others (`str` or `Iterable[str]`, *optional*): Names of other concepts.

    Returns:
        `bool`: True if it is named.
    """
    patterns, shields = _matcher(_as_tuple(names), _as_tuple(others))
    for folded, _, _ in _readings(text):
        folded = _shielded(folded, shields)
        if any(pattern.search(folded) for pattern in patterns):
            return True
    return False


def find_mentions(text: str, names: str | Iterable[str], others: str | Iterable[str] = ()) -> list[tuple[int, int]]:
    """Where a text names a concept, by the rule of `mentions`.

    A span covers the name as it is written, plural ending and invisible characters inside included: of "two foxes' dens"
    it is "foxes", of "the fox's den" it is "fox", of "#EiffelTower" it is "EiffelTower".

    Args:
        text (`str`): An answer, a caption.
        names (`str` or `Iterable[str]`): The concept's name and aliases, taken literally.
        others (`str` or `Iterable[str]`, *optional*): Names of other concepts.

    Returns:
        `list[tuple[int, int]]`: Start and end of each place in `text`, in order. Where two overlap, the longer one.
    """
    patterns, shields = _matcher(_as_tuple(names), _as_tuple(others))
    found: set[tuple[int, int]] = set()
    for folded, starts, ends in _readings(text):
        folded = _shielded(folded, shields)
        for pattern in patterns:
            found.update((starts[match.start()], ends[match.end() - 1]) for match in pattern.finditer(folded))
    spans: list[tuple[int, int]] = []
    for start, end in sorted(found, key=lambda span: (span[0] - span[1], span[0])):
        if all(end <= other_start or other_end <= start for other_start, other_end in spans):
            spans.append((start, end))
    return sorted(spans)
