"""Several names in one call: one erasure after another, none of which brings back what an earlier one took away."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import AutoProcessor

from .config import SpaceLoraConfig
from .data.names import check_aliases, check_concept
from .data.questions import DEFAULT_QUESTIONS
from .distributed.processes import rank_and_size
from .erasing import default_adapter, erase, erase_stages, next_steps
from .modeling.checksum import base_checksum
from .modeling.fingerprint import BaseFingerprint, compare_base
from .modeling.loading import load_model
from .records.folder import ADAPTER_NAME, LEDGER_NAME, REPORT_NAME, REQUESTS_BASE_NAME, RETAINED_ANSWERS_NAME
from .records.io import write_json
from .records.measured import remove_results, saved_digest
from .records.safe_json import read_json
from .records.stages import end, say, stages
from .retained.reading import RetainedRows
from .retained.self_distillation import answer_missing
from .trainers import ErasureLedger, SpaceConfig
from .trainers.checkpoints import remove_needless_checkpoint, settings_of


if TYPE_CHECKING:
    from peft import PeftModel

    from .evaluation import ErasureReport, Probe


REQUESTS_FOLDER = "requests"


@dataclass
class Erasures:
    """
    What [`erase_several`] did.

    Args:
        model ([`~peft.PeftModel`]): The original model with one adapter for all names.
        ledger ([`ErasureLedger`]): The requests, in order.
        folder (`pathlib.Path`): Where the adapter is; each request's own folder is in it.
    """

    model: PeftModel
    ledger: ErasureLedger
    folder: Path

    def reports(self) -> dict[str, ErasureReport]:
        """By name, what was asked before and after that request; only for those with probes."""
        from .evaluation import ErasureReport

        places = {own["concept"]: self.ledger.place(number) for number, own in enumerate(self.ledger.requests, 1)}
        return {name: ErasureReport.load(place) for name, place in places.items() if (place / REPORT_NAME).is_file()}

    def verdicts(self) -> dict[str, str]:
        """By name, [`ErasureReport.verdict`]; only for those with probes."""
        return {name: report.verdict for name, report in self.reports().items()}

    def to_dict(self) -> dict[str, Any]:
        """What was done, as JSON values."""
        reports = {name: report.to_dict() for name, report in self.reports().items()}
        return {
            "folder": str(self.folder), "requests": self.ledger.requests, "verdicts": self.verdicts(), "reports": reports,
        }  # fmt: skip

    def summary(self) -> str:
        """What was done, and what to do next."""
        failed = [name for name, verdict in self.verdicts().items() if verdict != "erased"]
        again = "Give more anchors, refine_steps or max_steps, and start again with --fresh: names that were erased stay as they are."
        lines = [f"NOT ERASED: {', '.join(map(repr, failed))}; see the tables. {again}\n"] if failed else []
        lines += [f"{report.to_table()}\n" for report in self.reports().values()]
        lines += [
            f"{number}. {own['concept']!r}: {own['steps']} steps, {own['date']}, {self.ledger.place(number)}"
            for number, own in enumerate(self.ledger.requests, 1)
        ]
        return "\n".join(
            [
                *lines,
                f"One adapter for all of them is in {self.folder}. Next, the first two for each name:",
                f"  look      space-peft evaluate --adapter {self.folder} --concept NAME --images PICTURES",
                f"  attack    space-peft attack --adapter {self.folder} --concept NAME --images PICTURES",
                *next_steps(self.folder, failed=bool(failed)),
            ]
        )


def request_folder(folder: str | os.PathLike, number: int) -> Path:
    """The folder in which [`erase_several`] serves its n-th request.

    Args:
        folder (`str` or `os.PathLike`): Of them all.
        number (`int`): From 1.
    """
    return Path(folder, f"{number:03d}")


def erase_several(
    model,
    concepts: Sequence[str],
    *,
    pool: Dataset,
    aliases: Mapping[str, Sequence[str]] | None = None,
    probes: Mapping[str, Sequence[Probe]] | None = None,
    processor=None,
    args: SpaceConfig | None = None,
    peft_config: SpaceLoraConfig | None = None,
    resume: bool = True,
    **options,
) -> Erasures:
    """Makes a model forget names one after another, none of which a later one brings back; see [`ErasureLedger`].

    A call that was killed goes on with the request where it was. More names may be added to `concepts` later.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): See [`erase`].
        concepts (`list[str]`): The names, in order.
        pool ([`~datasets.Dataset`]): See [`erase`].
        aliases (`dict[str, list[str]]`, *optional*): By name, other names of it.
        probes (`dict[str, list[Probe]]`, *optional*): By name, what to ask before and after.
        processor ([`~transformers.ProcessorMixin`], *optional*): See [`erase`].
        args ([`SpaceConfig`], *optional*): Of each request's training. `output_dir` gets the one adapter, a folder for each
            request, and in `requests` what was served.
        peft_config ([`SpaceLoraConfig`], *optional*): Of each request.
        resume (`bool`, defaults to `True`): Whether to go on from what an earlier call left; else its requests are removed.
            Names that were erased stay as they are; where that was with other settings, it is said.
        options: Other arguments of [`erase`].

    Returns:
        [`Erasures`]

    Raises:
        TypeError: If `concepts` is a single text.
        ValueError: If a name is none or stands there twice, `aliases` or `probes` are of a name that is not among them, or the
            folder holds requests for other names or of another model, or an adapter of another run.
    """
    if isinstance(concepts, str):
        raise TypeError(
            f"expected `concepts` to be a list of names, got the string {concepts!r}: write [{concepts!r}]."
        )
    concepts = [check_concept(concept) for concept in concepts]
    if not concepts or len(set(concepts)) < len(concepts):
        raise ValueError(f"`concepts` must be one or more different names, got {concepts}.")
    aliases, probes = _by_name(aliases, concepts, "aliases"), _by_name(probes, concepts, "probes")
    args = SpaceConfig(output_dir="space-output") if args is None else args
    folder = Path(args.output_dir)
    place = folder / REQUESTS_FOLDER
    if not resume and (place / LEDGER_NAME).is_file():
        shutil.rmtree(place)
    if (folder / ADAPTER_NAME).is_file() and not (folder / LEDGER_NAME).is_file():
        # Its certificate and constraint would stand beside, and be taken for those of, the one adapter.
        raise ValueError(f"{str(folder)!r} holds an adapter of another run; choose another `output_dir`.")
    ledger = ErasureLedger(place)
    served = [(own["concept"], list(own["aliases"])) for own in ledger.requests]
    wanted = [(concept, list(check_aliases(aliases.get(concept), concept=concept))) for concept in concepts]
    if served != wanted[: len(served)]:
        raise ValueError(
            f"{str(place)!r} holds the requests {[name for name, _ in served]} (with their aliases), which are not the first of "
            f"{concepts}. Name them first, choose another `output_dir`, or start again."
        )
    if processor is None:
        processor = AutoProcessor.from_pretrained(model if isinstance(model, str) else model.config._name_or_path)
    if isinstance(model, str):
        model = load_model(model, **args.init_kwargs)
    noted = read_json(place / REQUESTS_BASE_NAME, kind="checksum of a model") if served else {}
    weights = base_checksum(model)
    if served and not _same_model(noted, model, weights):
        raise ValueError(
            f"the requests in {str(place)!r} were served by another model than this one; choose another `output_dir`, or load "
            "the model that they are of."
        )
    settings = _settings(args, peft_config, options)
    made_with: dict[str, Any] = {name: noted.get("settings", {}).get(name) for name, _ in served}
    for name, before in made_with.items():
        if before is not None and before != settings:
            keys = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
            warnings.warn(
                f"{name!r} was erased with other settings ({', '.join(keys)}) and stays as it is; `resume=False` starts again.",
                stacklevel=2,
            )
    base = {"weights": weights, "settings": made_with}
    write_json(place / REQUESTS_BASE_NAME, base)
    original = copy.deepcopy(model)
    model = ledger.fold(model)
    retained = options.pop("retain_dataset", None)
    if retained is not None:
        retained = RetainedRows.of(retained, unanswered=True)
    shown = options.get("progress", True) and rank_and_size()[0] == 0
    refined = options.get("refine_steps", 1) > 0
    keys = several_stages(concepts[len(served) :], probes, args, peft_config, retained, refined=refined)
    with stages(keys, show=shown):
        if retained is not None and len(served) < len(concepts):
            # Once, by the model that has forgotten nothing yet; an answer that says any of the names is left out.
            questions = options.get("questions") or DEFAULT_QUESTIONS
            retained = answer_missing(
                original, processor, retained,
                questions=(*questions.naming, *questions.open), names=[name for one, own in wanted for name in (one, *own)],
                cache=folder / RETAINED_ANSWERS_NAME, resume=resume, progress=options.get("progress", True),
            )  # fmt: skip
        for number, concept in enumerate(concepts[len(served) :], len(served) + 1):
            if shown:
                end()
                say(f"space-peft: erasing {concept!r}, {number} of {len(concepts)}")
            own = copy.deepcopy(args)
            own.output_dir = str(request_folder(folder, number))
            erasure = erase(
                model, concept, pool=pool, processor=processor, aliases=aliases.get(concept, ()),
                retain_dataset=retained, probes=probes.get(concept), args=own, peft_config=copy.deepcopy(peft_config),
                resume=resume, protect=ledger.protect, keep_model=original, **options,
            )  # fmt: skip
            made_with[concept] = settings
            write_json(place / REQUESTS_BASE_NAME, base)
            model = ledger.add(erasure.trainer)
            remove_needless_checkpoint(erasure.trainer)
    stacked = ledger.stack(original)
    if not (folder / LEDGER_NAME).is_file():
        # Before the adapter: by it a call that is killed between them knows the adapter for its own.
        write_json(folder / LEDGER_NAME, read_json(place / LEDGER_NAME, kind="ledger"))
    stacked.save_pretrained(folder)
    remove_results(folder, saved_digest(folder), None)  # What an evaluation found before another name was erased.
    write_json(folder / LEDGER_NAME, read_json(place / LEDGER_NAME, kind="ledger"))
    return Erasures(stacked, ledger, folder)


def several_stages(
    concepts: Sequence[str],
    probes: Mapping[str, Any] | None,
    args: SpaceConfig,
    peft_config: SpaceLoraConfig | None,
    retained: RetainedRows | None,
    *,
    refined: bool = True,
) -> list[str]:
    """Keys of the stages of [`erase_several`], for who shows them among their own.

    Args:
        concepts, probes, args, peft_config, retained, refined: What it is given; see [`erase_stages`].
    """
    given = {
        "refined": refined, "retained": retained is not None,
        "unanswered": retained is not None and bool(retained.unanswered),
    }  # fmt: skip
    adapter = peft_config or default_adapter()
    keys = [
        key
        for concept in concepts
        for key in erase_stages(args, adapter, probes=bool((probes or {}).get(concept)), **given)
    ]
    # The model is asked for answers once, before the first of several.
    once = ["retain"] if "retain" in keys and len(concepts) > 1 else []
    return [*once, *(key for key in keys if not once or key != "retain")]


def _by_name(given: Mapping[str, Any] | None, concepts: Sequence[str], what: str) -> dict[str, Any]:
    """What is given by name, by the names as they are erased.

    Raises:
        ValueError: If some of it is of another name, and would be passed over.
    """
    own = {check_concept(name): value for name, value in (given or {}).items()}
    if unknown := [name for name in own if name not in concepts]:
        raise ValueError(f"`{what}` holds {unknown[0]!r}, which is none of the names to erase: {concepts}.")
    return own


def _same_model(noted: Mapping[str, Any], model, weights: str) -> bool:
    """Whether what is noted is of this model, whose `base_checksum` is `weights`."""
    if "exact" in noted:  # Of version 0.2.0: a few numbers of a few weights.
        different, compared = compare_base(model, BaseFingerprint.from_dict(noted))
        return compared > 0 and not different
    return noted.get("weights") == weights


def _settings(args: SpaceConfig, peft_config: SpaceLoraConfig | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """With what each name is erased, as far as it is plain values."""
    plain = {
        key: value for key, value in options.items() if key != "progress" and isinstance(value, (bool, int, float, str))
    }
    return {**settings_of(args, peft_config or default_adapter()), **plain}
