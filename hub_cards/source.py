"""Getting an adapter's folder, and refusing what must not be in it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from space_peft.records.card_data import is_local_path
from space_peft.records.folder import ADAPTER_CONFIG_NAME, CARD_DATA_NAME, TRAINING_ARGUMENTS_NAME
from space_peft.records.places import refuse_missing
from space_peft.records.safe_json import read_json

from .manifest import CHECKPOINT, REQUEST


CHECKPOINTS = ("checkpoint-*", "last-checkpoint")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_CODE = (".py", ".pyc", ".so", ".dll")
# Trainer writes it beside every model; nothing that loads an adapter reads it, and it is not downloaded.
_HARMLESS = (TRAINING_ARGUMENTS_NAME,)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class AdapterSource:
    """
    Where an adapter came from.

    Args:
        folder (`pathlib.Path`): Its files.
        repo_id (`str`, *optional*): Repository they were downloaded from; `None` for a local folder.
        commit (`str`, *optional*): Of that repository.
        files (`tuple[str, ...]`): What lies there, also what was not downloaded.
    """

    folder: Path
    repo_id: str | None
    commit: str | None
    files: tuple[str, ...]
    _read: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def read(self, name: str, reader: Callable[[Path], _T]) -> _T:
        """What a file says: read once, so that what was checked is what is used.

        Args:
            name (`str`): The file, always of the same reader.
            reader (`Callable`): Given the folder; returns what the file says, or raises what is wrong with it.
        """
        if name not in self._read:
            self._read[name] = reader(self.folder)
        return self._read[name]


def fetch(
    repo_or_folder: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> AdapterSource:
    """Downloads a repository, or takes a folder as it is. Pickles, code and checkpoints are not downloaded.

    Args:
        repo_or_folder (`str` or `os.PathLike`): Hub id or folder.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        token (`str`, *optional*): See [`~huggingface_hub.snapshot_download`].

    Raises:
        FileNotFoundError: If it is a path, and there is no folder.
        ValueError: If a revision is asked of a folder.
        huggingface_hub.errors.HfHubHTTPError: If the repository cannot be downloaded.
        ConnectionError: If the connection breaks.
    """
    folder = Path(repo_or_folder)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{str(folder)!r} is a folder, which has no revision {revision!r}; leave `revision` out.")
        return AdapterSource(folder, None, None, tuple(_files_below(folder)))
    refuse_missing(repo_or_folder)
    repo_id = str(repo_or_folder)
    ignored = [f"*{suffix}" for suffix in (*_PICKLES, *_CODE)] + [f"{name}/*" for name in CHECKPOINTS]
    try:
        try:
            info = HfApi(token=token).model_info(repo_id, revision=revision)
            revision, listed = info.sha, [file.rfilename for file in info.siblings or ()]
        except OfflineModeIsEnabled:
            listed = []  # What is in the cache is all that can be known.
        folder = Path(snapshot_download(repo_id, revision=revision, token=token, ignore_patterns=ignored))
    except HfHubHTTPError:
        raise  # Says what is wrong, and what to do.
    except HTTPError as error:
        raise ConnectionError(f"{repo_id!r} was not downloaded: {error}. Try again.") from error
    commit = folder.name if _COMMIT.fullmatch(folder.name) else None
    return AdapterSource(folder, repo_id, commit, tuple(sorted({*listed, *_files_below(folder)})))


def _files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _in_checkpoint(name: str) -> bool:
    folder, slash, _ = name.partition("/")
    return bool(slash and CHECKPOINT.fullmatch(folder))


def unsafe_files(files: Iterable[str]) -> list[str]:
    """Those that would run code when some library loads them: pickles and Python files."""
    found = []
    for name in files:
        suffix, own = PurePosixPath(name).suffix.lower(), REQUEST.sub("", name)
        if suffix in (*_PICKLES, *_CODE) and own not in _HARMLESS and not _in_checkpoint(own):
            found.append(name)
    return found


def refuse_unsafe(source: AdapterSource) -> None:
    """Raises `ValueError` if the adapter comes with a file that would run code."""
    if unsafe := unsafe_files(source.files):
        raise ValueError(
            f"{unsafe[0]!r} would run whatever is in it when it is loaded, and an adapter needs no such file"
            + (f" (and {len(unsafe) - 1} more)" if len(unsafe) > 1 else "")
            + ". Weights belong into adapter_model.safetensors; do not load this adapter, and tell its author."
        )


@dataclass(frozen=True)
class RecordedBase:
    """
    The base model an adapter was trained on.

    Args:
        name (`str`, *optional*): Hub id, or for an adapter that was never published maybe a folder.
        revision (`str`, *optional*): Its commit.
    """

    name: str | None
    revision: str | None


def recorded_base(source: AdapterSource) -> RecordedBase:
    """Reads `adapter_config.json`, and `space_card.json` for what is not in it.

    Raises:
        FileNotFoundError: If there is no `adapter_config.json`.
        ValueError: If it is damaged or not of a LoRA, the two files disagree, or a downloaded one names a path.
    """
    config = read_json(source.folder / ADAPTER_CONFIG_NAME, kind="adapter's configuration")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{ADAPTER_CONFIG_NAME} is of a {config.get('peft_type')!r:.40} adapter; expected 'LORA'.")
    if config.get("megatron_config") is not None:
        raise ValueError(f"`megatron_config` of {ADAPTER_CONFIG_NAME} has other code loaded; expected null.")
    found = {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    for key, value in found.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"the base model's {key} in {ADAPTER_CONFIG_NAME} is {value!r:.80}; expected a text.")
    if (source.folder / CARD_DATA_NAME).is_file():
        card = read_json(source.folder / CARD_DATA_NAME, kind="card data")
        told = {"name": card.get("base_model"), "revision": card.get("base_revision")}
        for key, value in told.items():
            if value is not None and not isinstance(value, str):
                raise ValueError(f"the base model's {key} in {CARD_DATA_NAME} is {value!r:.80}; expected a text.")
            # A folder of a trainer that loaded its base model from another folder names that, and on the card an id.
            local = (
                source.repo_id is None
                and key == "name"
                and (is_local_path(found[key]) or Path(found[key] or "").exists())
            )
            if found[key] and value and found[key] != value and not local:
                raise ValueError(
                    f"{ADAPTER_CONFIG_NAME} names the base model's {key} {found[key]!r:.120}, {CARD_DATA_NAME} {value!r:.120}; "
                    "one of them was changed. Ask the author which is right, and give `base_model`."
                )
            found[key] = found[key] or value or None
    if source.repo_id is not None and is_local_path(found["name"]):
        raise ValueError(
            f"{ADAPTER_CONFIG_NAME} names a folder of its author's machine as the base model, {found['name']!r:.120}; give "
            "`base_model`."
        )
    return RecordedBase(**found)
