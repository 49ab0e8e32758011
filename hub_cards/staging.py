"""The copy of an adapter folder that may be published: what is on a list, without pickles, paths, tokens or links."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from space_peft.canary.check import Canary
from space_peft.data.names import check_aliases, mentions
from space_peft.records.base_model import base_model_id
from space_peft.records.card_data import ErasureCardData, is_local_path
from space_peft.records.folder import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    ANCHORS_NAME,
    CANARY_NAME,
    CARD_DATA_NAME,
    CARD_NAME,
    FILES,
    PROCESSOR_CONFIGS,
    REPORT_NAME,
    TRAINER_STATE,
    TRAINER_STATE_NAME,
    TRAINING_ARGUMENTS_NAME,
    VOCABULARIES,
    known,
    matches,
    to_publish,
)
from space_peft.records.io import write_json
from space_peft.records.measured import check_measured, check_projected
from space_peft.records.safe_json import member_path, read_json

from .card import GENERATED, erasure_card
from .local_traces import Finding, find_local_traces
from .manifest import CHECKPOINT, REQUEST, write_manifest
from .redaction import find_names, redact_anchors, redact_values, redacted_label, redaction_salt, without_name


logger = logging.getLogger(__name__)
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
# In cards of `PeftModel.save_pretrained` and of Trainer, which nobody wrote by hand.
_TEMPLATE_TEXTS = (
    GENERATED,
    "<!-- Provide a quick summary of what the model is/does. -->",
    "<!-- This model card has been generated automatically",
)


def stage(
    folder: str | os.PathLike,
    staged: str | os.PathLike,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    token: str | bool | None = None,
    redact: bool = False,
    redaction_folder: str | os.PathLike | None = None,
    include_images: bool = False,
    include_answers: bool = False,
    include_null_spaces: bool = False,
    announced: Sequence[str] = (),
) -> Path:
    """Copies what may be published, with a card of its own and a manifest. The folder itself stays as it is.

    Args:
        folder (`str` or `os.PathLike`): The adapter folder: a trainer's `output_dir`, or one of its checkpoints.
        staged (`str` or `os.PathLike`): An empty folder to write to.
        repo_id (`str`, *optional*): Where it will be published; stands in the card's examples.
        base_model (`str`, *optional*): Hub id of the base model; by default the one the folder records.
        token (`str` or `bool`, *optional*): To look up the base model's licence, if it is gated.
        redact (`bool`, defaults to `False`): Publish a salted hash of the concept's name instead of the name. Also if
            the card data says so.
        redaction_folder (`str` or `os.PathLike`, *optional*): Where the salt is kept, in `space_redaction.json`; it is
            drawn on the first push. By default `folder`.
        include_images (`bool`, defaults to `False`): Publish the canary's images made from anchors, if the licences of
            the pool's images allow it. Pictures of results (`pictures/`) are published anyhow.
        include_answers (`bool`, defaults to `False`): Publish every answer of the evaluation.
        include_null_spaces (`bool`, defaults to `False`): Publish the null spaces, large for large models.
        announced (`Sequence[str]`, *optional*): What else the public will read, such as the commit's message: must not
            hold the name when redacting.

    Returns:
        `pathlib.Path`: `staged`.

    Raises:
        FileNotFoundError: If the folder holds no adapter.
        ValueError: If the adapter is a pickle or no safetensors file, results in the folder were measured on other
            weights, the weights were changed after they had been in the null space, the folder holds a pickle that Trainer did not write, a file is a link out of the folder, the base
            model has no Hub id, or what would be published holds a local path, a token, or, when redacting, the
            concept's name.
    """
    folder, staged = Path(folder), Path(staged)
    _check_adapter(folder)
    check_measured(folder)  # The copy has no notes.
    check_projected(folder)
    data = ErasureCardData.load(folder) if (folder / CARD_DATA_NAME).exists() else None
    redact = redact or data is not None and data.redact
    adapter = read_json(folder / ADAPTER_CONFIG_NAME, kind="adapter configuration")
    base_model = base_model_id(base_model, data, adapter)
    data = data or ErasureCardData(concept=_recorded_name(folder) if redact else "")
    if data.base_model not in (None, base_model):
        data.base_revision = data.base_license = None  # They are the other model's.
    data.base_model = base_model

    asked = {"images": include_images, "answers": include_answers, "null_spaces": include_null_spaces}
    _copy(folder, staged, to_publish(redact=redact, **asked))
    _name_base(staged, base_model, data.base_revision)
    names = []
    if redact:
        names = concept_names(folder, data)
        for text in filter(None, [repo_id, *announced]):
            if mentions(text, names):
                raise ValueError(f"{text!r} mentions the concept whose name is to be redacted; choose another text.")
        data = _redact(staged, data, names, redaction_salt(redaction_folder or folder))
    if (folder / CARD_DATA_NAME).exists() or redact:
        data.save(staged)
    if (folder / CANARY_NAME).exists():
        _stage_canary(folder, staged, names, images=include_images and not redact)
    _write_card(folder, staged, base_model=base_model, repo_id=repo_id, token=token)

    _refuse(find_local_traces(staged, vocabularies=VOCABULARIES), "it would publish what is local to this machine")
    if redact:
        _refuse(find_names(staged, names), "the name to redact is left in what would be published")
    write_manifest(staged)
    return staged


def stage_checkpoint(checkpoint: str | os.PathLike, staged: str | os.PathLike) -> Path:
    """Copies a checkpoint with all that resuming needs, Trainer's pickles included.

    Left out are `training_args.bin`, which resuming does not read and which holds the Hub's token, and the card that
    PEFT writes. Paths in the configuration and in Trainer's state are replaced.

    Args:
        checkpoint (`str` or `os.PathLike`): A folder "checkpoint-N".
        staged (`str` or `os.PathLike`): Folder to write, which does not exist.

    Raises:
        ValueError: If the base model has no Hub id, or a local path or token is left.
    """
    checkpoint, staged = Path(checkpoint), Path(staged)
    adapter = read_json(checkpoint / ADAPTER_CONFIG_NAME, kind="adapter configuration")
    data = ErasureCardData.load(checkpoint) if (checkpoint / CARD_DATA_NAME).exists() else None
    base_model = base_model_id(None, data, adapter)
    shutil.copytree(checkpoint, staged, ignore=shutil.ignore_patterns(TRAINING_ARGUMENTS_NAME, CARD_NAME))
    _name_base(staged, base_model, data.base_revision if data is not None else None)
    if (staged / TRAINER_STATE_NAME).exists():
        state = read_json(staged / TRAINER_STATE_NAME, kind="state of the training")
        if state.get("best_model_checkpoint"):
            state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
            write_json(staged / TRAINER_STATE_NAME, state)
    _refuse(find_local_traces(staged, vocabularies=VOCABULARIES), "it would publish what is local to this machine")
    return staged


def concept_names(folder: Path, data: ErasureCardData) -> list[str]:
    """The concept and all its aliases, from every file that records them."""
    names = [data.concept, *data.aliases]
    for file, kind in ((ANCHORS_NAME, "anchors' provenance"), (REPORT_NAME, "report")):
        if (folder / file).exists():
            content = read_json(folder / file, kind=kind)
            try:
                names += [content.get("concept"), *check_aliases(content.get("aliases"))]
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file} in {str(folder)!r}: {error}") from error
    names = list(dict.fromkeys(name for name in names if isinstance(name, str) and name.strip()))
    if not names:
        raise ValueError(
            f"nothing in {str(folder)!r} says which name to redact; expected it in {CARD_DATA_NAME} or {ANCHORS_NAME}."
        )
    return names


def _recorded_name(folder: Path) -> str:
    return concept_names(folder, ErasureCardData())[0]


def _check_adapter(folder: Path) -> None:
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {ADAPTER_CONFIG_NAME}; save the adapter there first.")
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        own = REQUEST.sub("", place.as_posix())
        ignored = CHECKPOINT.fullmatch(own.partition("/")[0]) or matches(own, TRAINER_STATE)
        if path.is_file() and not ignored and (path.suffix.lower() in _PICKLE_SUFFIXES or _is_pickle(path)):
            raise ValueError(
                f"{place.as_posix()!r} is or may hold a pickle, which runs code when it is loaded; only safetensors are "
                f"published. {_conversion(place.name)}"
            )
    if not (folder / ADAPTER_NAME).is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {ADAPTER_NAME}; save the adapter there first.")
    try:
        with safe_open(folder / ADAPTER_NAME, framework="pt") as file:
            empty = not list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{ADAPTER_NAME} is damaged ({error}); save the adapter again.") from error
    if empty:
        raise ValueError(f"{ADAPTER_NAME} holds no weights; save the adapter again.")


def _conversion(name: str) -> str:
    if name != "adapter_model.bin":
        return "Move it out of the folder."
    return (
        'Convert it: python -c "import torch, safetensors.torch as s; '
        "s.save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')\", "
        "then move adapter_model.bin out of the folder."
    )


def _is_pickle(path: Path) -> bool:
    """By content: a pickle of protocol 2 or newer, or a zip or tar as torch.save writes it."""
    with path.open("rb") as file:
        head = file.read(512)
    # PROTO, then what objects begin with. The first eight bytes of a safetensors file are a length.
    protocol = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[2:8] != bytes(6)
    return protocol or head[:4] == b"PK\x03\x04" or head[257:262] == b"ustar"


def _copy(folder: Path, staged: Path, patterns: list[str]) -> None:
    left_out = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not matches(name, patterns):
            if path.is_file() and not CHECKPOINT.fullmatch(name.split("/")[0]):
                left_out.append(name)
            continue
        member_path(folder, name)  # Refuses a link out of the folder: what it leads to was never meant to be published.
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, staged / name)
    left_out = [name for name in left_out if name != CARD_NAME]
    if left_out:
        logger.info("Not published: %s (and checkpoints).", ", ".join(left_out))


def _name_base(staged: Path, base_model: str, revision: str | None) -> None:
    """Replaces paths of the base model by its Hub id, in the adapter's and the processor's configuration."""
    for path in staged.glob("*.json"):
        if known(path.name) and path.name not in (ADAPTER_CONFIG_NAME, *PROCESSOR_CONFIGS):
            continue  # a result or a vocabulary
        content = read_json(path, kind="configuration")
        changed = dict(content)
        for key in ("name_or_path", "_name_or_path"):
            if key in content:
                changed[key] = base_model
        if path.name == ADAPTER_CONFIG_NAME:
            changed["base_model_name_or_path"] = base_model
            changed["revision"] = revision or content.get("revision")
        if changed != content:
            path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _redact(staged: Path, data: ErasureCardData, names: list[str], salt: bytes) -> ErasureCardData:
    data = without_name(data, names, salt)
    label = redacted_label(data)
    for file in (file.name for file in FILES if file.redact_values):
        if (staged / file).exists():
            write_json(staged / file, redact_values(read_json(staged / file, kind="result"), names))
    if (staged / REPORT_NAME).exists():
        content = read_json(staged / REPORT_NAME, kind="report")
        write_json(staged / REPORT_NAME, {**redact_values(content, names), "concept": label})
    if (staged / ANCHORS_NAME).exists():
        content = read_json(staged / ANCHORS_NAME, kind="anchors' provenance")
        write_json(staged / ANCHORS_NAME, redact_anchors(content, names, label))
    return data


def _stage_canary(folder: Path, staged: Path, names: list[str], *, images: bool) -> None:
    canary = Canary.load(folder).publishable(names=names, images=images)
    if canary.items:
        canary.save(staged)
    else:
        (staged / CANARY_NAME).unlink()


def is_handwritten(card: Path) -> bool:
    """Whether a person wrote a README.md: it is there, and no library's template left its mark in it."""
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    return not any(template in text for template in _TEMPLATE_TEXTS)


def _write_card(folder: Path, staged: Path, **options: Any) -> None:
    if is_handwritten(folder / CARD_NAME):
        logger.warning("README.md was written by a person and is published as it is; without it a card is generated.")
        text = member_path(folder, CARD_NAME).read_text(encoding="utf-8")
        card = ModelCard(text, ignore_metadata_errors=True)
        data: Any = card.data  # Whatever keys the card has.
        if is_local_path(data.base_model):  # PEFT writes it there, into a card of any kind.
            local, data.base_model = data.base_model, options["base_model"]
            data.tags = [tag.replace(local, options["base_model"]) for tag in data.tags or []] or None
            text = str(card)
        (staged / CARD_NAME).write_text(text, encoding="utf-8")
    else:
        card = erasure_card(staged, **options)
        (staged / CARD_NAME).write_text(str(card), encoding="utf-8")


def _refuse(findings: list[Finding], reason: str) -> None:
    if findings:
        shown = "\n".join(f"  {finding}" for finding in findings[:8])
        more = f"\n  and {len(findings) - 8} more" if len(findings) > 8 else ""
        raise ValueError(
            f"not published, because {reason}:\n{shown}{more}\nRemove it there, or the file, and push again."
        )
