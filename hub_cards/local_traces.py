"""What a folder says about the machine it was made on, and must not when it is published."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_token


# A path from the root. Not after a letter, a dot or a slash ("and/or", "./x", "https://"), nor after "<" ("</s>").
_PATH = re.compile(r"(?<![\w./:<>~*\\)\]-])/([\w.+-]+)(?:/[\w.+@~-]*)*")
_OTHER_PATHS = re.compile(r"(?<!\w)(?:[A-Za-z]:\\+\w|~[\w-]*/\w|file:/|\\\\\\*\w+\\+\w)")
_HUB_TOKEN = re.compile(r"(?<!\w)hf_[A-Za-z0-9]{16,}")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|PRIVATE_KEY|CREDENTIAL", re.IGNORECASE)
# First folders of paths on other people's machines: a run may have been made on one of them.
_ROOTS = {"home", "Users", "root", "mnt", "media", "tmp", "scratch", "workspace", "kaggle", "gpfs", "lustre", "private"}
_MIN_SECRET = 12
LINES = (".md", ".jinja", ".txt")
"""Suffixes of files that are read by line."""


@dataclass(frozen=True)
class Finding:
    """
    A place in a file.

    Args:
        file (`str`): Its path inside the folder.
        where (`str`): Key of a JSON file, such as "settings.SpaceConfig.output_dir", or "line 12".
        what (`str`): What stands there, as an error may say it: never the secret itself.
    """

    file: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.where} {self.what}"


def texts(content: Any, where: str = "") -> Iterator[tuple[str, str, bool]]:
    """Every text of a JSON value, as `(key path, text, whether it is a key)`."""
    if isinstance(content, str):
        yield where or "the text", content, False
    elif isinstance(content, dict):
        for key, value in content.items():
            place = f"{where}.{key}" if where else key
            yield place, key, True
            yield from texts(value, place)
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from texts(value, f"{where}[{i}]")


def file_texts(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Every text of a file that people or JSON readers read; nothing of a binary one.

    The header of a safetensors file counts, its numbers do not.
    """
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        yield from texts(header.get("__metadata__", {}), "metadata")
        yield from (("a tensor's name", name, True) for name in header)
    elif suffix == ".json":
        yield from texts(json.loads(path.read_text(encoding="utf-8")))
    elif suffix == ".jsonl":
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield from ((f"line {i}, {where}", text, key) for where, text, key in texts(json.loads(line)))
    elif suffix in LINES:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        yield from ((f"line {i}", line, False) for i, line in enumerate(lines, 1))


def local_trace(text: str, *, paths: bool = True) -> str | None:
    """What a text says about this machine, in words; `None` if it says nothing.

    Looked for are Hub tokens, values of environment variables that hold secrets, the host's name, and absolute paths: of
    this machine, or below a folder that users have on others. A user's name counts where it stands in a path only: it may
    be an ordinary word, and it is often the name on the Hub.

    Args:
        text (`str`): Any text.
        paths (`bool`, defaults to `True`): Whether to look for paths other than the home and the current directory's; a
            vocabulary holds pieces like "/usr".
    """
    if _HUB_TOKEN.search(text) or any(secret in text for secret in _secrets()):
        return "holds a token or another secret of the environment"
    host = socket.gethostname()
    # "lemon" may be a host and a fruit: a name with a digit or a hyphen is no word of a text.
    if len(host) >= 6 and re.search(r"[\d-]", host) and host in text:
        return "holds the name of this machine"
    for folder in {str(Path.home()), str(Path.cwd())}:
        if folder.count("/") > 1 and re.search(re.escape(folder) + r"(?![\w.-])", text):
            return "holds a path of this machine"
    if paths:
        for match in _PATH.finditer(text):
            if match[1] in _ROOTS or os.path.lexists("/" + match[1]):
                return f"holds the local path {match[0][:60]!r}"
        if other := _OTHER_PATHS.search(text):
            return f"holds a local path ({text[other.start() : other.start() + 40]!r})"
    return None


def _secrets() -> set[str]:
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)} | {get_token() or ""}
    return {value for value in values if len(value) >= _MIN_SECRET and not value.startswith("/")}


def find_local_traces(folder: str | os.PathLike, *, vocabularies: tuple[str, ...] = ()) -> list[Finding]:
    """Looks through every text file of a folder with `local_trace`.

    Args:
        folder (`str` or `os.PathLike`): The folder that is about to be published.
        vocabularies (`tuple[str]`, *optional*): Names of files that hold pieces of words.

    Returns:
        `list[Finding]`: One entry a place.
    """
    folder, found = Path(folder), []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        for where, text, _ in file_texts(path):
            if what := local_trace(text, paths=path.name not in vocabularies):
                found.append(Finding(path.relative_to(folder).as_posix(), where, what))
    return found
