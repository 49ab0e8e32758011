"""`verify_erasure`: is a published erasure what it says, as a report with a line for every check."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.errors import HTTPError
from peft import PeftModel
from PIL import Image
from torch import nn

from space_peft.attacks.audit import audit_concept
from space_peft.attacks.models import answers_naming, check_vocabulary
from space_peft.canary.check import MIN_MARGIN, Canary, check_canary
from space_peft.choices import DtypeName
from space_peft.data.names import check_concept
from space_peft.data.questions import QuestionSet, questions_of
from space_peft.modeling.layers import deployed_model
from space_peft.modeling.loading import UnknownArchitectureError, check_dtype
from space_peft.modeling.prompts import conversation
from space_peft.records.card_data import ErasureCardData
from space_peft.records.escape import plain_line
from space_peft.records.folder import (
    ANCHORS_NAME,
    CANARY_NAME,
    CARD_DATA_NAME,
    REPORT_NAME,
    TOKENIZER_NAME,
)
from space_peft.records.safe_json import read_json
from space_peft.records.stages import STAGES, begin, done, in_stages
from space_peft.retained.reading import RetainedRows

from .certificate_checks import FAILED, NOT_CHECKED, OK, Check, check_bound, check_certificate, check_retained
from .file_checks import check_contents, check_hashes, check_no_code
from .load import (
    adapter_keys,
    attach_adapter,
    canary_conversations,
    canary_problems,
    load_base,
)
from .processor import load_processor, tokenizer_problem
from .source import AdapterSource, fetch, recorded_base


_ASKED = ("canary", "retained data", "name")
_BEHAVIOUR = ("base model", "certificate", "bound", "processor", *_ASKED)
# Pictures that the search for an image starts from, beside noise.
_STARTS = 8


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
    audit: bool = False,
    concept: str | None = None,
    images: Sequence[Image.Image] | None = None,
    question: str | None = None,
    steps: int = 100,
    dtype: DtypeName | torch.dtype | None = None,
) -> VerifyReport:
    """Checks everything about an erasure that can be checked without trusting its author.

    That the files are those that were published (hashes), that each of them says something sensible and none can run
    code, that the adapter is `s B A` on linear layers of the recorded base model and nothing else, that the certificate
    is of these weights, that its bounds follow from them and the statistics (if those are published), that the canary's
    questions are answered as after training, and, on retained data, that the certificate's measured change can be
    measured again. What cannot be checked is said to be not checked. If files were changed, nothing of them is loaded.

    Whoever can rewrite the whole folder can publish another adapter with a true certificate of its own: pin `revision`.

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
        audit (`bool`, defaults to `False`): Whether to search for an image that makes the model say the name, see
            [`audit_concept`]: from your first eight `images`, if there are some, and from noise.
        concept (`str`, *optional*): The name to ask and to search for; by default the one recorded.
        images (`list[PIL.Image.Image]`, *optional*): Your own pictures of the concept: none may be named any more.
        question (`str`, *optional*): What is asked about them, instead of the library's questions.
        steps (`int`, defaults to 100): Of the search, from each start.
        dtype (`str` or `torch.dtype`, *optional*): To load the base model in; float32 by default, for it runs on a CPU.

    Returns:
        [`VerifyReport`]: Its `exit_code` is 1 if anything failed.

    Raises:
        ValueError: If there is no such folder, the retained dataset is in no known format, `concept` is no name, or `dtype`
            none.
        huggingface_hub.errors.HfHubHTTPError: If the repository cannot be downloaded.
        ConnectionError: If the connection breaks.
    """
    check_dtype(dtype)
    concept = None if concept is None else check_concept(concept)
    begin("files")
    source = fetch(repo_or_folder, revision=revision, token=token)
    rows = None if retain_dataset is None else RetainedRows(retain_dataset)
    searched = None
    if audit or images is not None:
        searched = _Audit(concept, tuple(images or ()), questions_of(question), steps if audit else None)
    checks = [check_no_code(source), *check_hashes(source)]
    # Each stage trusts what the one before has found.
    stages = {
        ("content",): lambda: check_contents(source),
        _BEHAVIOUR: lambda: _behaviour(
            source, base_model, token=token, rows=rows, ask=canary, audit=searched, dtype=dtype
        ),
    }
    for names, stage in stages.items():
        if any(check.status == FAILED for check in checks):
            checks += [Check(name, NOT_CHECKED, "the files are not what they should be") for name in names]
        else:
            checks += stage()
    return VerifyReport(plain_line(repo_or_folder), source.commit, tuple(checks))


@dataclass(frozen=True)
class _Audit:
    """What to ask and search for; `steps` is None where only the pictures are asked about."""

    concept: str | None
    images: tuple[Image.Image, ...]
    questions: QuestionSet
    steps: int | None


def _behaviour(
    source: AdapterSource,
    base_model: Any,
    *,
    token: str | bool | None,
    rows: RetainedRows | None,
    ask: bool,
    audit: _Audit | None,
    dtype: Any,
) -> list[Check]:
    """The checks that need the model."""
    recorded = recorded_base(source)
    name = "base model"
    begin("load")
    options = {} if isinstance(base_model, nn.Module) else {"dtype": dtype}
    try:
        model = attach_adapter(source, load_base(recorded, base_model, token=token, **options))
    except UnknownArchitectureError as error:  # Not known here: that says nothing against the adapter.
        return [Check(rest, NOT_CHECKED, f"{error}" if rest == name else "no model") for rest in _BEHAVIOUR]
    except (OSError, ValueError, TypeError, HTTPError) as error:
        done("the model could not be loaded")
        checks = [Check(name, FAILED, f"{error}")]
        return checks + [Check(rest, NOT_CHECKED, "no model") for rest in _BEHAVIOUR[1:]]
    model.eval()
    weights = len(adapter_keys(source.folder))
    place = recorded.name if base_model is None else getattr(model.config, "_name_or_path", "")
    checks = [Check(name, OK, f"{place or 'as given'}; all {weights} weights of the adapter have their place in it")]
    begin("claims")
    checks += [check_certificate(source, model), check_bound(source, model)]
    done(f"checked certificate and bound: {', '.join(check.status for check in checks[1:])}")
    stored = source.read(CANARY_NAME, Canary.load) if (source.folder / CANARY_NAME).is_file() else None
    asked = [] if stored is None else canary_conversations(stored)
    if rows is not None:
        asked += [rows[i]["prompt"] + rows[i]["completion"] for i in range(len(rows))]
    if audit is not None:
        asked += [
            conversation(question)["prompt"] for question in (*audit.questions.naming[:1], *audit.questions.open[:1])
        ]
    try:
        processor = load_processor(source, model, recorded, asked, token=token)
        problem = tokenizer_problem(source.folder, processor)
    except (OSError, ValueError) as error:
        status = NOT_CHECKED if isinstance(error, OSError) else FAILED
        checks.append(Check("processor", status, f"{error}"))
        return checks + [Check(rest, NOT_CHECKED, "no processor to ask with") for rest in _ASKED]
    if problem is not None:
        checks.append(Check("processor", FAILED, problem, TOKENIZER_NAME))
        return checks + [Check(rest, NOT_CHECKED, "the tokenizer is not the base model's") for rest in _ASKED]
    checks.append(Check("processor", OK, "the base model's, with nothing else in it"))
    if ask:
        checks.append(_stage("questions", lambda: _canary(source, model, processor)))
    else:
        checks.append(Check("canary", NOT_CHECKED, "not asked for"))
    if rows is not None:
        checks.append(_stage("change", lambda: check_retained(source, model, rows, processor)))
    else:
        checks.append(Check("retained data", NOT_CHECKED, "none given"))
    if audit is not None:
        checks.append(_stage("name", lambda: _said(source, model, processor, audit)))
    else:
        why = "not asked for: --audit searches for the name, --images shows your pictures"
        checks.append(Check("name", NOT_CHECKED, why))
    return checks


def _stage(key: str, check: Callable[[], Check]) -> Check:
    """A check that takes a while: a stage of its own."""
    begin(key)
    found = check()
    done(f"{STAGES[key][1]}: {found.status}")
    return found


def _canary(source: AdapterSource, model: PeftModel, processor: Any) -> Check:
    name = "canary"
    if not (source.folder / CANARY_NAME).is_file():
        return Check(name, NOT_CHECKED, f"no {CANARY_NAME}")
    canary = source.read(CANARY_NAME, Canary.load)
    result = check_canary(model, processor, canary)
    if problems := canary_problems(result):
        return Check(name, FAILED, " ".join(problems), CANARY_NAME)
    if result.max_log_prob_change > result.rounding:
        return Check(
            name,
            FAILED,
            f"an answer's log-probability is {result.max_log_prob_change:.2g} nats from the one recorded; rounding explains "
            f"{result.rounding:.2g}",
            CANARY_NAME,
        )
    if not result.count:
        return Check(name, NOT_CHECKED, f"no question had answers surer than {MIN_MARGIN:g} nats")
    if not result.telling:
        return Check(
            name,
            NOT_CHECKED,
            f"the {result.count} expected answers are the same with and without the adapter, and their log-probabilities are "
            "closer than rounding can tell, so they say nothing of it "
            "(images of anchors, which would, are published with --include-images); "
            f"{result.base_compared} weights of the base model are as recorded",
        )
    if result.max_log_prob_change > result.seen:
        return Check(
            name,
            NOT_CHECKED,
            f"the {result.count} answers are those after training, but a log-probability is {result.max_log_prob_change:.2g} "
            f"nats from the one recorded: more than the rounding seen here without the adapter ({result.seen:.2g}), less than "
            f"{model.dtype} may make of it ({result.rounding:.2g})",
            CANARY_NAME,
        )
    message = (
        f"{result.count} questions are answered as after training, {result.telling} of them differently, or more or "
        f"less surely, than without the adapter; log-probabilities within {result.max_log_prob_change:.2g} nats; "
    )
    if result.base_compared:
        return Check(name, OK, message + f"{result.base_compared} weights of the base model as recorded")
    return Check(name, OK, message + "the base model's weights could not be compared (quantised or renamed)")


def _said(source: AdapterSource, model: PeftModel, processor: Any, audit: _Audit) -> Check:
    """Whether the name is said about the checker's pictures, and whether a search finds one about which it is."""
    name = "name"
    concept = audit.concept or _recorded_concept(source)
    if concept is None:
        return Check(name, NOT_CHECKED, "the folder does not say which name was erased; give it (--concept)")
    try:
        check_vocabulary(processor, [check_concept(concept)])
    except ValueError as error:
        return Check(name, FAILED if audit.concept is None else NOT_CHECKED, f"{error}")
    told: list[str] = []
    failures: list[str] = []
    idle: list[str] = []
    if audit.images:
        asked = (*audit.questions.naming[:1], *audit.questions.open[:1])
        with deployed_model(model):
            before = sum(answers_naming(model, processor, audit.images, asked, [concept]))
        after = sum(answers_naming(model, processor, audit.images, asked, [concept]))
        counts = f"of the {len(audit.images)} pictures given, the base model names {before} as {concept!r}, this model {after}"
        (failures if after else told if before else idle).append(counts)
    if audit.steps is not None:
        result = audit_concept(
            model,
            processor,
            concept,
            images=audit.images[:_STARTS],
            questions=audit.questions,
            steps=audit.steps,
            progress=in_stages(),
        )
        assert result.before is not None  # The model carries the adapter.
        counts = (
            f"{audit.steps} steps from {len(result.starts)} starts found {sum(result.after.named)} images named {concept!r} "
            f"(largest p {result.after.best:.2g}), without the adapter {sum(result.before.named)} ({result.before.best:.2g})"
        )
        (failures if any(result.after.named) else told if any(result.before.named) else idle).append(counts)
    if failures:
        return Check(name, FAILED, "; ".join(failures + told + idle))
    if told:
        return Check(name, OK, "; ".join(told + [f"{part}: that says nothing" for part in idle]))
    return Check(name, NOT_CHECKED, "; ".join(idle) + ": the base model does not say it either, so this shows nothing")


def _recorded_concept(source: AdapterSource) -> str | None:
    """The erased name as the author says; not one that is withheld."""
    folder, names = source.folder, []
    if (folder / CARD_DATA_NAME).is_file():
        data = source.read(CARD_DATA_NAME, ErasureCardData.load)
        if data.redact or data.redaction is not None:
            return None
        names.append(data.concept)
    for file in (ANCHORS_NAME, REPORT_NAME):
        if (folder / file).is_file():
            names.append(read_json(folder / file, kind="record of the concept").get("concept"))
    return next((name for name in names if isinstance(name, str) and name.strip()), None)
