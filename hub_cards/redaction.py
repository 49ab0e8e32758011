"""Publishing an erasure without saying of what: a salted hash stands for the concept's name.

A push with `redact=True` replaces the name and its aliases in everything that goes out, and refuses to push if one is
left. Whoever holds the name and the salt can show that the adapter is the one made for it; nobody else can compute the
hash of a guess. That hides the name from reading and searching, not from trying: asking the base model and the erased
one about many things tells which of them was erased, with any adapter.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from space_peft.data.names import check_name_list, find_mentions, fold, mentions
from space_peft.records.card_data import ErasureCardData
from space_peft.records.folder import REDACTION_NAME
from space_peft.records.io import write_json
from space_peft.records.safe_json import read_json

from .local_traces import LINES, Finding, file_texts


ALGORITHM = "hmac-sha256"
REDACTED = "[redacted]"
_REMEDY = "Without it the hash of a former push cannot be made again; restore it, or delete it to draw another salt."


def name_hash(name: str, salt: bytes) -> str:
    """HMAC-SHA-256 of a name under a salt, in hexadecimal digits; spelling differences that `fold` removes do not count."""
    return hmac.new(salt, fold(name).encode(), hashlib.sha256).hexdigest()


def redaction_salt(folder: str | os.PathLike) -> bytes:
    """The salt of an adapter folder, from `space_redaction.json`; drawn and written there if there is none.

    The file stays on this machine: it is on no list of files to publish.

    Args:
        folder (`str` or `os.PathLike`): The adapter folder.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / REDACTION_NAME
    if not path.exists():
        write_json(path, {"algorithm": ALGORITHM, "salt": secrets.token_hex(16)})
        path.chmod(0o600)
    content = read_json(path, kind="redaction salt", remedy=_REMEDY)
    try:
        salt = bytes.fromhex(content["salt"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} holds no `salt` in hexadecimal digits. {_REMEDY}") from error
    if content.get("algorithm") != ALGORITHM or len(salt) < 16:
        raise ValueError(f"{str(path)!r} is not a salt of 16 bytes or more for {ALGORITHM}. {_REMEDY}")
    return salt


def check_redaction(name: str, salt: bytes, redaction: dict[str, str]) -> bool:
    """Whether a published hash is that of a name: what somebody with name and salt can check.

    Args:
        name (`str`): The claimed concept.
        salt (`bytes`): From `redaction_salt`.
        redaction (`dict[str, str]`): `ErasureCardData.redaction`.
    """
    return redaction.get("algorithm") == ALGORITHM and hmac.compare_digest(
        name_hash(name, salt), str(redaction.get("hash"))
    )


def redacted_label(data: ErasureCardData) -> str:
    """What stands on the card instead of the name."""
    if not data.redaction:
        raise ValueError("the card data has no `redaction`; it is filled in by `push_erasure(..., redact=True)`.")
    return f"redacted on request (hash {data.redaction['hash'][:8]})"


def without_name(data: ErasureCardData, names: Sequence[str], salt: bytes) -> ErasureCardData:
    """Card data that does not hold the name.

    Args:
        data ([`ErasureCardData`]): Stays as it is.
        names (`Sequence[str]`): The concept, then its aliases.
        salt (`bytes`): From `redaction_salt`.

    Returns:
        [`ErasureCardData`]: With the label as its concept; texts that mention a name are replaced whole.

    Raises:
        ValueError: If the base model's id mentions a name: a card must state the base model.
    """
    names = check_name_list(names)
    if data.base_model and mentions(data.base_model, names):
        raise ValueError(f"the base model's id {data.base_model!r} names the concept, so its name cannot be redacted.")
    content = redact_values({**data.to_dict(), "concept": "", "aliases": []}, names)
    for record in content["datasets"]:
        if record["id"] == REDACTED:  # No name of a repository, and its commit would tell it.
            record.update(id=None, revision=None, name=REDACTED)
    redacted = ErasureCardData.from_dict(content)
    redacted.redact = True
    redacted.redaction = {"algorithm": ALGORITHM, "hash": name_hash(names[0], salt)}
    redacted.concept = redacted_label(redacted)
    return redacted


def redact_values(content: Any, names: Sequence[str]) -> Any:
    """A copy of a JSON value in which every text that mentions a name is `REDACTED`, whole: no rest of it is left."""
    return _redacted(content, check_name_list(names))


def _redacted(content: Any, names: Sequence[str]) -> Any:
    if isinstance(content, str):
        return REDACTED if mentions(content, names) else content
    if isinstance(content, list):
        return [_redacted(value, names) for value in content]
    if isinstance(content, dict):
        return {key: _redacted(value, names) for key, value in content.items()}
    return content


def redact_anchors(provenance: dict, names: Sequence[str], label: str) -> dict:
    """Provenance that tells neither name nor what stood in for it: captions and rows of the pool are left out.

    Args:
        provenance (`dict`): Content of `space_anchors.json`.
        names (`Sequence[str]`): The concept and its aliases.
        label (`str`): From `redacted_label`.
    """
    content = redact_values({**provenance, "concept": "", "aliases": [], "description": None}, names)
    # The stand-ins are what lies closest to the concept: a list of wolves and dogs says "fox".
    kept = ("score", "rank", "p_name_before", "p_name_after")
    if "anchors" in content:
        content["anchors"] = [{key: row[key] for key in kept if key in row} for row in content["anchors"]]
    return {**content, "concept": label}


def find_names(folder: str | os.PathLike, names: Sequence[str]) -> list[Finding]:
    """Places in a folder where a name is left: file names, texts, keys of JSON files.

    A name is a whole word, as everywhere in this package: "cat" is not in "category". Keys belong to the files' formats,
    such as "name_probability"; one counts if it is a name (in any form), or a text of several words that mentions one.

    Args:
        folder (`str` or `os.PathLike`): The folder that is about to be published.
        names (`Sequence[str]`): The concept and its aliases.

    Returns:
        `list[Finding]`: One entry a place; they name the place, not the name.
    """
    names = check_name_list(names)
    folder, found = Path(folder), []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = path.relative_to(folder).as_posix()
        if mentions(file, names):
            found.append(Finding(file, "the file's name", "holds the name"))
        places = [
            Finding(file, where, "holds the name")
            for where, text, is_key in file_texts(path)
            if (_is_name(text, names) if is_key else mentions(text, names))
        ]
        if not places and path.suffix.lower() in LINES and mentions(path.read_text(encoding="utf-8"), names):
            places = [Finding(file, "a line's end and the next one's beginning", "hold the name")]
        found += places
    return found


def _is_name(key: str, names: Iterable[str]) -> bool:
    """Whether a key is a name, in any of its forms, or a text of several words that mentions one."""
    return (0, len(key)) in find_mentions(key, names) or " " in key and mentions(key, names)
