"""`SpaceTrainer`: erase a concept on refined anchors, every update confined to the null space of retained knowledge."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, Trainer, set_seed

from space_peft import distributed, losses
from space_peft._io import write_json
from space_peft.anchors import anchor_info
from space_peft.anchors.refine import name_probabilities, text_anchor
from space_peft.callback import NULL_SPACES_NAME, NullSpaceCallback
from space_peft.certificate import CERTIFICATE_NAME, RetentionCertificate, measure_certificate
from space_peft.config import SpaceLoraConfig
from space_peft.features import attends_to_images, multimodal_core, tap_image_features
from space_peft.layers import adapted_layers, deployed_model
from space_peft.leaks import measure_leaks
from space_peft.names import check_concept
from space_peft.null_space import save_null_spaces
from space_peft.prompts import answer_columns, answer_logits, name_tokens
from space_peft.questions import DEFAULT_QUESTIONS, QuestionSet
from space_peft.retain import RetainedRows
from space_peft.targets import PROJECTOR_PARTS, VISION_PARTS, default_target_modules

from .callbacks import ForgottenStoppingCallback, GradientHealthCallback
from .checkpoints import last_complete_checkpoint
from .deployed_answers import DeployedAnswers, DeployedAnswersCallback, compare_with_deployed
from .pairs import PairCollator, PairedRows, forget_loader, forget_rows, retained_loader
from .space_config import SpaceConfig


ANCHORS_NAME = "space_anchors.json"


class SpaceTrainer(Trainer):
    """
    Trainer for source-free concept erasure: stage 2 (DCSI) of SPACE (arXiv 2606.09868) on the anchors of stage 1.

    Per step it takes anchor rows (an image the model calls by the concept's name, a question, the answer to forget)
    and retained rows, and minimises the weighted sum of the losses in `space_peft.losses`; after every optimiser step
    the update is projected to the null space of the retained rows' activations.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The multimodal model that shall forget, or its id. A `PeftModel` must carry the adapter to train.
        args ([`SpaceConfig`], *optional*):
            Configuration. If `None`, the default one with `output_dir` "space-output".
        anchors ([`~datasets.Dataset`]):
            As returned by `refine_anchors` (or, with weaker effect, by `select_anchors`).
        retain_dataset ([`~datasets.Dataset`] or `list[dict]`):
            What must not change, in TRL's formats: `messages`, or `prompt` and `completion`, with `images` or `image`.
            Text-only rows are welcome, also about the concept: they keep what the model knows of it in words.
        eval_dataset ([`~datasets.Dataset`] or `list[dict]`, *optional*):
            Retained rows for `evaluate`; by default those held out for the certificate.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            The model's processor; loaded from the model's id by default.
        peft_config ([`SpaceLoraConfig`], *optional*):
            The adapter. If it names no `target_modules`, `args.target` chooses them. A plain `LoraConfig` trains
            without the constraint.
        concept (`str`, *optional*):
            The name to forget; by default the one in the anchors' provenance.
        aliases (`list[str]`, *optional*):
            Other names to forget; by default those in the anchors' provenance.
        questions (`QuestionSet`, *optional*):
            What to ask about the anchors; only `naming` and `confirm` are used.
        probes (`list[Probe]`, *optional*):
            Probes `evaluate` reports beside the losses, see `space_peft.evaluation`.
        callbacks (`list[TrainerCallback]`, *optional*):
            Added to the stopping rule, the null space and the gradient check.
        optimizers (`tuple`, *optional*):
            Optimiser and scheduler, as in [`~transformers.Trainer`].

    Raises:
        ValueError: If the retained dataset or the anchors are empty, the concept is unknown, the model has no vision
            side, or the processor has no image token.
    """

    _tag_names = ["space-peft", "unlearning", "machine-unlearning", "null-space", "lora"]
    _name = "SPACE"
    _paper = {"title": "Source-free Proxy Anchor Concept Erasure for MLLMs", "id": "2606.09868"}

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SpaceConfig | None = None,
        anchors: Dataset | None = None,
        retain_dataset: Dataset | Sequence[dict] | None = None,
        eval_dataset: Dataset | Sequence[dict] | None = None,
        processing_class=None,
        peft_config: LoraConfig | None = None,
        concept: str | None = None,
        aliases: Sequence[str] | None = None,
        questions: QuestionSet | None = None,
        probes: Sequence | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
    ):
        args = args or SpaceConfig(output_dir="space-output")
        if anchors is None or len(anchors) == 0:
            raise ValueError("`anchors` is empty: make them with `select_anchors` and `refine_anchors`.")
        info = anchor_info(anchors)
        self.concept = check_concept(concept or info.get("concept") or "")
        self.aliases = list(info.get("aliases") or [] if aliases is None else aliases)
        self.anchors, self.questions, self.probes = anchors, questions or DEFAULT_QUESTIONS, probes
        self.retained = RetainedRows(retain_dataset)
        if mentioned := self.retained.count_target([self.concept, *self.aliases]):
            # Not an error: captions mention things in passing. But such rows protect what is to be forgotten.
            warnings.warn(
                f"{mentioned} of {len(self.retained)} retained rows show an image and answer with {self.concept!r}: "
                "they work against the erasure. Remove them unless they only mention it in passing.",
                stacklevel=2,
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
        # By rank 0 alone: with FSDP's RAM-efficient loading no other process has the weights yet.
        self.concept_embedding = distributed.divide(
            [self.concept], lambda concept: text_anchor(model, processing_class, concept, info).cpu()
        )[0]

        # Only an adapter on the vision side moves image features; elsewhere L_orth and L_div would be constants.
        vision = {*VISION_PARTS, *PROJECTOR_PARTS}
        self.moves_features = any(vision & set(name.split(".")) for name in adapted_layers(model))
        rows = forget_rows(anchors, [self.concept, *self.aliases], self.questions)
        fitted, held_out = self._split_retained(args)
        length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        train_dataset = PairedRows(
            anchors, rows, self.retained, fitted, length if length > 0 else len(rows), args.retain_per_anchor, args.seed
        )
        self.held_out = retained_loader(processing_class, self.retained, held_out, args.fit_batch_size)

        if args.ddp_find_unused_parameters is None:
            # Every layer is used in every step, but not in each of its two forward passes. DDP would look for unused
            # ones after each, and take those that the second does not use for done.
            args.ddp_find_unused_parameters = False
        constrained = isinstance(model.peft_config[model.active_adapter], SpaceLoraConfig)
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
        self.certificate: RetentionCertificate | None = None
        self.deployed_answers: DeployedAnswers | None = None
        self._probe_baseline = None
        self._metrics = defaultdict(list)  # Of training, since the last log.
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    # Setting up

    @staticmethod
    def _add_adapter(model, peft_config: LoraConfig | None, args: SpaceConfig) -> PeftModel:
        if isinstance(model, PeftModel):
            if peft_config is not None:
                raise ValueError(
                    "`model` already carries an adapter and `peft_config` asks for another; pass the base model, or "
                    "leave `peft_config` out to train the adapter that is there."
                )
            return model
        peft_config = (
            SpaceLoraConfig() if peft_config is None else copy.copy(peft_config)
        )  # The caller's stays as it is.
        if peft_config.target_modules is None:
            peft_config.target_modules = default_target_modules(model, args.target)
        return get_peft_model(model, peft_config)

    def _split_retained(self, args: SpaceConfig) -> tuple[list[int], list[int]]:
        """Rows for fitting and training, and rows held out for the certificate."""
        n = len(self.retained)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(args.seed)).tolist()
        count = min(round(args.certificate_share * n), n - 1)
        return sorted(order[count:]), sorted(order[:count])

    def _own_callbacks(self, args: SpaceConfig, processor, fitted: list[int], constrained: bool) -> list:
        callbacks = [GradientHealthCallback()]
        if args.stop_threshold is not None:
            callbacks.append(ForgottenStoppingCallback(args.stop_threshold, args.stop_smoothing))
        self.null_space = None
        if constrained:
            self.fit_loader = retained_loader(processor, self.retained, fitted, args.fit_batch_size)
            self.null_space = NullSpaceCallback(
                self.fit_loader, offload=args.offload_null_spaces, fit_save_steps=args.fit_save_steps
            )
            # The null space first: what the others need of the retained rows is a by-product of fitting it.
            callbacks = [self.null_space, DeployedAnswersCallback(lambda: self.deployed_answers), *callbacks]
        return callbacks

    def _keep_deployed_answers(self) -> DeployedAnswers | None:
        """Looks at the anchors' rows now, and at the retained ones while the null space is fitted."""
        if self.args.world_size > 1:
            return None  # A process fits on other rows than those it trains on.
        if attends_to_images(multimodal_core(self.model)):
            return None  # Rows without images answer otherwise beside rows that have one.
        data = self.train_dataset
        answers = DeployedAnswers(self.accelerator.unwrap_model(self.model))
        loader = forget_loader(self.processing_class, data, self.args.fit_batch_size)
        if not answers.observe(loader, "forget", range(len(data.rows))):
            return None
        if self.null_space is not None:
            self.null_space.retain_dataloader = answers.watch_retained(self.fit_loader, data.retained_rows())
        return answers

    @property
    def null_spaces(self) -> dict:
        """The fitted null spaces by layer; empty before training, and without the constraint."""
        return {} if self.null_space is None or self.null_space.null_spaces is None else self.null_space.null_spaces

    # Training

    def _deployed_logits(self, kind: str, batch: dict, rows: Sequence[int]) -> torch.Tensor:
        """What the unadapted model answers to a batch: from what was kept of it, or from a forward pass."""
        kept = self.deployed_answers and self.deployed_answers.logits(kind, rows, answer_columns(batch["labels"]))
        if kept is not None:
            return kept
        with deployed_model(self.accelerator.unwrap_model(self.model)) as deployed:
            return answer_logits(deployed, batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args = self.args
        forget, retain = inputs["forget"], inputs["retain"]
        forget_base = self._deployed_logits("forget", forget, inputs["forget_rows"])
        labels = losses.answer_labels(forget["labels"])
        name = name_tokens(labels, self.processing_class.tokenizer)
        with tap_image_features(self.accelerator.unwrap_model(model)) as features:
            logits = answer_logits(model, forget)
        overwriting = losses.overwriting_log_probs(forget_base, name)
        log_prob = losses.name_log_prob(logits, name, losses.path_weights(overwriting, name))
        terms = {
            "task": args.task_weight * losses.task_loss(logits, overwriting, name),
            "suppression": args.suppression_weight * losses.suppression_loss(log_prob, args.suppression_margin),
        }
        anchors = distributed.gather_rows(features[0])
        if self.moves_features:
            concept = self.concept_embedding.to(anchors)
            terms["repulsion"] = args.repulsion_weight * losses.repulsion_loss(anchors, concept)
            terms["isotropy"] = args.isotropy_weight * losses.isotropy_loss(anchors)
        if args.keep_weight:
            keep_base = self._deployed_logits("retain", retain, inputs["retain_rows"])
            keep, targets = answer_logits(model, retain), losses.answer_labels(retain["labels"])
            # A mean over tokens, of which the processes have different numbers.
            weight = args.keep_weight * distributed.mean_weight((targets != losses.IGNORE_INDEX).sum())
            terms["keep"] = weight * losses.keep_loss(keep, keep_base, targets)
        self._record(terms, log_prob, anchors)
        return sum(terms.values())

    def _record(self, terms: dict[str, torch.Tensor], log_prob: torch.Tensor, features: torch.Tensor) -> None:
        probability = self.accelerator.gather(log_prob.detach().exp())
        values = self.accelerator.gather(torch.stack([term.detach() for term in terms.values()])[None]).mean(dim=0)
        metrics = self._metrics
        for key, value in zip(terms, values.tolist()):
            metrics[f"loss_{key}"].append(value)
        metrics["name_probability"].append(probability.mean().item())
        metrics["name_probability_max"].append(probability.max().item())
        metrics["feature_entropy"].append(losses.spectral_entropy(features.detach()).item())
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
        """Trains, then measures the certificate.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As in Trainer, but for `True`: the newest checkpoint that was written to its end; if a killed run left
                none, training starts at the beginning.
            args, kwargs: See [`~transformers.Trainer.train`].
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        self.deployed_answers = self._keep_deployed_answers()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.null_spaces and len(self.held_out.dataset):
            self.certificate = measure_certificate(
                self.accelerator.unwrap_model(self.model),
                self.null_spaces,
                self.held_out,
                progress=not self.args.disable_tqdm,
            )
        return output

    # Evaluating

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Retained rows, anchors and probes, as the model is now.

        Args:
            eval_dataset ([`~datasets.Dataset`] or `list[dict]`, *optional*):
                Retained rows to use instead of the trainer's own.
            ignore_keys (`list[str]`, *optional*):
                Unused; part of Trainer's signature.
            metric_key_prefix (`str`, defaults to `"eval"`):
                Put before every key.

        Returns:
            `dict[str, float]`: `loss` (L_keep), `keep_agreement` (share of answer tokens whose most likely token is
            the deployed model's), `name_probability` and `name_probability_max` over the anchors under the first
            naming question, and the value of every probe.
        """
        loader = self.eval_rows
        if eval_dataset is not None:
            rows = RetainedRows(eval_dataset)
            loader = retained_loader(self.processing_class, rows, range(len(rows)), self.args.fit_batch_size)
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        try:
            metrics = compare_with_deployed(model, loader)
            images, question = self.train_dataset.images, self.questions.naming[0]
            probabilities = name_probabilities(model, self.processing_class, images, question, self.concept)
            metrics["name_probability"] = sum(probabilities) / len(probabilities)
            metrics["name_probability_max"] = max(probabilities)
            if self.probes:
                from space_peft.evaluation import evaluate_probes

                options = {"probes": self.probes, "progress": not self.args.disable_tqdm}
                if self._probe_baseline is None:
                    # What the original model knew; asked once, it does not change.
                    with deployed_model(model):
                        self._probe_baseline = evaluate_probes(model, self.processing_class, **options)
                result = evaluate_probes(model, self.processing_class, baseline=self._probe_baseline, **options)
                scores = {key: score["value"] for key, score in result.scores.items()}
                metrics.update({key: value for key, value in scores.items() if value is not None})
            metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
            self.log(dict(metrics))
        finally:
            model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Saving

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        write_json(folder / ANCHORS_NAME, self.provenance())
        if self.certificate is not None:
            self.certificate.save(folder / CERTIFICATE_NAME)
        if self.null_spaces and folder == Path(self.args.output_dir):
            # Checkpoints get theirs from the callback.
            save_null_spaces(folder / NULL_SPACES_NAME, self.null_spaces)

    def create_model_card(self, *args, tags=None, **kwargs):
        """Trainer's card with the tags of this method; `space_peft.hub_cards` writes a fuller one."""
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        super().create_model_card(*args, tags=[*self._tag_names, *tags], **kwargs)

    def provenance(self) -> dict:
        """Where the anchors came from: selection, refinement, pool rows, scores and p(name); no images."""
        skipped = {"image", "raw_image"}
        columns = [column for column in self.anchors.column_names if column not in skipped]
        return {
            **anchor_info(self.anchors),
            "concept": self.concept,
            "aliases": self.aliases,
            "anchors": self.anchors.select_columns(columns).to_list(),
        }
