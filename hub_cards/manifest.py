"""Hashes of everything that was published, so that a file which was changed or lost later is found, and named."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from space_peft.records.folder import CARD_NAME, MANIFEST_NAME
from space_peft.records.io import atomic_path
from space_peft.records.safe_json import member_path, read_json


_FORMAT = "space_peft.manifest.v1"
# A person may edit the card, and the Hub writes .gitattributes.
_NOT_HASHED = (CARD_NAME, ".gitattributes", MANIFEST_NAME)
# What some library would read if it stood in the folder: such a file must not appear later.
LOADABLE = {
    ".safetensors", ".json", ".py", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".gguf",
    ".onnx", ".jinja", ".model", ".txt", ".yaml", ".yml", ".so", ".dll",
}  # fmt: skip
CHECKPOINT = re.compile(r"checkpoint-\d+|last-checkpoint")
# Where `erase_several` serves each request and keeps it, in the folder of the one adapter.
REQUEST = re.compile(r"^(requests/)?\d{3}/")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Problem:
    """
    Something wrong with a file.

    Args:
        file (`str`): Its path inside the folder, with forward slashes.
        message (`str`): What was found, and what to do.
    """

    file: str
    message: str


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def published_files(folder: str | os.PathLike) -> list[str]:
    """Names of the files a manifest speaks of, sorted: all but the card, hidden files and checkpoints.

    Args:
        folder (`str` or `os.PathLike`): The folder of an adapter.
    """
    names = []
    for root, folders, files in os.walk(os.fspath(folder)):
        place = Path(root).relative_to(folder)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not (place == Path() and CHECKPOINT.fullmatch(name))
        ]
        names += [(place / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(name for name in names if name not in _NOT_HASHED)


def write_manifest(folder: str | os.PathLike) -> Path:
    """Writes `space_manifest.json`: size and SHA-256 of every file in a folder that is about to be published.

    This is integrity, not authenticity. It finds a byte that was changed in transfer, in a cache or by somebody who can
    write single files; whoever can rewrite the whole repository can write a new manifest as well. Against that, load
    with `revision` set to the hash of a commit you trust.

    Args:
        folder (`str` or `os.PathLike`): The folder, complete but for the manifest. `README.md`, hidden files and
            checkpoints are left out.

    Returns:
        `pathlib.Path`: Path of the manifest.

    Raises:
        ValueError: If the folder holds nothing to publish, or a link that leads out of it.
    """
    folder = Path(folder)
    files = {}
    for name in published_files(folder):
        path = member_path(folder, name)
        files[name] = {"sha256": sha256_of(path), "size": path.stat().st_size}
    if not files:
        raise ValueError(f"{str(folder)!r} holds no file to publish; save the adapter there first.")
    path = folder / MANIFEST_NAME
    with atomic_path(path) as temporary:
        temporary.write_bytes(_canonical(files))
    return path


def check_manifest(folder: str | os.PathLike) -> list[Problem]:
    """Compares a folder with its manifest.

    Args:
        folder (`str` or `os.PathLike`): The folder of an adapter.

    Returns:
        `list[Problem]`: What differs, one entry a file; empty if every file is as it was published. If the manifest
        itself is damaged it is the only entry, for nothing it says can be relied on.

    Raises:
        FileNotFoundError: If the folder has no manifest.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_NAME).is_file():
        raise FileNotFoundError(f"no {MANIFEST_NAME} in {str(folder)!r}; it is written when an erasure is published.")
    try:
        files = _read(folder / MANIFEST_NAME)
    except ValueError as error:
        return [Problem(MANIFEST_NAME, str(error))]
    problems = [problem for name, entry in files.items() if (problem := _compare(folder, name, entry))]
    for name in published_files(folder):
        if name not in files and Path(name).suffix.lower() in LOADABLE:
            problems.append(Problem(name, "is not among the files that were published; remove it, or publish again."))
    return problems


def _canonical(files: dict[str, dict]) -> bytes:
    """The only text that says this: a manifest with any byte changed is not the canonical text of what it says."""

    def dump(content: dict) -> bytes:
        return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()

    content = {"format": _FORMAT, "files": files}
    return dump({**content, "digest": hashlib.sha256(dump(content)).hexdigest()})


def _read(path: Path) -> dict[str, dict]:
    content = read_json(path, kind="manifest", remedy="Download it again, or publish again.")
    again = "Download it again, or publish again."
    if content.get("format") != _FORMAT:
        raise ValueError(f"format {content.get('format')!r:.80} is not {_FORMAT!r}; update space-peft. {again}")
    files = content.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"it lists no files. {again}")
    for name, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
            raise ValueError(f"the entry of {name!r:.80} is not a `sha256` and a `size`. {again}")
        if not (isinstance(entry["sha256"], str) and _SHA256.fullmatch(entry["sha256"])):
            raise ValueError(f"the sha256 of {name!r:.80} is not 64 hexadecimal digits. {again}")
        if type(entry["size"]) is not int or entry["size"] < 0:
            raise ValueError(f"the size of {name!r:.80} is {entry['size']!r:.80}; expected a number of bytes. {again}")
    if path.read_bytes() != _canonical(files):
        raise ValueError(f"the manifest was changed after it was written: its own digest does not match. {again}")
    return files


def _compare(folder: Path, name: str, entry: dict) -> Problem | None:
    try:
        path = member_path(folder, name)
    except ValueError as error:
        return Problem(name, str(error))
    if not path.is_file():
        return Problem(name, "was published, but is missing; download it again.")
    size = path.stat().st_size
    if size != entry["size"]:
        return Problem(name, f"has {size} bytes, {entry['size']} were published; it was changed or cut off.")
    if sha256_of(path) != entry["sha256"]:
        return Problem(name, "was changed after it was published: its SHA-256 is not the one recorded.")
    return None
