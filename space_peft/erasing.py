"""The whole job in one call: a name, a model and a public pool in; an adapter with its certificate and report out."""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, load_from_disk
from peft import get_peft_model_state_dict
from transformers import AutoProcessor
from transformers.utils.logging import get_logger

from .anchors import anchor_info, refine_anchors, select_anchors
from .anchors.encoders import OwnSpaceEncoder
from .anchors.info import anchor_questions, set_anchor_info
from .anchors.pool import open_pool
from .anchors.refine import known_by_anchors
from .config import SpaceLoraConfig
from .data.names import check_aliases, check_concept
from .data.questions import DEFAULT_QUESTIONS, QuestionSet
from .data.source import dataset_source
from .distributed.processes import rank_and_size
from .evaluation.before_after import warn_if_not_named
from .hub_cards.card import STAGES
from .hub_cards.merge import merge_adapter
from .modeling.loading import load_model
from .null_space.base_statistics import Statistics, load_statistics
from .records.durations import duration
from .records.folder import ADAPTER_NAME, CARD_NAME, REPORT_TEXT_NAME, RETAINED_ANSWERS_NAME, contents_table
from .records.io import atomic_path
from .records.places import refuse_missing
from .records.stages import begin, done, stages
from .retained.reading import RetainedRows
from .retained.self_distillation import answer_missing
from .trainers import SpaceConfig, SpaceTrainer
from .trainers.checkpoints import last_complete_checkpoint, remove_needless_checkpoint, run_identity
from .trainers.progress import training_stages
from .trainers.refusals import check_job, check_model


if TYPE_CHECKING:
    import torch

    from .evaluation import ErasureReport, Probe
    from .null_space.certificate import RetentionCertificate


logger = get_logger(__name__)

ANCHORS_FOLDER = "anchors"
# Arguments of `select_anchors` on which its result does not depend.
_HOW_FAST = ("batch_size", "cache_dir", "progress")
_COLUMNS = ("image_column", "caption_column", "id_column")


@dataclass
class Erasure:
    """
    What [`erase`] did.

    Args:
        trainer ([`SpaceTrainer`]): Trained, with the adapted model as `trainer.model`.
        anchors ([`~datasets.Dataset`]): The images that stood in for the concept.
    """

    trainer: SpaceTrainer
    anchors: Dataset

    @property
    def model(self):
        """The model with the adapter in it, a [`~peft.PeftModel`]."""
        return self.trainer.model

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        """The adapter's weights, by the names that [`Erasure.save`] gives them in `adapter_model.safetensors`."""
        return get_peft_model_state_dict(self.trainer.accelerator.unwrap_model(self.model))

    @property
    def certificate(self) -> RetentionCertificate | None:
        """What the adapter does to held-out retained rows; `None` if none were held out."""
        return self.trainer.certificate

    @property
    def report(self) -> ErasureReport | None:
        """What was asked before and after; `None` without probes."""
        return self.trainer.report

    def verdicts(self) -> dict[str, str]:
        """By name, [`ErasureReport.verdict`]; empty without probes."""
        return {} if self.report is None else {self.trainer.concept: self.report.verdict}

    def save(self) -> Path:
        """Saves adapter, certificate, report, card and provenance to the configuration's `output_dir`.

        Checkpoints that the configuration asks for stay. The one that Trainer writes at the last step in any case, from
        which a killed call would go on, is removed.

        The card of an adapter whose base model was loaded from a folder says "a local model"; to publish it, give the
        model's id on the Hub: `card_data=ErasureCardData(base_model=...)`.
        """
        self.trainer.save_model()
        self.trainer.create_model_card()
        remove_needless_checkpoint(self.trainer)
        return Path(self.trainer.args.output_dir)

    def push_to_hub(self, repo_id: str | None = None, **kwargs):
        """Saves and publishes; see [`SpaceTrainer.push_to_hub`].

        Args:
            repo_id (`str`, *optional*): By default `hub_model_id` of the configuration.
            kwargs: See there.
        """
        if repo_id is not None:
            self.trainer.args.hub_model_id = self.trainer.hub_model_id = repo_id
        return self.trainer.push_to_hub(**kwargs)

    def merge(self, output: str | os.PathLike) -> Path:
        """Saves, and writes the base model with the adapter added to its weights.

        Args:
            output (`str` or `os.PathLike`): Folder; must not exist.
        """
        base = self.trainer.model.peft_config["default"].base_model_name_or_path
        return merge_adapter(self.save(), output, base_model=base)

    def to_dict(self) -> dict[str, Any]:
        """What was done, as JSON values: names, folder, the report and the certificate if there are any."""
        parts = {"report": self.report, "certificate": self.certificate}
        return {
            "concept": self.trainer.concept,
            "aliases": list(self.trainer.aliases),
            "folder": str(self.trainer.args.output_dir),
            "verdicts": self.verdicts(),
            **{key: None if part is None else part.to_dict() for key, part in parts.items()},
        }

    def summary(self) -> str:
        """What was done, and what to do next."""
        folder, report = self.trainer.args.output_dir, self.report
        files = contents_table(folder)
        failed = report is not None and report.verdict in ("partly", "failed", "not known before")
        lines = [] if report is None else [report.to_table(), ""]
        if failed:
            lines = [self._not_erased(), "", *lines]
        if (known := known_by_anchors(self.anchors)) is not None:
            lines.append(
                f"The model called its {len(self.anchors)} anchors {self.trainer.concept!r} with p = {known[0]:.3f} on average."
                + (
                    ""
                    if known[1]
                    else " It may not know the concept by this name, and then there was little to forget."
                )
            )
        if report is None:
            lines.append(
                "Nothing was asked about pictures of the concept: pass some, or look yourself, before you rely on it."
            )
        if self.certificate is None:
            lines.append("No retained rows were held out, so there is no certificate.")
        elif (statement := self.certificate.end_to_end) is not None:
            lines.append(
                f"Of {statement.images + statement.texts} held-out images and texts, {statement.changed} are answered "
                f"differently; of others like them, less than {statement.share_bound:.1%} (95 %)."
            )
        if seconds := self.trainer.card_data.seconds if report is None else report.seconds:
            in_order = {stage: seconds[stage] for stage in STAGES if stage in seconds} | seconds
            told = ", ".join(f"{STAGES.get(stage, stage)} {duration(taken)}" for stage, taken in in_order.items())
            lines.append(f"It took {duration(sum(seconds.values()))}: {told}.")
        lines += [
            f"In {folder}:" if files else f"Nothing is saved yet; it goes to {folder}.",
            *([files] if files else []),
            "Next:",
            f"  look      {folder}/{REPORT_TEXT_NAME if report is not None else CARD_NAME}",
            f"  audit     space-peft audit --adapter {folder} --concept {shlex.quote(self.trainer.concept)}",
            *next_steps(folder, failed=failed),
        ]
        return "\n".join(lines)

    def _not_erased(self) -> str:
        assert self.report is not None
        before, after = self.report.before["forget"], self.report.after["forget"]
        if self.report.verdict == "not known before":
            return (
                f"NOTHING SHOWN: {self.trainer.concept!r} was named on {before['value']:.0%} of {before['n']} test pictures before "
                f"anything was erased, and is on {after['value']:.0%} now. Ask the model about other pictures, by the name that "
                "it gives them."
            )
        return (
            f"NOT ERASED: {self.trainer.concept!r} is still named on {after['value']:.0%} of {after['n']} test pictures "
            f"({before['value']:.0%} before). Give more anchors, refine_steps or max_steps, or a larger learning_rate; "
            "anchors that the model does not call by the name (below) teach it nothing."
        )


def next_steps(folder: str | os.PathLike, *, failed: bool) -> list[str]:
    """What to do with an adapter once it was looked at and attacked, as lines.

    Args:
        folder (`str` or `os.PathLike`): Where it is.
        failed (`bool`): Whether the name is still said, so that it is good for nothing.
    """
    if failed:
        return ["  again     with more of what is said above; do not deploy or publish this one"]
    return [
        f"  deploy    space-peft merge {folder} MODEL-WITHOUT-IT",
        f"  publish   space-peft push {folder} YOU/NAME, and others: space-peft verify YOU/NAME",
        "  undo      load the model without the adapter; a merge cannot be undone, so keep the original",
    ]


def erase(
    model,
    concept: str,
    *,
    pool: Dataset | None = None,
    anchors: Dataset | None = None,
    processor=None,
    retain_dataset: Dataset | Sequence[dict] | None = None,
    statistics: Statistics | str | os.PathLike | None = None,
    aliases: Sequence[str] = (),
    questions: QuestionSet | None = None,
    probes: Sequence[Probe] | None = None,
    k: int = 32,
    refine_steps: int = 60,
    selection: Mapping[str, Any] | None = None,
    args: SpaceConfig | None = None,
    peft_config: SpaceLoraConfig | None = None,
    resume: bool = True,
    progress: bool = True,
    **trainer_options,
) -> Erasure:
    """Makes a model forget a concept: selects anchors, refines them, trains, certifies, and evaluates if there are probes.

    What takes long is kept in `args.output_dir`: anchors in its folder `anchors`, checkpoints if the configuration saves
    some. A call that was killed goes on from there. Nothing else is written; see [`Erasure.save`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): The multimodal model, or its id. On a CPU an id is loaded in
            float32, because lower precision crawls there; on a GPU as it was saved.
        concept (`str`): The name to forget.
        pool ([`~datasets.Dataset`], *optional*): Public images, column `image`; see [`select_anchors`].
        anchors ([`~datasets.Dataset`], *optional*): Refined anchors that were made before, instead of `pool`.
        processor ([`~transformers.ProcessorMixin`], *optional*): The model's; loaded from its id by default.
        retain_dataset ([`~datasets.Dataset`] or `list[dict]`, *optional*): What must not change; see [`SpaceTrainer`]. Rows
            without an answer, such as pictures alone, are answered by the model itself, as by [`retained_answers`].
        statistics ([`Statistics`] or `str`, *optional*): Statistics of the base model instead, or beside it.
        aliases (`list[str]`, *optional*): Other names to forget.
        questions ([`QuestionSet`], *optional*): What is asked about images; by default what `anchors` were refined with, or
            the library's.
        probes (`list[Probe]`, *optional*): From [`build_probes`]: what to ask before and after, of which pictures. If the model
            names the concept on next to none of them, a warning says so before anything is made.
        k (`int`, defaults to 32): Anchors.
        refine_steps (`int`, defaults to 60): Steps of refining them.
        selection (`dict`, *optional*): Other arguments of [`select_anchors`], such as `caption_column`.
        args ([`SpaceConfig`], *optional*): Configuration of training; `output_dir` is "space-output" by default.
        peft_config ([`SpaceLoraConfig`], *optional*): The adapter; rank 8 by default.
        resume (`bool`, defaults to `True`): Whether to go on from what an interrupted call of the same job left.
        progress (`bool`, defaults to `True`): Whether to show stages: a bar for the one at hand, a line for each that is over.
        trainer_options: Other arguments of [`SpaceTrainer`].

    Returns:
        [`Erasure`]

    Raises:
        ValueError: If there is neither `pool` nor `anchors`, or neither retained rows nor statistics; see also [`select_anchors`]
            and [`SpaceTrainer`]. What the latter would refuse is refused before anchors are made.
    """
    concept = check_concept(concept)
    aliases = list(check_aliases(aliases, concept=concept))
    if (pool is None) == (anchors is None):
        raise ValueError("give either `pool`, public images to find stand-ins in, or `anchors` that were made before.")
    if retain_dataset is None and statistics is None:
        raise ValueError(
            "nothing says what must not change: pass `retain_dataset` (see `retained_answers`, which needs no labels), or "
            "`statistics` of the base model."
        )
    args = SpaceConfig(output_dir="space-output") if args is None else args
    peft_config = peft_config or default_adapter()
    began, seconds = time.perf_counter(), {}
    if isinstance(model, str):
        refuse_missing(model)
    # Whatever would be refused later is refused now: the model takes minutes to load, and its anchors may take hours.
    check_job(SpaceTrainer, args, trainer_options, alone=retain_dataset is None)
    if Path(args.output_dir, ADAPTER_NAME).is_file():
        logger.warning("%s already holds an adapter, which is replaced when this one is saved.", args.output_dir)
    statistics = load_statistics(statistics) if isinstance(statistics, (str, os.PathLike)) else statistics
    retained = None if retain_dataset is None else RetainedRows.of(retain_dataset, unanswered=True)
    keys = erase_stages(
        args, peft_config, pool=pool is not None, refined=refine_steps > 0, retained=retained is not None,
        unanswered=retained is not None and bool(retained.unanswered), probes=bool(probes),
    )  # fmt: skip
    with stages(["load"] * isinstance(model, str) + keys, show=progress and rank_and_size()[0] == 0):
        if isinstance(model, str):
            begin("load")
        if processor is None:
            processor = AutoProcessor.from_pretrained(model if isinstance(model, str) else model.config._name_or_path)
        if isinstance(model, str):
            model = load_model(model, **args.init_kwargs)
            seconds["load"] = round(time.perf_counter() - began, 1)
        if questions is None and anchors is not None:
            questions = anchor_questions(anchors)
        questions = questions or DEFAULT_QUESTIONS
        check_model(model, processor, args, peft_config, [concept, *aliases], questions, retained, statistics)
        if probes:
            begin("know")
            warn_if_not_named(model, processor, concept, probes, progress=progress)
        if retained is not None:
            retained = answer_missing(
                model, processor, retained, questions=(*questions.naming, *questions.open), names=[concept, *aliases],
                cache=Path(args.output_dir, RETAINED_ANSWERS_NAME), resume=resume, progress=progress,
            )  # fmt: skip
        seconds["prepare"] = round(time.perf_counter() - began - seconds.get("load", 0), 1)
        began = time.perf_counter()
        if anchors is None:
            anchors = make_anchors(
                concept, pool, model, processor, aliases, questions, k, refine_steps, args,
                selection=selection, resume=resume, progress=progress,
            )  # fmt: skip
            seconds["anchors"] = round(time.perf_counter() - began, 1)
        trainer = SpaceTrainer(
            model, args, anchors=anchors, retain_dataset=retained, statistics=statistics, processing_class=processor,
            peft_config=peft_config, concept=concept, aliases=aliases, questions=questions, probes=probes, **trainer_options,
        )  # fmt: skip
        trainer.card_data.seconds.update(seconds)
        checkpoint = None
        if resume and args.save_strategy != "no":
            # Of this job: a checkpoint of another concept, or of other settings, would be saved as this one's result.
            checkpoint = last_complete_checkpoint(args.output_dir, run_identity(trainer))
        trainer.train(resume_from_checkpoint=checkpoint)
        if probes:
            begin("evaluate")
            trainer.evaluate()
    return Erasure(trainer, anchors)


def erase_stages(
    args: SpaceConfig,
    adapter: SpaceLoraConfig,
    *,
    pool=True,
    refined=True,
    retained=True,
    unanswered=False,
    probes=True,
) -> list[str]:
    """Keys of the stages of [`erase`] with a model, for who shows them among their own.

    Args:
        args, adapter, pool, refined, retained, unanswered, probes: What it is given, or whether it is; `unanswered`, whether
            there are retained rows that the model is asked for.
    """
    know, evaluate = (["know"], ["evaluate"]) if probes else ([], [])
    anchors = ["select", *(["refine"] if refined else [])] if pool else []
    return [*know, *["retain"] * unanswered, *anchors, *training_stages(args, adapter, retained), *evaluate]


def default_adapter() -> SpaceLoraConfig:
    """The adapter of [`erase`] where none is asked for."""
    return SpaceLoraConfig(r=8, lora_alpha=16)


def make_anchors(
    concept: str,
    pool: Dataset,
    model,
    processor,
    aliases: Sequence[str],
    questions: QuestionSet,
    k: int,
    refine_steps: int,
    args: SpaceConfig,
    *,
    selection: Mapping[str, Any] | None = None,
    resume: bool,
    progress: bool,
) -> Dataset:
    """Anchors as [`erase`] makes them, kept in its output folder with what they were made for.

    Args:
        concept, pool, model, processor, aliases, questions, k, refine_steps, args, selection, resume, progress: See
            [`erase`].

    Returns:
        `datasets.Dataset`: Those of an earlier call of the same job, if there are some and `resume` is set.
    """
    begin("select")
    folder = Path(args.output_dir, ANCHORS_FOLDER)
    selection = dict(selection or {})
    # Everything that they depend on.
    job = {
        "k": k, "refine_steps": refine_steps, "seed": args.seed, "pool": dataset_source(pool),
        "files": open_pool(pool, **{key: selection[key] for key in _COLUMNS if key in selection}).files_digest(),
        # Weights, adapters that are on, vocabulary, and how pictures are made input.
        "model": OwnSpaceEncoder(model, processor).fingerprint,
        "questions": [str(part) for part in (*questions.naming, *questions.confirm, *questions.open, questions.yes)],
        "template": hashlib.sha256(str(processor.chat_template).encode()).hexdigest(),
        "concept": concept, "aliases": aliases,
    }  # fmt: skip
    if chosen := {key: _plain(value) for key, value in selection.items() if key not in _HOW_FAST}:
        job["selection"] = chosen
    if resume and folder.is_dir():
        kept = load_from_disk(folder)
        if anchor_info(kept).get("job") == job:
            logger.info("Anchors of an earlier call are taken from %s.", folder)
            done(f"took {len(kept)} anchors that an earlier call has made")
            return kept
        logger.warning("The anchors in %s were made for something else, so they are made again.", folder)
    given = {"model": model, "processor": processor, "aliases": aliases, "k": k, "progress": progress, **selection}
    anchors = select_anchors(concept, pool, **given)
    done(f"chose {len(anchors)} anchors of {len(pool)} public images")
    if refine_steps:
        begin("refine")
        options = {"steps": refine_steps, "seed": args.seed, "questions": questions, "progress": progress}
        anchors = refine_anchors(anchors, model=model, processor=processor, **options)
        done(f"refined {len(anchors)} anchors, p(name) {sum(anchors['p_name_after']) / len(anchors):.3f} on average")
    anchors = set_anchor_info(anchors, {**anchor_info(anchors), "job": job})
    with atomic_path(folder) as temporary:
        anchors.save_to_disk(temporary)
    return anchors


def _plain(value: Any) -> Any:
    """A setting of the selection as JSON has it; of an encoder, what tells it from others."""
    value = getattr(value, "fingerprint", value)
    return list(value) if isinstance(value, tuple) else value
