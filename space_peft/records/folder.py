"""The files of an adapter's folder: what each is, whether it is published, and with which result it comes and goes."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


# PEFT's own names, here without importing it.
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
CARD_NAME = "README.md"

SPACE_CONFIG_NAME = "space_config.json"
NULL_SPACES_NAME = "space_stats.safetensors"
FIT_PROGRESS_NAME = "space_fit.safetensors"
ROWS_NAME = "space_rows.json"
LEDGER_NAME = "space_ledger.json"
REQUEST_STATISTICS_NAME = "space_request.safetensors"
REQUESTS_BASE_NAME = "space_base.json"
ANCHORS_NAME = "space_anchors.json"
CARD_DATA_NAME = "space_card.json"
CERTIFICATE_NAME = "space_certificate.json"
CANARY_NAME = "space_canary.json"
CANARY_FOLDER = "canary"
REPORT_NAME = "report.json"
REPORT_TEXT_NAME = "report.md"
ANSWERS_NAMES = ("answers_before.jsonl", "answers_after.jsonl")
ATTACKS_NAME = "attacks.json"
ATTACKS_RUN_NAME = "space_attacks_run.json"
PICTURES_FOLDER = "pictures"
ANCHORS_PICTURE_NAME = "anchors.png"
ATTACKS_PICTURE_NAME = f"{PICTURES_FOLDER}/attacks.png"
MEASURED_NAME = "space_measured.json"
RETAINED_ANSWERS_NAME = "retained_answers.jsonl"
MANIFEST_NAME = "space_manifest.json"
REDACTION_NAME = "space_redaction.json"

TOKENIZER_NAME = "tokenizer.json"
VOCABULARIES = (
    TOKENIZER_NAME, "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
PROCESSOR_CONFIGS = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.json",
)  # fmt: skip
TEMPLATE_NAME = "chat_template.jinja"
TRAINER_STATE_NAME = "trainer_state.json"
TRAINING_ARGUMENTS_NAME = "training_args.bin"
TRAINER_STATE = (
    TRAINING_ARGUMENTS_NAME, "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth",
    TRAINER_STATE_NAME,
)  # fmt: skip

Published = Literal["always", "unless redacted", "images", "answers", "null spaces", "made", "never"]


@dataclass(frozen=True)
class FolderFile:
    """
    A file of an adapter's folder.

    Args:
        name (`str`): Its path in the folder, with forward slashes; `*` stands for any part of a name.
        what (`str`): What it is.
        published (`str`): "always"; "unless redacted", for what may hold the concept's name anywhere; "images",
            "answers", "null spaces": if its author asks for these; "made": not copied, but written for what is
            published; "never".
        result (`str`, *optional*): The result it was measured or drawn with, a file itself: it goes when that goes.
        redact_values (`bool`, defaults to `False`): Whether redacting it is to replace the name in its values as they
            stand. Files with a rule of their own are redacted by that.
    """

    name: str
    what: str
    published: Published
    result: str | None = None
    redact_values: bool = False


FILES = (
    FolderFile(ADAPTER_NAME, "the adapter's weights", "always"),
    FolderFile(ADAPTER_CONFIG_NAME, "the adapter's configuration, as PEFT reads it", "always"),
    FolderFile(CARD_NAME, "the model card", "made"),
    FolderFile(SPACE_CONFIG_NAME, "how the adapter is constrained", "always", redact_values=True),
    FolderFile(CERTIFICATE_NAME, "what it does to retained inputs", "always", CERTIFICATE_NAME, redact_values=True),
    FolderFile(NULL_SPACES_NAME, "the null spaces, from which the bounds are computed again", "null spaces"),
    FolderFile(LEDGER_NAME, "the requests that were served one after another", "always", redact_values=True),
    FolderFile(ANCHORS_NAME, "where the anchors came from", "always"),
    FolderFile(CARD_DATA_NAME, "facts for the model card", "always"),
    FolderFile(CANARY_NAME, "questions with the answers after training", "always", CANARY_NAME),
    FolderFile(f"{CANARY_FOLDER}/*.png", "the canary's images", "images", CANARY_NAME),
    FolderFile(REPORT_NAME, "what was forgotten and what was kept", "always", REPORT_NAME),
    FolderFile(REPORT_TEXT_NAME, "the same, to read", "unless redacted", REPORT_NAME),
    *(FolderFile(name, "every answer of the evaluation", "answers", REPORT_NAME) for name in ANSWERS_NAMES),
    *(
        FolderFile(f"{PICTURES_FOLDER}/{name}.png", "the same, drawn", "unless redacted", REPORT_NAME)
        for name in ("answers", "sentences", "probes")
    ),
    FolderFile(ATTACKS_NAME, "what attacks found", "always", ATTACKS_NAME, redact_values=True),
    FolderFile(ATTACKS_PICTURE_NAME, "the same, drawn", "unless redacted", ATTACKS_NAME),
    FolderFile(ATTACKS_RUN_NAME, "what the attacks were made with, to go on with them", "never", ATTACKS_NAME),
    # Not under pictures/: these are somebody's.
    FolderFile(ANCHORS_PICTURE_NAME, "the anchors, each beside the public image that it was", "never"),
    FolderFile("attacks.png", "the same, as earlier versions wrote it", "unless redacted", ATTACKS_NAME),
    FolderFile(f"{PICTURES_FOLDER}/*.png", "pictures of the erasure", "unless redacted"),
    FolderFile(MEASURED_NAME, "which weights the results were measured on", "never"),
    FolderFile(MANIFEST_NAME, "hashes of what was published", "made"),
    FolderFile(REDACTION_NAME, "the salt of the redacted name", "never"),
    FolderFile(
        RETAINED_ANSWERS_NAME, "the model's own answers to retained rows that had none, to go on with them", "never"
    ),
    FolderFile(FIT_PROGRESS_NAME, "sums of an interrupted fit", "never"),
    FolderFile(ROWS_NAME, "rows found while training, in a checkpoint", "never"),
    FolderFile(REQUEST_STATISTICS_NAME, "what the model saw of a served request", "never"),
    FolderFile(REQUESTS_BASE_NAME, "the model that served requests are of, and how they were served", "never"),
    *(FolderFile(name, "the processor's settings", "unless redacted") for name in (*PROCESSOR_CONFIGS, TEMPLATE_NAME)),
    FolderFile("additional_chat_templates/*.jinja", "more chat templates", "unless redacted"),
    # A vocabulary holds most names as words; processor and tokenizer are the base model's anyway.
    *(FolderFile(name, "the tokenizer's vocabulary", "unless redacted") for name in VOCABULARIES),
    *(FolderFile(name, "the state of the training", "never") for name in TRAINER_STATE),
)
FOLDERS = (
    ("anchors", "the anchors with their images, from which a call that was killed goes on"),
    ("checkpoint-*", "the training as it was after so many steps"),
)
RESULTS = tuple(file.name for file in FILES if file.result == file.name)
"""Files that say something of the weights beside them."""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path in the folder is one of these names or patterns."""
    return any(fnmatch.fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns)


def known(name: str) -> FolderFile | None:
    """What the table says of a path in the folder."""
    return next((file for file in FILES if matches(name, [file.name])), None)


def to_publish(
    *, redact: bool = False, images: bool = False, answers: bool = False, null_spaces: bool = False
) -> list[str]:
    """Names and patterns of what is copied to be published.

    Args:
        redact (`bool`, defaults to `False`): Whether the concept's name is withheld; images and answers then are, too.
        images, answers, null_spaces (`bool`, defaults to `False`): Whether the author asks for them.
    """
    asked = {"always": True, "unless redacted": not redact, "null spaces": null_spaces}
    asked |= {"images": images and not redact, "answers": answers and not redact}
    return [file.name for file in FILES if asked.get(file.published, False)]


def contents(folder: str | os.PathLike) -> list[tuple[list[str], str]]:
    """What lies in an adapter's folder: names, or the pattern of several, and what they are, in the order of the table.

    Args:
        folder (`str` or `os.PathLike`): The folder. What is not of this package is left out.
    """
    folder = Path(folder)
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    found: dict[tuple[str, str | None], list[str]] = {}
    for file in FILES:
        # Of files that a pattern stands for the pattern: their names may be anything, and this stands on a card.
        if any(known(name) is file for name in there):
            found.setdefault((file.what, file.result), []).append(file.name)
    for pattern, what in FOLDERS:
        if any(path.is_dir() for path in folder.glob(pattern)):
            found[what, None] = [f"{pattern}/"]
    return [(names, what) for (what, _), names in found.items()]


def contents_table(folder: str | os.PathLike) -> str:
    """The same, as aligned text.

    Args:
        folder (`str` or `os.PathLike`): The folder.
    """
    rows = [(name, what) for names, what in contents(folder) for name in names]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {what}" for name, what in rows)


def beside(result: str) -> list[str]:
    """Names and patterns of what comes and goes with a result, the result itself included."""
    return [file.name for file in FILES if file.result == result]
