"""`ErasureTrainer`: what every method of erasure shares, whatever it takes for examples and whatever its losses are."""

from __future__ import annotations

import copy
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, Trainer, set_seed
from transformers.utils.logging import get_logger

from space_peft import distributed
from space_peft._io import write_json
from space_peft.anchors.info import ANCHORS_NAME
from space_peft.anchors.refine import name_probabilities
from space_peft.callback import NULL_SPACES_NAME, NullSpaceCallback
from space_peft.canary import CANARY_NAME
from space_peft.card_data import ErasureCardData
from space_peft.certificate import CERTIFICATE_NAME
from space_peft.config import SPACE_CONFIG_NAME, SpaceLoraConfig
from space_peft.features import multimodal_core
from space_peft.layers import deployed_model
from space_peft.leaks import measure_leaks
from space_peft.measured import note_measured, remove_results, saved_digest
from space_peft.names import check_aliases, check_concept
from space_peft.null_space import save_null_spaces
from space_peft.questions import DEFAULT_QUESTIONS, QuestionSet
from space_peft.retain import RetainedRows
from space_peft.targets import default_target_modules

from .callbacks import CurrentAnswersCallback, ForgottenStoppingCallback, GradientHealthCallback
from .certifying import CertifyingMixin
from .checkpoints import last_complete_checkpoint
from .deployed_answers import (
    DeployedAnswers,
    DeployedAnswersCallback,
    DeployedAnswersMixin,
    compare_with_deployed,
)
from .erasure_config import ErasureConfig
from .forget_rows import ForgetRows, located_rows
from .given_adapter import ADAPTER, adopt, check_bare
from .pairs import PairCollator, PairedRows, retained_loader
from .publishing import PublishingMixin


logger = get_logger(__name__)


class ErasureTrainer(CertifyingMixin, DeployedAnswersMixin, PublishingMixin, Trainer):
    """
    Base of the erasure trainers: adapter, retained rows, null space, certificate, evaluation and saving.

    A method is a subclass with a `compute_loss`. Its inputs are `{"forget": batch, "retain": batch}`, each with the
    numbers of its rows beside it (`forget_rows`, `retain_rows`), as `PairCollator` makes them; it names its terms with
    `_record`, which is also what feeds the stopping rule.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The multimodal model that shall forget, or its id. A `PeftModel` must carry the adapter to train, called
            "default"; other adapters that are on are part of the model.
        args ([`ErasureConfig`]):
            Configuration.
        forget (`list[dict]`):
            Conversations about the concept with the answer to forget, see `space_peft.mention_rows`.
        own_answers (`bool`, defaults to `False`):
            Whether the model may be asked `questions` about the images of `forget` (see `ErasureConfig.own_answers`).
        retain_dataset ([`~datasets.Dataset`] or `list[dict]`):
            What must not change, in TRL's formats: `messages`, or `prompt` and `completion`, with `images` or `image`.
        eval_dataset ([`~datasets.Dataset`] or `list[dict]`, *optional*):
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
        keep_model ([`~transformers.PreTrainedModel`], *optional*):
            The model whose answers to retained rows are kept, in [`CVFTrainer`] whose features; `model` without the
            adapter by default. After earlier erasures pass a copy of the original, so that what each of them cost is
            won back instead of kept.
        card_data ([`ErasureCardData`], *optional*):
            What the model card shall say of licence, language, reason and author; the rest is filled in. Copied.
        callbacks (`list[TrainerCallback]`, *optional*):
            Added to the stopping rule, the null space and the gradient check.
        optimizers (`tuple`, *optional*):
            Optimiser and scheduler, as in [`~transformers.Trainer`].

    Raises:
        ValueError: If the retained dataset is empty, the concept has no name, the model has no vision side, the
            processor has no image token, or the model carries an adapter that cannot be trained on as it was trained.
    """

    _tag_names = ["space-peft", "unlearning", "machine-unlearning", "lora"]
    _name: str
    _paper: dict | None = None
    # Whether training sees images of the concept itself; a card must say it.
    _uses_concept_images = True
    # Images the deployed model calls by the concept's name, none of the concept itself: a canary may show them.
    anchors: Dataset | None = None
    # What p(name) is called in logs: it is measured on what is trained on, and says little about other pictures.
    _p_name = "p_name_on_images"
    # Whether the losses compare with the deployed model's answers, which are then computed once.
    _compares_with_deployed = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: ErasureConfig,
        *,
        forget: Sequence[dict],
        own_answers: bool = False,
        retain_dataset: Dataset | Sequence[dict] | None,
        concept: str,
        eval_dataset: Dataset | Sequence[dict] | None = None,
        processing_class=None,
        peft_config: LoraConfig | None = None,
        aliases: Sequence[str] | None = None,
        questions: QuestionSet | None = None,
        probes: Sequence | None = None,
        protect: Sequence[dict] = (),
        keep_model: PreTrainedModel | None = None,
        card_data: ErasureCardData | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
    ):
        if keep_model is not None and keep_model is model:
            raise ValueError(
                "`keep_model` is `model` itself, which gets the adapter; pass a copy of the original model."
            )
        self.concept, self.aliases = check_concept(concept), list(check_aliases(aliases))
        self.questions, self.probes = questions or DEFAULT_QUESTIONS, probes
        self.retained = RetainedRows(retain_dataset)
        if mentioned := self.retained.count_target([self.concept, *self.aliases]):
            # Not an error: captions mention things in passing. But such rows protect what is to be forgotten.
            warnings.warn(
                f"{mentioned} of {len(self.retained)} retained rows show an image and answer with {self.concept!r}: "
                "they work against the erasure. Remove them unless they only mention it in passing.",
                stacklevel=3,
            )

        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            processing_class = AutoProcessor.from_pretrained(name)
        if getattr(processing_class, "image_processor", None) is None or not hasattr(processing_class, "image_token"):
            raise ValueError(
                f"{type(processing_class).__name__} has no image processor or no image token; pass the multimodal "
                "processor of the model (`AutoProcessor.from_pretrained`), not its tokenizer."
            )
        if isinstance(model, str):
            model = AutoModelForImageTextToText.from_pretrained(model, **(args.model_init_kwargs or {}))
        multimodal_core(model)
        distributed.check_supported(model)
        set_seed(args.seed)  # Before the adapter is initialised.
        model = self._add_adapter(model, peft_config, args)

        self.own_answers = own_answers and args.own_answers
        forget = located_rows(processing_class, forget)
        constrained = isinstance(model.peft_config[ADAPTER], SpaceLoraConfig)
        fitted, held_out = self._split(args, constrained=constrained)
        length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        train_dataset = PairedRows(
            forget,
            self.retained,
            fitted,
            length if length > 0 else len(forget),
            args.retain_per_forget if self._steps_on_retained(args) else 0,
            args.seed,
        )
        self.held_out = retained_loader(processing_class, self.retained, held_out, args.fit_batch_size)

        if args.ddp_find_unused_parameters is None:
            # Every layer is used in every step, but not in each of its two forward passes. DDP would look for unused
            # ones after each, and take those that the second does not use for done.
            args.ddp_find_unused_parameters = False
        if protect and not constrained:
            raise ValueError("`protect` is kept by the null space; pass a SpaceLoraConfig as `peft_config`.")
        self.protect = list(protect)
        self._begin_card(card_data, args, retain_dataset=retain_dataset, eval_dataset=eval_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(processing_class),
            train_dataset=train_dataset,
            eval_dataset=self.retained if eval_dataset is None else RetainedRows(eval_dataset),
            processing_class=processing_class,
            callbacks=self._own_callbacks(args, processing_class, fitted, constrained) + (callbacks or []),
            optimizers=optimizers,
        )
        self.data_collator.always_image = self.is_fsdp_enabled and args.world_size > 1
        distributed.check_saves_whole(self.accelerator)
        # The loss is a mean over rows already: Trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        if eval_dataset is not None:
            everything = range(len(self.eval_dataset))
            self.eval_rows = retained_loader(processing_class, self.eval_dataset, everything, args.fit_batch_size)
        else:
            self.eval_rows = self.held_out
        if keep_model is not None:
            keep_model = self.accelerator.prepare_model(keep_model, evaluation_mode=True).eval()
        self.keep_model = keep_model
        self.forget = ForgetRows(self, train_dataset.rows)
        self.deployed_answers: DeployedAnswers | None = None
        self._probe_baseline = None
        self._metrics = defaultdict(list)  # Of training, since the last log.
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    # Setting up

    @staticmethod
    def _steps_on_retained(args: ErasureConfig) -> bool:
        """Whether a step runs retained rows at all; if not, none are encoded."""
        return True

    @staticmethod
    def _add_adapter(model, peft_config: LoraConfig | None, args: ErasureConfig) -> PeftModel:
        if isinstance(model, PeftModel):
            return adopt(model, peft_config, args.output_dir)
        check_bare(model)
        # The caller's stays as it is.
        peft_config = SpaceLoraConfig() if peft_config is None else copy.copy(peft_config)
        if peft_config.target_modules is None:
            peft_config.target_modules = default_target_modules(model, args.target)
        return get_peft_model(model, peft_config)

    def _own_callbacks(self, args: ErasureConfig, processor, fitted: list[int], constrained: bool) -> list:
        callbacks = [GradientHealthCallback()]
        if args.stop_threshold is not None:
            callbacks.append(ForgottenStoppingCallback(args.stop_threshold, args.stop_smoothing))
        self.null_space = None
        if constrained:
            self.fit_loader = retained_loader(processor, self.retained, fitted, args.fit_batch_size)
            options = {"offload": args.offload_null_spaces, "fit_save_steps": args.fit_save_steps}
            self.null_space = NullSpaceCallback(self.fit_loader, protect=self.protect, **options)
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
        for key, value in zip(terms, values.tolist()):
            self._metrics[f"loss_{key}"].append(value)
        if log_prob is None:
            return
        probability = self.accelerator.gather(log_prob.detach().exp())
        self._metrics[self._p_name].append(probability.mean().item())
        self._metrics[f"{self._p_name}_max"].append(probability.max().item())
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ForgottenStoppingCallback):
                callback.observe(probability.max().item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = {}
        if self.model.training:
            metrics = {key: sum(values) / len(values) for key, values in self._metrics.items()}
            self._metrics.clear()
        if self.model.training and "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, GradientHealthCallback) and callback.norms:
                    metrics["lora_b_grad_min"] = min(callback.norms.values())
                    metrics["lora_b_grad_max"] = max(callback.norms.values())
            if leaks := self.leaks():
                metrics["leak_max"], metrics["leak_mean"] = max(leaks.values()), sum(leaks.values()) / len(leaks)
        super().log({**logs, **metrics}, start_time)

    def leaks(self) -> dict[str, float]:
        """What the adapter does to retained inputs as of now, per layer; see [`measure_leaks`]."""
        model = self.accelerator.unwrap_model(self.model)
        return measure_leaks(model, self.null_spaces) if self.null_spaces else {}

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
        if self.null_space is not None:
            self.null_space.resumed_from = resume_from_checkpoint
        self.forget.find_rows(resume_from_checkpoint)
        self.deployed_answers = self._keep_deployed_answers()
        self.certificate = self.canary = None  # They are of the adapter as it was.
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if not self.probes and not self._uses_concept_images:
            warnings.warn(
                f"no probes were given: {self._p_name} says what the anchors are called now, not what pictures of "
                f"{self.concept!r} are. Pass `probes=build_probes(...)` with pictures of it, or ask the model yourself.",
                stacklevel=2,
            )
        self._certify()
        return output

    # Evaluating

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Retained rows, images of the concept (or their anchors) and probes, as the model is now.

        Args:
            eval_dataset ([`~datasets.Dataset`] or `list[dict]`, *optional*):
                Retained rows to use instead of the trainer's own.
            ignore_keys (`list[str]`, *optional*):
                Unused; part of Trainer's signature.
            metric_key_prefix (`str`, defaults to `"eval"`):
                Put before every key.

        Returns:
            `dict[str, float]`: `loss` (L_keep), `keep_agreement` (share of answer tokens whose most likely token is
            the deployed model's), `p_name_on_anchors` and its `_max` (`p_name_on_images` for methods that see the concept:
            p of any form of the name at the beginning of the answer to the first naming question), and the value of
            every probe.
        """
        loader = self.eval_rows
        if eval_dataset is not None:
            rows = RetainedRows(eval_dataset)
            loader = retained_loader(self.processing_class, rows, range(len(rows)), self.args.fit_batch_size)
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        try:
            metrics = compare_with_deployed(model, loader, self.keep_model)
            images, question = self.train_dataset.images, self.questions.naming[0]
            names = [self.concept, *self.aliases]
            probabilities = name_probabilities(model, self.processing_class, images, question, names)
            metrics[self._p_name] = sum(probabilities) / len(probabilities)
            metrics[f"{self._p_name}_max"] = max(probabilities)
            if self.probes:
                from space_peft.evaluation import evaluate_probes, judge_sentences

                options = {"probes": self.probes, "progress": not self.args.disable_tqdm}
                if self._probe_baseline is None:
                    # What the original model knew; asked once, it does not change.
                    with deployed_model(model) as deployed:
                        known = evaluate_probes(model, self.processing_class, **options)
                        self._probe_baseline = judge_sentences(known, self.probes, deployed, self.processing_class)
                result = evaluate_probes(model, self.processing_class, baseline=self._probe_baseline, **options)
                with deployed_model(model) as deployed:
                    result = judge_sentences(result, self.probes, deployed, self.processing_class)
                self._note_probes(self._probe_baseline, result)
                scores = {key: score["value"] for key, score in result.scores.items()}
                metrics.update({key: value for key, value in scores.items() if value is not None})
            metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
            self.log(dict(metrics))
        finally:
            model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.null_space is not None:
            self.null_space.note_weights()  # here, because all processes come by
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        replaced = saved_digest(folder) if self.args.should_save else None
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        write_json(folder / ANCHORS_NAME, self.provenance())
        saved = saved_digest(folder)
        if self._measured_on == saved:
            if self.certificate is not None:
                self.certificate.save(folder / CERTIFICATE_NAME)
                note_measured(folder, {CERTIFICATE_NAME: saved})
            if self.canary is not None:
                self.canary.save(folder)
                note_measured(folder, {CANARY_NAME: saved})
        if self.null_space is None:
            for name in (SPACE_CONFIG_NAME, NULL_SPACES_NAME):
                if (folder / name).is_file():
                    logger.warning("Removed %s: this adapter is trained without a constraint.", folder / name)
                    (folder / name).unlink()
        if self.null_spaces and folder == Path(self.args.output_dir):
            # Checkpoints get theirs from the callback.
            save_null_spaces(folder / NULL_SPACES_NAME, self.null_spaces)
        if folder != Path(self.args.output_dir):
            self.forget.save(folder)
        self._save_public(folder, saved)
        # Results of an adapter that a former run left here must not pass for this one's.
        before = self._training_began
        if before is None and replaced not in (None, saved):
            before = time.time()
        remove_results(folder, saved, before)

    def provenance(self) -> dict:
        """What was erased, and with what; written to `space_anchors.json`. No images."""
        return {"concept": self.concept, "aliases": self.aliases, "forget_rows": len(self.forget.given)}
