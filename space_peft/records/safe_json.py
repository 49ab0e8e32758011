"""Reading files that somebody else may have written: JSON within limits, and paths that stay in their folder."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn


MAX_BYTES = 32 * 2**20
MAX_DEPTH = 64
# In memory a value is up to thirty times as long as its text ("[]," is a list of 56 bytes, and 8 for its place).
MAX_VALUES = 2_000_000
_LONGEST_INTEGER = 1000
_SURROGATE = re.compile("[\ud800-\udfff]")

_TYPE_NAMES = {
    dict: "a JSON object", list: "a JSON list", str: "a string", int: "a number", float: "a number", bool: "a boolean",
    type(None): "null",
}  # fmt: skip


def read_json(
    path: str | os.PathLike,
    *,
    kind: str,
    expected: type = dict,
    max_bytes: int = MAX_BYTES,
    max_values: int = MAX_VALUES,
    remedy: str = "Download or write the file again.",
) -> Any:
    """Reads a JSON file strictly: whatever two readers could understand differently is refused.

    Time grows with the file's length and no faster, memory is bounded by `max_bytes` and `max_values`.

    Args:
        path (`str` or `os.PathLike`): The file.
        kind (`str`): What the file is to a user, for error messages, e.g. "retention certificate".
        expected (`type`, defaults to `dict`): Of the whole content: `dict` or `list`.
        max_bytes (`int`, defaults to `MAX_BYTES`): Largest file that is read at all.
        max_values (`int`, defaults to `MAX_VALUES`): Most values it may hold, counted before they are made: all commas,
            colons and opening brackets, those in texts as well.
        remedy (`str`, *optional*): What to do about a bad file, the last sentence of every error.

    Returns:
        `dict` or `list`: The content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is larger than `max_bytes`, not UTF-8 or not JSON; holds a key twice in one object, NaN,
            a number beyond float64 or of a thousand digits, or half of a surrogate pair; has too many values; is nested deeper than `MAX_DEPTH`; or its top level is
            not `expected`.
    """
    path = Path(path)
    where = f"the {kind} {str(path)!r}"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {kind} at {str(path)!r}. {remedy}")
    with path.open("rb") as file:
        # The size is that of what is read, not of what `stat` says: the file may grow, or be a pipe.
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ValueError(f"{where} is larger than {max_bytes} bytes, more than such a file ever is. {remedy}")
    return parse_json(raw, where=where, expected=expected, remedy=remedy, max_values=max_values)


def parse_json(raw: bytes, *, where: str, expected: type = dict, remedy: str = "", max_values: int = MAX_VALUES) -> Any:
    """`read_json` for bytes at hand.

    Args:
        raw (`bytes`): UTF-8 JSON.
        where (`str`): Where it comes from, the beginning of every error.
        expected (`type`, defaults to `dict`): See `read_json`.
        remedy (`str`, *optional*): See `read_json`.
        max_values (`int`, defaults to `MAX_VALUES`): See `read_json`.

    Returns:
        `dict` or `list`: The content.

    Raises:
        ValueError: See `read_json`.
    """

    def refuse(problem: str, error: Exception | None = None) -> NoReturn:
        raise ValueError(f"{where} {problem}. {remedy}".rstrip()) from error

    if sum(map(raw.count, (b",", b":", b"[", b"{"))) > max_values:
        refuse(f"holds more than {max_values} values, more than such a file ever does")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8 text: {error}", error)
    try:
        content = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_short
        )
    except RecursionError as error:
        refuse(f"is nested deeper than {MAX_DEPTH} levels", error)
    except ValueError as error:  # Also json.JSONDecodeError.
        refuse(f"is not valid JSON: {error}", error)
    if not isinstance(content, expected):
        refuse(f"holds {_TYPE_NAMES[type(content)]} at its top level; expected {_TYPE_NAMES[expected]}")
    pending = [(content, 1)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_DEPTH:
            refuse(f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, str) and _SURROGATE.search(value):
            refuse(f"holds half of a surrogate pair in {value[:40]!r}")
        elif isinstance(value, dict):
            pending += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            pending += [(part, depth + 1) for part in value]
    return content


def _unique(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} appears twice in one object")
            seen.add(key)
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is beyond float64")
    return value


def _short(text: str) -> int:
    # Reading the digits of an integer takes the square of their number.
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(f"the number {text[:40]}... has {len(text)} digits")
    return int(text)


def member_path(folder: str | os.PathLike, name: str | None) -> Path:
    """The path of a file that a downloaded file names, if it lies in the folder.

    Args:
        folder (`str` or `os.PathLike`): The folder of an adapter. In huggingface_hub's cache its files are links to
            `blobs`, which count as being inside.
        name (`str`): A relative path with forward slashes, e.g. "canary/0.png". The file need not exist.

    Returns:
        `pathlib.Path`: `folder / name`.

    Raises:
        ValueError: If the name is empty, absolute, holds "..", a backslash, a colon or a control character, or leads
            out of the folder through a link.
    """
    folder = Path(folder)

    def refuse(problem: str) -> NoReturn:
        raise ValueError(
            f"{name!r:.120} {problem}; expected a relative path inside {str(folder)!r}, like 'canary/0.png'. Do not use "
            "this folder: whoever wrote it may want files outside of it to be read or overwritten."
        )

    if not isinstance(name, str) or not name:
        refuse("is not a file name")
    # A backslash or colon would mean something on Windows only: such a name is not the same file everywhere.
    if any(character in "\\:" or ord(character) < 32 or ord(character) == 127 for character in name):
        refuse("holds a backslash, a colon or a control character")
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        refuse("is an absolute path")
    if any(part in ("", ".", "..") for part in name.split("/")):
        refuse("holds an empty part, '.' or '..'")
    path = folder / name
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    target = path.resolve()
    if not any(root in target.parents for root in roots):
        refuse("is a link that leads out of the folder")
    return path
