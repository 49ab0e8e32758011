"""Everything an adapter folder says about its erasure, read once and checked."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from space_peft.attacks.report import AttackReport
from space_peft.evaluation.report import ErasureReport
from space_peft.modeling.targets import side_of
from space_peft.null_space.certificate import RetentionCertificate
from space_peft.records.base_model import base_model_id
from space_peft.records.card_data import ErasureCardData
from space_peft.records.digests import PEFT_PREFIX
from space_peft.records.escape import plain_line
from space_peft.records.folder import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    ANCHORS_NAME,
    ATTACKS_NAME,
    CARD_DATA_NAME,
    CERTIFICATE_NAME,
    PICTURES_FOLDER,
    REPORT_NAME,
    SPACE_CONFIG_NAME,
)
from space_peft.records.measured import check_measured, check_projected
from space_peft.records.safe_json import read_json


PICTURES = ("answers", "probes", "anchors", "spectrum", "attacks")


@dataclass(frozen=True)
class ErasureFacts:
    """What is known of an erasure; `None` or empty where the folder does not say.

    Args:
        base_model (`str`, *optional*): Hub id of the base model; `None` for a local one.
        data ([`ErasureCardData`]): From the trainer and the author.
        adapter (`dict`): Content of `adapter_config.json`.
        layers (`tuple[str, ...]`): Adapted layers, by their names in the weights.
        parameters (`int`): Number of values in the weights.
        space (`dict`, *optional*): Content of `space_config.json`.
        certificate ([`RetentionCertificate`], *optional*): From `space_certificate.json`.
        provenance (`dict`, *optional*): Content of `space_anchors.json`.
        report ([`ErasureReport`], *optional*): From `report.json`.
        attacks (`dict[str, dict]`): `AttackReport.attacks`: the attacks that were tried, by name.
        pictures (`dict[str, str]`): Relative paths of the pictures there are, by name.
    """

    base_model: str | None
    data: ErasureCardData
    adapter: dict
    layers: tuple[str, ...]
    parameters: int
    space: dict | None
    certificate: RetentionCertificate | None
    provenance: dict | None
    report: ErasureReport | None
    attacks: dict[str, dict]
    pictures: dict[str, str]

    @property
    def redacted(self) -> bool:
        """Whether the concept's name is withheld."""
        return self.data.redact or self.data.redaction is not None

    @property
    def concept(self) -> str:
        """What to call the concept: its name, or what stands for it."""
        if self.redacted:
            from .redaction import redacted_label

            return redacted_label(self.data) if self.data.redaction else "redacted on request"
        names = [self.data.concept, (self.provenance or {}).get("concept"), self.report and self.report.concept]
        return next((str(name) for name in names if name and plain_line(name)), "a concept")

    @property
    def moves_vision(self) -> bool:
        """Whether a layer of the vision tower or the projector is adapted."""
        return any(side_of(name) == "vision" for name in self.layers)


def read_facts(
    folder: str | os.PathLike,
    *,
    base_model: str | None = None,
    license: str | None = None,
    card_data: ErasureCardData | None = None,
    attacks: AttackReport | None = None,
) -> ErasureFacts:
    """Reads an adapter folder.

    Args:
        folder (`str` or `os.PathLike`): Holds at least `adapter_config.json`.
        base_model (`str`, *optional*): Hub id of the base model; by default as recorded.
        license (`str`, *optional*): Licence identifier; by default as recorded.
        card_data ([`ErasureCardData`], *optional*): Instead of `space_card.json`.
        attacks ([`AttackReport`], *optional*): Instead of `attacks.json`.

    Raises:
        FileNotFoundError: If the folder holds no adapter.
        ValueError: If a file is damaged, or the base model's id as it was given is none.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {ADAPTER_CONFIG_NAME}; save the adapter there first.")
    adapter = read_json(folder / ADAPTER_CONFIG_NAME, kind="adapter config")
    data = card_data
    if data is None:
        data = ErasureCardData.load(folder) if (folder / CARD_DATA_NAME).is_file() else ErasureCardData()
    if license is not None and license != data.license:
        data = replace(data, license=license, license_name=None, license_link=None)
    check_measured(folder)
    check_projected(folder)
    layers, parameters = _weights(folder / ADAPTER_NAME)
    certificate, report = folder / CERTIFICATE_NAME, folder / REPORT_NAME
    if attacks is None and (folder / ATTACKS_NAME).is_file():
        attacks = AttackReport.load(folder)
    return ErasureFacts(
        base_model=base_model_id(base_model, data, adapter, local=True),
        data=data,
        adapter=adapter,
        layers=layers,
        parameters=parameters,
        space=_optional_json(folder / SPACE_CONFIG_NAME, "settings of the constraint"),
        certificate=RetentionCertificate.load(certificate) if certificate.is_file() else None,
        provenance=_optional_json(folder / ANCHORS_NAME, "provenance of the anchors"),
        report=ErasureReport.load(report) if report.is_file() else None,
        attacks=attacks.attacks if attacks else {},
        pictures={name: path for name in PICTURES if (folder / (path := f"{PICTURES_FOLDER}/{name}.png")).is_file()},
    )


def _optional_json(path: Path, kind: str) -> dict | None:
    return read_json(path, kind=kind) if path.is_file() else None


def _weights(path: Path) -> tuple[tuple[str, ...], int]:
    """Names of the adapted layers and the number of values, from the file's header."""
    if not path.is_file():
        return (), 0
    layers: dict[str, None] = {}
    parameters = 0
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                size = 1
                for length in file.get_slice(key).get_shape():
                    size *= length
                parameters += size
                layers[key.removeprefix(PEFT_PREFIX).split(".lora_")[0]] = None
    except SafetensorError as error:
        raise ValueError(f"{path} holds no adapter weights: {error}. Save or download them again.") from error
    return tuple(layers), parameters
