"""What a trainer knows about an erasure and its model card has to say; kept beside the adapter as `space_card.json`."""

from __future__ import annotations

import datetime
import enum
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError

from .folder import CARD_DATA_NAME
from .io import write_json
from .licenses import check_license
from .repository_ids import validate_repo_id
from .safe_json import read_json


ROLES = ("pool", "retained", "evaluation")
_FORMAT = "space_peft.card_data.v1"
# POSIX and Windows paths from a root, home directories, file URLs.
_LOCAL = re.compile(r"(?:/|~|[A-Za-z]:[\\/]|\\\\|file:)\S*")
# Say where and for whom a run wrote, not what it did.
_NOT_SETTINGS = {"output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id", "base_model_name_or_path"}


def is_local_path(value: Any) -> bool:
    """Whether a value is a path from the root or the home directory of some machine, which must not be published."""
    return isinstance(value, os.PathLike) or isinstance(value, str) and _LOCAL.fullmatch(value) is not None


@dataclass
class DatasetRecord:
    """
    A dataset that an erasure used.

    Args:
        role (`str`): `"pool"` (anchors came from it), `"retained"` or `"evaluation"`.
        name (`str`, *optional*): For readers.
        id (`str`, *optional*): Repository on the Hub, if it is there.
        revision (`str`, *optional*): Commit of that repository.
        split (`str`, *optional*): Split used.
        rows (`int`, *optional*): Number of rows used.
        license (`str`, *optional*): As the dataset states it.
        fingerprint (`str`, *optional*): `Dataset._fingerprint` or a hash of the content, where there is no revision.
    """

    role: str
    name: str | None = None
    id: str | None = None
    revision: str | None = None
    split: str | None = None
    rows: int | None = None
    license: str | None = None
    fingerprint: str | None = None

    def check(self) -> None:
        """Raises `ValueError` for a field that a card could not state."""
        if self.role not in ROLES:
            raise ValueError(f"`role` of a dataset is {self.role!r}; expected one of {list(ROLES)}.")
        for key in ("name", "revision", "split", "license", "fingerprint"):
            _check(getattr(self, key), str, f"`{key}` of a dataset", "a text")
        _check_repository(self.id, "`id` of a dataset")
        _check_revision(self.revision, "`revision` of a dataset")
        _check(self.rows, int, "`rows` of a dataset", "a number of rows")
        if self.rows is not None and self.rows < 0:
            raise ValueError(f"`rows` of a dataset is {self.rows}; expected a number of rows.")


@dataclass
class ErasureCardData:
    """
    Plain facts about an erasure. The first group is for the author to give (`card_data=` of the trainers), the second
    is filled in while training. It holds nothing of the machine: no path, host or user name, token.

    Args:
        license (`str`, *optional*): Licence identifier of the Hub; by default the card inherits the base model's.
        license_name (`str`, *optional*): With `license="other"`: its name.
        license_link (`str`, *optional*): With `license="other"`: where its text is.
        language (`str` or `list[str]`, *optional*): ISO 639 codes of the questions and answers.
        reason (`str`, *optional*): Why the concept was erased, and why it may be named on a public card.
        redact (`bool`, defaults to `False`): Publish a hash of the concept's name instead of the name.
        not_tested (`list[str]`): What the author knows was not tested; the card adds what it can tell itself.
        authors (`list[str]`): Who made the adapter.
        tags (`list[str]`): Tags of the repository beside those of this package.
        contact (`str`, *optional*): Where questions and complaints go.
        method (`str`, defaults to `"SPACE"`): Name of the method.
        paper (`dict`, *optional*): `title` and arXiv `id` of the method's paper.
        uses_concept_images (`bool`, defaults to `False`): Whether the method was shown images of the concept.
        concept (`str`): What was erased.
        aliases (`list[str]`): Its other names.
        base_model (`str`, *optional*): Repository of the base model on the Hub; `None` if it has none.
        base_revision (`str`, *optional*): Commit of that repository.
        base_license (`str`, *optional*): As the base model's card states it.
        datasets (`list[DatasetRecord]`): Pool, retained and evaluation data.
        settings (`dict[str, dict]`): Settings that differ from the defaults, by name of the config; see `add_settings`.
        seed (`int`, *optional*): Of the run.
        steps (`int`, *optional*): Optimiser steps taken.
        versions (`dict[str, str]`): Of Python and the libraries; `None` for one that is not installed as a package.
        hardware (`dict`): Names and numbers of devices.
        seconds (`dict[str, float]`): Wall-clock time of each stage.
        created (`str`, *optional*): Date, as YYYY-MM-DD.
        redaction (`dict`, *optional*): `{"algorithm": "hmac-sha256", "hash": ...}`, never the salt.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None
    reason: str | None = None
    redact: bool = False
    not_tested: list[str] = field(default_factory=list)
    authors: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    contact: str | None = None

    method: str = "SPACE"
    paper: dict[str, str] | None = None
    uses_concept_images: bool = False
    concept: str = ""
    aliases: list[str] = field(default_factory=list)
    base_model: str | None = None
    base_revision: str | None = None
    base_license: str | None = None
    datasets: list[DatasetRecord] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: int | None = None
    steps: int | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    created: str | None = None
    redaction: dict[str, str] | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Checks every field as it is now; fields are filled in one by one.

        Raises:
            ValueError: If a value is of the wrong type or cannot stand on a card; the message says what to give.
        """
        check_license(self.license, self.license_name, self.license_link)
        texts = ("license_name", "license_link", "reason", "contact", "base_revision", "base_license")
        for key in texts:
            _check(getattr(self, key), str, f"`{key}`", "a text")
        for key in ("method", "concept"):
            _check(getattr(self, key), str, f"`{key}`", "a text", optional=False)
        for key in ("not_tested", "authors", "tags", "aliases"):
            _check_texts(getattr(self, key), f"`{key}`")
        for key in ("redact", "uses_concept_images"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"`{key}` is {getattr(self, key)!r}; expected True or False.")
        for key in ("seed", "steps"):
            _check(getattr(self, key), int, f"`{key}`", "a whole number")
        for key in ("settings", "versions", "hardware", "seconds"):
            _check(getattr(self, key), dict, f"`{key}`", "a dict", optional=False)
        for key, value in vars(self).items():
            if key != "datasets":
                _check_json(value, f"`{key}`")
        for name, values in self.settings.items():
            _check(values, dict, f"`settings[{name!r}]`", "a dict of settings", optional=False)
        for name, version in self.versions.items():
            _check(version, str, f"`versions[{name!r}]`", "a text")
        for stage, seconds in self.seconds.items():
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
                raise ValueError(f"`seconds[{stage!r}]` is {seconds!r}; expected a number.")
        self._check_language()
        _check_repository(self.base_model, "`base_model`")
        _check_revision(self.base_revision, "`base_revision`")
        if not isinstance(self.datasets, list) or not all(isinstance(r, DatasetRecord) for r in self.datasets):
            raise ValueError(f"`datasets` is {self.datasets!r}; expected a list of DatasetRecord.")
        for record in self.datasets:
            record.check()
        for key, expected in (("paper", {"title", "id"}), ("redaction", {"algorithm", "hash"})):
            value = getattr(self, key)
            if value is None:
                continue
            if not isinstance(value, dict) or set(value) != expected or not all(map(_is_text, value.values())):
                raise ValueError(f"`{key}` is {value!r}; expected a dict of texts with the keys {sorted(expected)}.")
        if self.paper is not None and not re.fullmatch(r"\d{4}\.\d{4,5}", self.paper["id"]):
            raise ValueError(f"`paper` has the id {self.paper['id']!r}; expected an arXiv id such as '2606.09868'.")
        if self.created is not None:
            try:
                datetime.date.fromisoformat(self.created)
            except (TypeError, ValueError) as error:
                raise ValueError(f"`created` is {self.created!r}; expected a date such as '2026-01-31'.") from error

    def _check_language(self) -> None:
        codes = [self.language] if isinstance(self.language, str) else self.language
        if codes is None:
            return
        _check_texts(codes, "`language`")
        for code in codes:
            if not re.fullmatch(r"[a-z]{2,3}|multilingual|code", code):
                raise ValueError(f"`language` holds {code!r}; expected ISO 639 codes such as 'en' (or 'multilingual').")

    def add_settings(self, name: str, config: Any, default: Any) -> None:
        """Records the settings that differ from the defaults.

        Left out are paths, names of runs and repositories, and objects that JSON cannot hold.

        Args:
            name (`str`): Name of the config, as the card shall show it.
            config (dataclass): The settings used.
            default (dataclass): The same class with its defaults.
        """
        self.settings[name] = {}
        for option in fields(config):
            value, usual = getattr(config, option.name), getattr(default, option.name)
            # Some configs replace None by False or "" by [] on their own.
            if option.name in _NOT_SETTINGS or value == usual or _is_empty(value) and _is_empty(usual):
                continue
            try:
                self.settings[name][option.name] = _plain(value)
            except ValueError:
                continue

    def to_dict(self) -> dict[str, Any]:
        """The content of `space_card.json`."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ErasureCardData:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If it is no card data of this version, or a value is refused by `check`.
        """
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"this is not card data: expected a JSON object with format {_FORMAT!r}.")
        values = {key: value for key, value in content.items() if key != "format"}
        _check_keys(values, cls, "the card data")
        records = values.get("datasets", [])
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError("`datasets` of the card data must be a list of objects.")
        for record in records:
            _check_keys(record, DatasetRecord, "a dataset of the card data")
            if "role" not in record:
                raise ValueError(f"a dataset of the card data lacks its `role`, one of {list(ROLES)}.")
        return cls(**{**values, "datasets": [DatasetRecord(**record) for record in records]})

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `space_card.json`, all or nothing.

        Args:
            folder (`str` or `os.PathLike`): Created if missing.

        Returns:
            `pathlib.Path`: Of the file.

        Raises:
            ValueError: If `check` refuses a field, or one holds a path of this machine.
        """
        self.check()
        content = self.to_dict()
        if local := _local_path(content):
            raise ValueError(f"card data is published, but its {local} is a local path; leave it out.")
        path = Path(folder) / CARD_DATA_NAME
        write_json(path, content)
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> ErasureCardData:
        """Reads `space_card.json`.

        Args:
            folder (`str` or `os.PathLike`): The adapter folder, or the file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is no card data; see `from_dict`.
        """
        path = Path(folder)
        path = path / CARD_DATA_NAME if path.is_dir() else path
        content = read_json(path, kind="card data")
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"the card data {str(path)!r} is refused: {error}") from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _check(value: Any, kind: type, where: str, expected: str, *, optional: bool = True) -> None:
    if value is None and optional:
        return
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where} is {value!r}; expected {expected}.")


def _is_empty(value: Any) -> bool:
    return value is None or value is False or isinstance(value, (str, list, tuple, dict, set)) and not value


def _check_texts(value: Any, where: str) -> None:
    if not isinstance(value, list) or not all(map(_is_text, value)):
        raise ValueError(f"{where} is {value!r}; expected a list of texts.")


def _check_repository(name: Any, where: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{where} is {name!r}; expected a repository on the Hub such as 'org/name', or None if it is not there."
        ) from error


def _check_revision(revision: str | None, where: str) -> None:
    if revision is not None and not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII):
        raise ValueError(f"{where} is {revision!r}; expected a commit hash, a tag or a branch.")


def _check_keys(values: dict, kind: type, what: str) -> None:
    if unknown := sorted(set(values) - {option.name for option in fields(kind)}):
        raise ValueError(
            f"{what} holds unknown keys {unknown}; a newer version of space-peft may have written it: upgrade."
        )


def _check_json(value: Any, where: str) -> None:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:  # Also UnicodeEncodeError: half of a surrogate pair.
        raise ValueError(f"{where} holds what JSON cannot: {error}.") from error


def _local_path(value: Any, where: str = "") -> str:
    """Name of the first entry that is a local path; empty if there is none."""
    if isinstance(value, dict):
        found = (_local_path(item, f"{where}.{key}" if where else str(key)) for key, item in value.items())
    elif isinstance(value, list):
        found = (_local_path(item, f"{where}[{i}]") for i, item in enumerate(value))
    else:
        return where if is_local_path(value) else ""
    return next(filter(None, found), "")


def _plain(value: Any) -> Any:
    """A JSON value of a setting; `ValueError` for a path or an object."""
    if isinstance(value, enum.Enum):
        value = value.value
    if is_local_path(value):
        raise ValueError("a local path")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    raise ValueError(f"{type(value).__name__} is not JSON")
