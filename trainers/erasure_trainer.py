"""`ErasureTrainer`: what every method of erasure shares, whatever it takes for examples and whatever its losses are."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoProcessor, PreTrainedModel, Trainer, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import get_logger

from space_peft.config import SpaceLoraConfig
from space_peft.data.names import check_target
from space_peft.data.questions import DEFAULT_QUESTIONS, QuestionSet
from space_peft.distributed import processes
from space_peft.modeling.features import image_token_id, multimodal_core
from space_peft.modeling.loading import load_model, warn_if_slow
from space_peft.null_space.base_statistics import Statistics, load_statistics
from space_peft.null_space.callback import NullSpaceCallback
from space_peft.null_space.leaks import measure_leaks
from space_peft.null_space.space import save_null_spaces
from space_peft.records.card_data import ErasureCardData
from space_peft.records.folder import ANCHORS_NAME, NULL_SPACES_NAME
from space_peft.records.io import write_json
from space_peft.records.measured import saved_digest
from space_peft.retained.reading import RetainedRows, retained_loader
from space_peft.retained.self_distillation import retained_answers

from .callbacks import CurrentAnswersCallback, ForgottenStoppingCallback, GradientHealthCallback
from .certifying import CertifyingMixin
from .checkpoints import RunCallback, check_same_run, last_complete_checkpoint, run_identity
from .deployed_answers import DeployedAnswers, DeployedAnswersCallback, DeployedAnswersMixin
from .erasure_config import ErasureConfig
from .evaluating import EvaluationMixin, check_args, check_optimizer, refuse_arguments, retained_sets
from .forget_rows import ForgetRows, located_rows
from .given_adapter import ADAPTER, add_adapter
from .pairs import Chained, PairCollator, PairedRows
from .progress import use_readable_progress
from .publishing import PublishingMixin
from .refusals import check_job, check_processor
from .running_metrics import RunningMetrics


logger = get_logger(__name__)


class ErasureTrainer(CertifyingMixin, DeployedAnswersMixin, EvaluationMixin, PublishingMixin, Trainer):
    """
    Base of the erasure trainers: adapter, retained rows, null space, certificate, evaluation and saving.

    A method is a subclass with a `compute_loss`. Its inputs are `{"forget": batch, "retain": batch}`, each with the
    numbers of its rows beside it (`forget_rows`, `retain_rows`), as `PairCollator` makes them; it names its terms with
    `_record`, which is also what feeds the stopping rule.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The multimodal model that shall forget, or its id. A `PeftModel` must carry the adapter to train, called
            "default"; other adapters that are on are part of the model. Either this or `model_init`.
        args ([`ErasureConfig`]):
            Configuration.
        forget (`list[dict]`):
            Conversations about the concept with the answer to forget, see `space_peft.modeling.mention_rows`.
        own_answers (`bool`, defaults to `False`):
            Whether the model may be asked `questions` about the images of `forget` (see `ErasureConfig.own_answers`).
        retain_dataset ([`~datasets.Dataset`] or `list[dict]`):
            What must not change, in TRL's formats: `messages`, or `prompt` and `completion`, with `images` or `image`.
        eval_dataset ([`~datasets.Dataset`], `list[dict]`, or a `dict` of them, *optional*):
            Retained rows for `evaluate`; by default those held out for the certificate.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            The model's processor; loaded from the model's id by default.
        peft_config ([`SpaceLoraConfig`], *optional*):
            The adapter. If it names no `target_modules`, `args.target` chooses them. A plain `LoraConfig` trains
            without the constraint. For a `PeftModel` whose adapter was loaded as a plain LoRA, the constraint that it
            was trained under: `SpaceLoraConfig.from_pretrained(folder)`.
        concept (`str`):
            The name to forget.
        aliases (`list[str]`, *optional*):
            Other names to forget.
        questions (`QuestionSet`, *optional*):
            What to ask about images of the concept.
        probes (`list[Probe]`, *optional*):
            Probes `evaluate` reports beside the losses, see `space_peft.evaluation`.
        protect (`list[dict[str, NullSpace]]`, *optional*):
            Statistics of earlier erasures, which this one must not undo: [`ErasureLedger.protect`]. Needs a
            [`SpaceLoraConfig`].
        statistics ([`Statistics`] or `str`, *optional*):
            Statistics of the base model, or where they are (see [`load_statistics`]), instead of `retain_dataset` or beside
            it: the constraint is fitted to them, and to what the model says about the concept when asked
            `questions.about`, in words. Needs a [`SpaceLoraConfig`]. Without retained rows there is no certificate, and no
            loss on them.
        keep_model ([`~transformers.PreTrainedModel`], *optional*):
            The model whose answers to retained rows are kept, in [`CVFTrainer`] whose features; `model` without the
            adapter by default. After earlier erasures pass a copy of the original, so that what each of them cost is
            won back instead of kept.
        card_data ([`ErasureCardData`], *optional*):
            What the model card shall say of licence, language, reason and author; the rest is filled in. Copied.
        callbacks (`list[TrainerCallback]`, *optional*):
            Added to the stopping rule, the null space and the gradient check.
        optimizers (`tuple`, *optional*):
            Optimiser and scheduler, as in [`~transformers.Trainer`]; the optimiser must hold the adapter's weights, so
            pass the `PeftModel` it was made for.
        model_init (`Callable`, *optional*):
            Makes the model without an adapter, of nothing or of the trial; called again by every `train`, which then
            begins anew, also in `hyperparameter_search`. As in [`~transformers.Trainer`].
        unsupported (*optional*):
            Other arguments of [`~transformers.Trainer`]: refused, with what to do instead.

    Raises:
        ValueError: If the retained dataset is empty, the concept has no name, the model has no vision side, the
            processor has no image token, or the model carries an adapter that cannot be trained on as it was trained.
        TypeError: If `args` is not of the method's own class, or there is an argument that the trainer does not have.
    """

    _tag_names = ["space-peft", "unlearning", "machine-unlearning", "lora"]
    _name: str
    _config_class: type[ErasureConfig] = ErasureConfig
    _paper: dict | None = None
    # Whether training sees images of the concept itself; a card must say it.
    _uses_concept_images = True
    # Images the deployed model calls by the concept's name, none of the concept itself: a canary may show them.
    anchors: Dataset | None = None
    # What p(name) is called in logs: it is measured on what is trained on, and says little about other pictures.
    _p_name = "p_name_on_images"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None,
        args: ErasureConfig,
        *,
        forget: Sequence[dict],
        own_answers: bool = False,
        retain_dataset: Dataset | Sequence[dict] | None,
        concept: str,
        eval_dataset: Dataset | Sequence[dict] | dict[str, Dataset | Sequence[dict]] | None = None,
        processing_class=None,
        peft_config: LoraConfig | None = None,
        aliases: Sequence[str] | None = None,
        questions: QuestionSet | None = None,
        probes: Sequence | None = None,
        protect: Sequence[dict] = (),
        statistics: Statistics | str | os.PathLike | None = None,
        keep_model: PreTrainedModel | None = None,
        card_data: ErasureCardData | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        model_init: Callable | None = None,
        **unsupported,
    ):
        refuse_arguments(type(self), unsupported)
        check_args(args, self._config_class, type(self))
        if (model is None) == (model_init is None):
            raise ValueError("give either `model` or `model_init`, and not both.")
        if model_init is not None and any(part is not None for part in optimizers):
            raise ValueError(
                "`optimizers` are of one model, and `model_init` makes others; set `optim` in the configuration."
            )
        if keep_model is not None and keep_model is model:
            raise ValueError(
                "`keep_model` is `model` itself, which gets the adapter; pass a copy of the original model."
            )
        self.concept, aliases = check_target(concept, aliases)
        self.aliases = list(aliases)
        self.questions, self.probes = questions or DEFAULT_QUESTIONS, probes
        self.statistics = statistics if isinstance(statistics, (Statistics, NoneType)) else load_statistics(statistics)
        alone = statistics is not None and retain_dataset is None
        check_job(type(self), args, {}, alone=alone)
        self.retained = RetainedRows.none() if alone else RetainedRows.of(retain_dataset)
        if statistics is None:
            self.retained.warn_if_few(stacklevel=3)
        if mentioned := self.retained.count_target([self.concept, *self.aliases]):
            # Not an error: captions mention things in passing. But such rows protect what is to be forgotten.
            warnings.warn(
                f"{mentioned} of {len(self.retained)} retained rows show an image and answer with {self.concept!r}: "
                "they work against the erasure. Remove them unless they only mention it in passing.",
                stacklevel=3,
            )

        self.model_init = model_init
        if model_init is not None:
            set_seed(args.seed)
            model = Trainer.call_model_init(self)
        assert model is not None  # Given, or just made.
        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            processing_class = AutoProcessor.from_pretrained(name)
        check_processor(processing_class)
        if isinstance(model, str):
            model = load_model(model, args.device, place=False, **args.init_kwargs)
        multimodal_core(model)
        warn_if_slow(model, args.device)
        processes.check_supported(model)
        set_seed(args.seed)  # Before the adapter is initialised.
        self._adapter_of = lambda model: add_adapter(model, peft_config, args.target, args.output_dir)
        adapted = self._adapter_of(model)
        check_optimizer(optimizers[0], adapted)

        self.own_answers = own_answers and args.own_answers
        forget = located_rows(processing_class, forget)
        constrained = isinstance(adapted.peft_config[ADAPTER], SpaceLoraConfig)
        fitted, held_out = self._split(args, constrained=constrained)
        self._training_rows = forget, fitted
        train_dataset = self._pair_rows(args)
        self.held_out = retained_loader(processing_class, self.retained, held_out, args.fit_batch_size)

        if args.ddp_find_unused_parameters is None:
            # Every layer is used in every step, but not in each of its two forward passes. DDP would look for unused
            # ones after each, and take those that the second does not use for done.
            args.ddp_find_unused_parameters = False
        for name, given in (("protect", protect), ("statistics", statistics)):
            if given and not constrained:
                raise ValueError(f"`{name}` is kept by the null space; pass a SpaceLoraConfig as `peft_config`.")
        if self.statistics is not None:
            self.statistics.check(adapted, ADAPTER)
        self.protect = list(protect)
        self._begin_card(card_data, args, retain_dataset=retain_dataset, eval_dataset=eval_dataset)
        super().__init__(
            model=adapted,
            args=args,
            data_collator=PairCollator(processing_class, image_token_id(adapted)),
            train_dataset=train_dataset,
            eval_dataset=self.retained if eval_dataset is None else retained_sets(eval_dataset),
            processing_class=processing_class,
            callbacks=self._own_callbacks(args, processing_class, fitted, constrained) + (callbacks or []),
            optimizers=optimizers,
        )
        use_readable_progress(self)
        self.data_collator.always_image = self.is_fsdp_enabled and args.world_size > 1
        processes.check_saves_whole(self.accelerator)
        # The loss is a mean over rows already: Trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.model_init = model_init  # Trainer takes no model beside it.
        if eval_dataset is None:
            self.eval_rows = self._loader_of(self.retained, held_out)
        elif isinstance(self.eval_dataset, dict):
            self.eval_rows = {name: self._loader_of(rows) for name, rows in self.eval_dataset.items()}
        else:
            self.eval_rows = self._loader_of(self.eval_dataset)
        if keep_model is not None:
            keep_model = self.accelerator.prepare_model(keep_model, evaluation_mode=True).eval()
        self.keep_model = keep_model
        self.forget = ForgetRows(self, train_dataset.rows)
        self.deployed_answers: DeployedAnswers | None = None
        self._probe_baseline = None
        self._metrics = RunningMetrics()  # Of training, since the last log.
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    # Setting up

    def _pair_rows(self, args: ErasureConfig) -> PairedRows:
        """The items to train on, as many and of such rows as the arguments say."""
        forget, fitted = self._training_rows
        length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._paired_for = (
            length if length > 0 else len(forget),
            args.retain_per_forget if self._steps_on_retained(args) else 0,
            args.seed,
        )
        return PairedRows(forget, self.retained, fitted, *self._paired_for)

    def call_model_init(self, trial=None):
        # By `train` where there is a `model_init`: what was known of the model before is of another one.
        self._probe_baseline = None
        return self._adapter_of(super().call_model_init(trial))

    @property
    def _compares_with_deployed(self) -> bool:
        """Whether the losses compare with the deployed model's answers, which are then computed once."""
        return True

    @staticmethod
    def _steps_on_retained(args: ErasureConfig) -> bool:
        """Whether a step runs retained rows at all; if not, none are encoded."""
        return True

    def _own_callbacks(self, args: ErasureConfig, processor, fitted: list[int], constrained: bool) -> list:
        callbacks = [GradientHealthCallback(), RunCallback(lambda: self._run)]
        if args.stop_threshold is not None:
            callbacks.append(ForgottenStoppingCallback(args.stop_threshold, args.stop_smoothing))
        self.null_space = None
        if constrained:
            self.fit_loader = retained_loader(processor, self.retained, fitted, args.fit_batch_size)
            self.null_space = NullSpaceCallback(
                self.fit_loader, protect=self.protect, statistics=self.statistics, offload=args.offload_null_spaces,
                fit_save_steps=args.fit_save_steps,
            )  # fmt: skip
            # The null space first: what the others need of the retained rows is a by-product of fitting it.
            callbacks = [self.null_space, DeployedAnswersCallback(lambda: self.deployed_answers), *callbacks]
        if self.own_answers and args.refresh_steps is not None:
            callbacks.append(CurrentAnswersCallback(lambda: self.forget))
        return callbacks

    @property
    def null_spaces(self) -> dict:
        """The fitted null spaces by layer; empty before training, and without the constraint."""
        return {} if self.null_space is None or self.null_space.null_spaces is None else self.null_space.null_spaces

    # Training

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        # The order is the dataset's own: rows found while training are put into the items that are still to come.
        return torch.utils.data.SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def said_instead(self) -> tuple[str, bool] | None:
        """What rows to forget are to say instead, and whether as a whole answer; `None` where the losses decide."""
        return None

    def _record(self, terms: dict[str, torch.Tensor], log_prob: torch.Tensor | None) -> None:
        """Logs the terms of the loss and p(name) at the rows' mentions, and tells the stopping rule.

        Args:
            terms (`dict[str, torch.Tensor]`): Scalars whose sum is the loss.
            log_prob (`torch.Tensor`, *optional*): `(n,)`, log p of each row's answer to forget, if there were such rows.
        """
        values = self.accelerator.gather(torch.stack([term.detach() for term in terms.values()])[None]).mean(dim=0)
        for key, value in zip(terms, values):
            self._metrics.add(f"loss_{key}", value)
        if log_prob is None:
            return
        probability = self.accelerator.gather(log_prob.detach().exp())
        self._metrics.add(self._p_name, probability.mean())
        self._metrics.add(f"{self._p_name}_max", probability.max())
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ForgottenStoppingCallback):
                callback.observe(probability.max())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = {}
        if self.model.training:
            metrics = self._metrics.take()
        if self.model.training and "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, GradientHealthCallback) and (norms := callback.norms):
                    metrics["lora_b_grad_min"] = min(norms.values())
                    metrics["lora_b_grad_max"] = max(norms.values())
            if leaks := self.leaks():
                metrics["leak_max"], metrics["leak_mean"] = max(leaks.values()), sum(leaks.values()) / len(leaks)
        super().log({**logs, **metrics}, start_time)

    def leaks(self) -> dict[str, float]:
        """What the adapter does to retained inputs as of now, per layer; see [`measure_leaks`]."""
        model = self.accelerator.unwrap_model(self.model)
        return measure_leaks(model, self.null_spaces) if self.null_spaces else {}

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ):
        # Here, and not in `train`: model and arguments are those of this run, of a trial, too.
        self._prepare_run(resume_from_checkpoint)
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _prepare_run(self, resume_from_checkpoint: str | None) -> None:
        """Looks at what the deployed model says, before the first step."""
        self._run = run_identity(self)
        if resume_from_checkpoint is not None:
            check_same_run(resume_from_checkpoint, self._run)
        self._record_base()  # Now: later the cache may hold another commit as well.
        before = self._paired_for
        paired = self._pair_rows(self.args)
        if self._paired_for != before:  # A trial, or who changed `args`, asks for others.
            self.train_dataset = paired
        if self.null_space is not None:
            self.null_space.resumed_from = resume_from_checkpoint
            self.null_space.retain_dataloader = self.fit_loader
        self.deployed_answers = self._new_deployed_answers()
        self.forget.find_rows(resume_from_checkpoint)
        observer = self._keep_deployed_answers()
        if self.null_space is not None:
            self.null_space.observer = observer
        if self.null_space is not None and self.statistics is not None:
            about = self._about()
            if observer is not None:
                observer.skip(len(about.dataset))
            several: list[Any] = [about, self.null_space.retain_dataloader]
            loaders = [loader for loader in several if len(loader)]
            self.null_space.retain_dataloader = Chained(loaders) if loaders else None
        self.certificate = self.canary = None  # They are of the adapter as it was.

    def _about(self) -> torch.utils.data.DataLoader:
        """What the deployed model says about the concept in words, for the constraint: it is to stay."""

        def ask(names: list[str]) -> list[dict]:
            questions = [question.format(name=name) for name in names for question in self.questions.about]
            options: dict[str, Any] = {"max_new_tokens": self.args.answer_tokens, "progress": False}
            model = self.accelerator.unwrap_model(self.model)
            return retained_answers(model, self.processing_class, questions=questions, **options) if questions else []

        # By rank 0 alone, as for the rows to forget.
        rows = processes.divide([[self.concept, *self.aliases]], ask)[0]
        rows = RetainedRows(rows) if rows else RetainedRows.none()
        return retained_loader(self.processing_class, rows, range(len(rows)), self.args.fit_batch_size)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trains, then measures the certificate with its end-to-end statement, and makes the canary.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As in Trainer, but for `True`: the newest checkpoint that was written to its end; if a killed run left
                none, training starts at the beginning.
            args, kwargs: See [`~transformers.Trainer.train`].
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if not self.probes and not self._uses_concept_images:
            warnings.warn(
                f"no probes were given: {self._p_name} says what the anchors are called now, not what pictures of "
                f"{self.concept!r} are. Pass `probes=build_probes(...)` with pictures of it, or ask the model yourself.",
                stacklevel=2,
            )
        self._certify()
        return output

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.null_space is not None:
            self.null_space.note_weights()  # here, because all processes come by
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        output = Path(self.args.output_dir)
        folder = Path(output_dir or output)
        replaced = saved_digest(folder) if self.args.should_save else None
        card = self._card_before(folder)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        write_json(folder / ANCHORS_NAME, self.provenance())
        checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if self.null_spaces and (folder == output or checkpoint and folder.parent != output):
            # Checkpoints get theirs from the callback, but for those of a search: it does not know their folders.
            save_null_spaces(folder / NULL_SPACES_NAME, self.null_spaces)
        if folder != output:
            self.forget.save(folder)
        self._save_public(folder, replaced)
        self._keep_card(folder, card, same=replaced == saved_digest(folder))

    def provenance(self) -> dict:
        """What was erased, and with what; written to `space_anchors.json`. No images."""
        return {
            "concept": self.concept,
            "aliases": self.aliases,
            "forget_rows": len(self.forget.given),
            **self._statistics_used(),
        }

    def _statistics_used(self) -> dict:
        if self.statistics is None:
            return {}
        used = {key: getattr(self.statistics, key) for key in ("model", "commit", "rows")}
        return {"statistics": {"digest": self.statistics.digest(), **used}}
