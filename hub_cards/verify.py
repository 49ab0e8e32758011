"""`verify_erasure`: is a published erasure what it says, as a report with a line for every check."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub.errors import HTTPError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor

from space_peft.anchors.info import ANCHORS_NAME
from space_peft.attacks.report import ATTACKS_NAME, AttackReport
from space_peft.callback import NULL_SPACES_NAME
from space_peft.canary import CANARY_NAME, MIN_MARGIN, Canary
from space_peft.card_data import CARD_DATA_NAME, ErasureCardData
from space_peft.certificate import CERTIFICATE_NAME, RetentionCertificate, measure_changes, update_norms
from space_peft.config import SPACE_CONFIG_NAME, SpaceLoraConfig
from space_peft.escape import plain_line
from space_peft.evaluation.report import REPORT_NAME, ErasureReport
from space_peft.manifest import MANIFEST_NAME, check_manifest
from space_peft.null_space import load_null_spaces
from space_peft.retain import RetainedRows, retained_loader, split_retained
from space_peft.safe_json import read_json

from .load import adapter_keys, ask_canary, attach_adapter, canary_problems, load_base, processor_place
from .source import AdapterSource, fetch, recorded_base, unsafe_files


OK, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"
# A layer's change, measured again on the same rows in another precision or batch size, may differ by this share.
TOLERANCE = 0.05
# The norm of an update is computed from the weights alone.
_NORM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """
    One line of a [`VerifyReport`].

    Args:
        name (`str`): What was checked.
        status (`str`): `"ok"`, `"FAILED"` or `"not checked"`.
        message (`str`): What was found, or why nothing was checked.
        file (`str`, *optional*): The file at fault.
    """

    name: str
    status: str
    message: str
    file: str | None = None


@dataclass(frozen=True)
class VerifyReport:
    """
    What [`verify_erasure`] found.

    Args:
        source (`str`): The repository or folder.
        commit (`str`, *optional*): Of the repository.
        checks (`tuple[Check, ...]`): In the order they were made.
    """

    source: str
    commit: str | None
    checks: tuple[Check, ...]

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == FAILED]

    @property
    def exit_code(self) -> int:
        """0 if no check failed, else 1."""
        return 1 if self.failed else 0

    def to_dict(self) -> dict:
        """Plain values, for `--json`."""
        return {**asdict(self), "checks": [asdict(check) for check in self.checks], "exit_code": self.exit_code}

    def to_text(self) -> str:
        """One line a check, safe to print: names and answers cannot move the cursor or reverse the line."""
        lines = [plain_line(self.source) + (f" at commit {self.commit}" if self.commit else "")]
        width = max(len(check.name) for check in self.checks)
        for check in self.checks:
            where = "" if check.file is None else f"{plain_line(check.file)}: "
            lines.append(f"{check.status:<11}  {check.name:<{width}}  {where}{plain_line(check.message, 600)}")
        counts = [
            f"{sum(check.status == status for check in self.checks)} {status}" for status in (OK, FAILED, NOT_CHECKED)
        ]
        return "\n".join([*lines, ", ".join(counts)])


def verify_erasure(
    repo_or_folder: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    base_model: str | os.PathLike | nn.Module | None = None,
    retain_dataset: Dataset | Sequence[dict] | None = None,
    canary: bool = True,
) -> VerifyReport:
    """Checks everything about an erasure that can be checked without trusting its author.

    That the files are those that were published (hashes), that each of them says something sensible and none can run
    code, that the weights fit the recorded base model, that the certificate is of these weights, that the canary's
    questions are answered as after training, and, on retained data, that the certificate's measured change can be
    measured again. If files were changed, nothing of them is loaded.

    Args:
        repo_or_folder (`str` or `os.PathLike`): Hub id or folder; one that was never pushed has no hashes to compare.
        revision (`str`, *optional*): Branch, tag or commit of the adapter.
        token (`str` or `bool`, *optional*): As in huggingface_hub.
        base_model (`str`, `os.PathLike` or `torch.nn.Module`, *optional*): By default the one recorded. A loaded model
            gets the adapter.
        retain_dataset (`datasets.Dataset` or `list[dict]`, *optional*): Retained rows in TRL's formats. Those of the
            training run are compared with the certificate within 5 %, on any others each layer's change must be within
            its bound.
        canary (`bool`, defaults to `True`): Whether to ask the canary's questions.

    Returns:
        [`VerifyReport`]: Its `exit_code` is 1 if anything failed.

    Raises:
        ValueError: If there is no such folder, or the retained dataset is in no known format.
        huggingface_hub.errors.HfHubHTTPError: If the repository cannot be downloaded.
        ConnectionError: If the connection breaks.
    """
    source = fetch(repo_or_folder, revision=revision, token=token)
    rows = None if retain_dataset is None else RetainedRows(retain_dataset)
    checks = [_executable(source), *_hashes(source)]
    # Each stage trusts what the one before has found.
    stages = {
        ("content",): lambda: _contents(source),
        ("base model", "certificate", "canary", "retained data"): lambda: _behaviour(
            source, base_model, token=token, rows=rows, ask=canary
        ),
    }
    for names, stage in stages.items():
        if any(check.status == FAILED for check in checks):
            checks += [Check(name, NOT_CHECKED, "the files are not what they should be") for name in names]
        else:
            checks += stage()
    return VerifyReport(plain_line(repo_or_folder), source.commit, tuple(checks))


def _executable(source: AdapterSource) -> Check:
    unsafe = unsafe_files(source.files)
    if unsafe:
        return Check(
            "no code", FAILED, f"would run whatever is in it when loaded ({len(unsafe)} such files)", unsafe[0]
        )
    return Check("no code", OK, f"nothing that is loaded is a pickle or a program ({len(source.files)} files)")


def _hashes(source: AdapterSource) -> list[Check]:
    try:
        problems = check_manifest(source.folder)
    except FileNotFoundError:
        if source.repo_id is None:
            return [Check("hashes", NOT_CHECKED, f"no {MANIFEST_NAME}: the folder was not published yet")]
        return [Check("hashes", FAILED, "missing: it was removed, or not pushed with space-peft", MANIFEST_NAME)]
    if problems:
        return [Check("hashes", FAILED, problem.message, problem.file) for problem in problems]
    return [Check("hashes", OK, "every file is as it was published")]


def _contents(source: AdapterSource) -> list[Check]:
    """Whether each file that is there can be read, and says what such a file says."""
    folder = source.folder
    readers: dict[str, Callable[[], object]] = {
        CONFIG_NAME: lambda: recorded_base(source),
        SAFETENSORS_WEIGHTS_NAME: lambda: _check_weights(folder),
        SPACE_CONFIG_NAME: lambda: SpaceLoraConfig.from_pretrained(str(folder)),
        CERTIFICATE_NAME: lambda: RetentionCertificate.load(folder),
        CANARY_NAME: lambda: Canary.load(folder),
        CARD_DATA_NAME: lambda: ErasureCardData.load(folder),
        REPORT_NAME: lambda: ErasureReport.load(folder),
        ATTACKS_NAME: lambda: AttackReport.load(folder),
        ANCHORS_NAME: lambda: read_json(folder / ANCHORS_NAME, kind="anchors' provenance"),
        NULL_SPACES_NAME: lambda: load_null_spaces(folder / NULL_SPACES_NAME),
    }
    checks = []
    for name, read in readers.items():
        required = name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
        if not (folder / name).is_file() and not required:
            continue
        try:
            read()
        except (FileNotFoundError, ValueError, TypeError) as error:
            checks.append(Check("content", FAILED, str(error), name))
    if not checks:
        found = [name for name in readers if (folder / name).is_file()]
        checks.append(Check("content", OK, f"{', '.join(found)} can be read"))
    return checks


def _check_weights(folder: Path) -> None:
    adapter_keys(folder)
    bad = [name for name, weight in load_file(folder / SAFETENSORS_WEIGHTS_NAME).items() if not weight.isfinite().all()]
    if bad:
        raise ValueError(f"{len(bad)} weights hold NaN or infinity, the first is {min(bad)!r:.200}")


def _behaviour(source: AdapterSource, base_model, *, token, rows: RetainedRows | None, ask: bool) -> list[Check]:
    """The checks that need the model."""
    recorded = recorded_base(source)
    name = "base model"
    try:
        model = attach_adapter(source, load_base(recorded, base_model, token=token))
    except (OSError, ValueError, TypeError, HTTPError) as error:
        checks = [Check(name, FAILED, f"{error}")]
        return checks + [Check(rest, NOT_CHECKED, "no model") for rest in ("certificate", "canary", "retained data")]
    model.eval()
    weights = len(adapter_keys(source.folder))
    place = recorded.name if base_model is None else getattr(model.config, "_name_or_path", "")
    checks = [Check(name, OK, f"{place or 'as given'}; all {weights} weights of the adapter have their place in it")]
    checks.append(_certificate(source, model))
    checks.append(_canary(source, model, token) if ask else Check("canary", NOT_CHECKED, "not asked for"))
    if rows is None:
        checks.append(Check("retained data", NOT_CHECKED, "none given"))
    else:
        checks.append(_retained(source, model, rows, token))
    return checks


def _certificate(source: AdapterSource, model: PeftModel) -> Check:
    """Whether the certificate is of these weights and settings."""
    name = "certificate"
    if not (source.folder / CERTIFICATE_NAME).is_file():
        return Check(name, NOT_CHECKED, f"no {CERTIFICATE_NAME}: trained without the constraint, or not measured")
    certificate = RetentionCertificate.load(source.folder)

    def failed(message: str) -> Check:
        return Check(name, FAILED, message, CERTIFICATE_NAME)

    config = next(iter(model.peft_config.values()))
    for key in ("constraint", "strength", "energy", "statistics"):
        if isinstance(config, SpaceLoraConfig) and getattr(config, key) != getattr(certificate, key):
            return failed(
                f"{key} is {getattr(certificate, key)!r}, but {getattr(config, key)!r} in {SPACE_CONFIG_NAME}"
            )
    norms = update_norms(model)
    layers = {layer.name: layer for layer in certificate.layers}
    if set(norms) != set(layers):
        odd = min(set(norms) ^ set(layers))
        return failed(f"is not of the layers that are adapted: {odd!r:.200} is in one of the two only")
    for key, layer in layers.items():
        if abs(norms[key] - layer.update_norm) > _NORM_TOLERANCE * max(norms[key], layer.update_norm):
            return failed(f"is of other weights: ||s B A|| of {key!r} is {norms[key]:.6g}, not {layer.update_norm:.6g}")
        if layer.fitted_change > layer.bound * (1 + _NORM_TOLERANCE):
            return failed(f"contradicts itself: {key!r} changes by {layer.fitted_change:.6g}, bound {layer.bound:.6g}")
    if (source.folder / NULL_SPACES_NAME).is_file():
        spaces = load_null_spaces(source.folder / NULL_SPACES_NAME)
        for key, layer in layers.items():
            if key not in spaces or abs(spaces[key].kept - layer.kept) > _NORM_TOLERANCE:
                return failed(f"is not of the null spaces in {NULL_SPACES_NAME}: see {key!r}")
    return Check(name, OK, f"is of these weights: {len(layers)} layers, {certificate.constraint} constraint")


def _canary(source: AdapterSource, model: PeftModel, token) -> Check:
    name = "canary"
    try:
        result = ask_canary(source, model, token=token)
    except OSError as error:
        return Check(name, NOT_CHECKED, f"no processor to ask with: {error}")
    if result is None:
        return Check(name, NOT_CHECKED, f"no {CANARY_NAME}")
    if problems := canary_problems(result):
        return Check(name, FAILED, " ".join(problems), CANARY_NAME)
    if not result.count:
        return Check(name, NOT_CHECKED, f"no question had answers surer than {MIN_MARGIN:g} nats")
    message = (
        f"{result.count} questions are answered as after training, {result.telling} of them otherwise than without the "
        f"adapter; log-probabilities within {result.max_log_prob_change:.2g} nats; "
    )
    if result.base_compared:
        return Check(name, OK, message + f"{result.base_compared} weights of the base model as recorded")
    return Check(name, OK, message + "the base model's weights could not be compared (quantised or renamed)")


def _retained(source: AdapterSource, model: PeftModel, rows: RetainedRows, token) -> Check:
    """Measures the certificate's change again."""
    name = "retained data"
    if not (source.folder / CERTIFICATE_NAME).is_file():
        return Check(name, NOT_CHECKED, f"no {CERTIFICATE_NAME} to compare with")
    certificate = RetentionCertificate.load(source.folder)
    held_out, indices = certificate.held_out, range(len(rows))
    if held_out is not None and held_out.rows == len(rows):
        indices = split_retained(held_out.rows, held_out.share, held_out.seed)[1]
    processor = AutoProcessor.from_pretrained(processor_place(source, model), trust_remote_code=False, token=token)
    with torch.no_grad():
        changes, counts = measure_changes(model, retained_loader(processor, rows, indices, 32), progress=False)
    layers = {layer.name: layer for layer in certificate.layers}
    if counts != certificate.measured_counts:
        beyond = {key: change for key, change in changes.items() if change > layers[key].bound}
        seen = f"other rows than the certificate's ({counts} tokens, not {certificate.measured_counts})"
        if beyond:
            key = max(beyond, key=lambda key: beyond[key] / max(layers[key].bound, 1e-30))
            return Check(
                name,
                FAILED,
                f"{seen}: {len(beyond)} of {len(changes)} layers change by more than their bound, {key!r} by "
                f"{beyond[key]:.4g}, bound {layers[key].bound:.4g}. The certificate does not hold for such data.",
                CERTIFICATE_NAME,
            )
        return Check(name, OK, f"{seen}: every one of {len(changes)} layers changes by less than its bound")
    errors = {key: abs(change - layers[key].change) for key, change in changes.items()}
    # A layer that hardly changes is all rounding: compare it with the layer that changes most.
    floor = 1e-3 * max(layer.change for layer in certificate.layers)
    off = {key: error for key, error in errors.items() if error > TOLERANCE * layers[key].change + floor}
    if off:
        key = max(off, key=off.get)
        return Check(
            name,
            FAILED,
            f"{len(off)} of {len(changes)} layers change otherwise than certified, by more than {TOLERANCE:.0%}: {key!r} by "
            f"{changes[key]:.4g}, certified {layers[key].change:.4g}",
            CERTIFICATE_NAME,
        )
    largest = max(errors[key] / max(layers[key].change, floor) for key in errors)
    return Check(
        name,
        OK,
        f"the certificate's rows: {len(changes)} layers change as certified, the largest difference is {largest:.1%} (allowed: {TOLERANCE:.0%})",
    )
