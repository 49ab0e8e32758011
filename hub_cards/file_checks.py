"""Checks of a published folder that need no model: nothing in it runs, and every file is as published and can be read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from space_peft.attacks.report import AttackReport
from space_peft.canary.check import Canary
from space_peft.config import SpaceLoraConfig
from space_peft.evaluation.report import ErasureReport
from space_peft.null_space.certificate import RetentionCertificate
from space_peft.null_space.space import load_null_spaces
from space_peft.records.card_data import ErasureCardData
from space_peft.records.folder import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    ANCHORS_NAME,
    ATTACKS_NAME,
    CANARY_NAME,
    CARD_DATA_NAME,
    CERTIFICATE_NAME,
    LEDGER_NAME,
    MANIFEST_NAME,
    NULL_SPACES_NAME,
    REPORT_NAME,
    SPACE_CONFIG_NAME,
    known,
)
from space_peft.records.safe_json import read_json

from .certificate_checks import FAILED, NOT_CHECKED, OK, Check
from .load import adapter_keys, check_options
from .manifest import LOADABLE, check_manifest, published_files
from .processor import PROCESSOR_FILES, check_processor_file
from .source import AdapterSource, recorded_base, unsafe_files


def check_no_code(source: AdapterSource) -> Check:
    """That nothing in the folder is a program or a pickle, which loading would run."""
    unsafe = unsafe_files(source.files)
    if unsafe:
        return Check(
            "no code", FAILED, f"would run whatever is in it when loaded ({len(unsafe)} such files)", unsafe[0]
        )
    return Check("no code", OK, f"nothing that is loaded is a pickle or a program ({len(source.files)} files)")


def check_hashes(source: AdapterSource) -> list[Check]:
    """That the files are those that were published."""
    try:
        problems = check_manifest(source.folder)
    except FileNotFoundError:
        if source.repo_id is None:
            return [Check("hashes", NOT_CHECKED, f"no {MANIFEST_NAME}: the folder was not published yet")]
        return [Check("hashes", FAILED, "missing: it was removed, or not pushed with space-peft", MANIFEST_NAME)]
    if problems:
        return [Check("hashes", FAILED, problem.message, problem.file) for problem in problems]
    return [Check("hashes", OK, "every file is as it was published")]


def readers(source: AdapterSource) -> dict[str, Callable[[], object]]:
    """How each file that is published and says something is read and checked."""
    folder = source.folder

    def read_config() -> None:
        recorded_base(source)
        check_options(folder)

    own: dict[str, Callable[[], object]] = {
        ADAPTER_CONFIG_NAME: read_config,
        ADAPTER_NAME: lambda: _check_weights(folder),
        SPACE_CONFIG_NAME: lambda: SpaceLoraConfig.from_pretrained(str(folder)),
        CERTIFICATE_NAME: lambda: source.read(CERTIFICATE_NAME, RetentionCertificate.load),
        CANARY_NAME: lambda: source.read(CANARY_NAME, Canary.load),
        CARD_DATA_NAME: lambda: source.read(CARD_DATA_NAME, ErasureCardData.load),
        REPORT_NAME: lambda: ErasureReport.load(folder),
        ATTACKS_NAME: lambda: AttackReport.load(folder),
        ANCHORS_NAME: lambda: read_json(folder / ANCHORS_NAME, kind="anchors' provenance"),
        LEDGER_NAME: lambda: read_json(folder / LEDGER_NAME, kind="ledger"),
        NULL_SPACES_NAME: lambda: load_null_spaces(folder / NULL_SPACES_NAME),
    }
    return own | {name: partial(check_processor_file, folder, name) for name in PROCESSOR_FILES}


def check_contents(source: AdapterSource) -> list[Check]:
    """Whether each file that is there can be read, and says what such a file says."""
    folder, read_by_name = source.folder, readers(source)
    checks = [
        Check("content", FAILED, "does not belong to an erasure, and some library would load it; remove it", name)
        for name in _odd_files(source)
    ]
    for name, read in read_by_name.items():
        required = name in (ADAPTER_CONFIG_NAME, ADAPTER_NAME)
        if not (folder / name).is_file() and not required:
            continue
        try:
            read()
        except (FileNotFoundError, ValueError, TypeError) as error:
            checks.append(Check("content", FAILED, str(error), name))
    if not checks:
        found = [name for name in read_by_name if (folder / name).is_file()]
        checks.append(Check("content", OK, f"{', '.join(found)} can be read"))
    return checks


def _odd_files(source: AdapterSource) -> list[str]:
    """Files of a published folder that `from_pretrained` would read though an adapter has none: a whole model, say."""
    if source.repo_id is None and not (source.folder / MANIFEST_NAME).is_file():
        return []  # What a trainer has left beside the adapter.
    return [
        name
        for name in published_files(source.folder)
        if "/" not in name
        and Path(name).suffix.lower() in LOADABLE - {".txt", ".yaml", ".yml"}
        and ((file := known(name)) is None or file.published == "never")
    ]


def _check_weights(folder: Path) -> None:
    adapter_keys(folder)
    bad = [name for name, weight in load_file(folder / ADAPTER_NAME).items() if not weight.isfinite().all()]
    if bad:
        raise ValueError(f"{len(bad)} weights hold NaN or infinity, the first is {min(bad)!r:.200}")
