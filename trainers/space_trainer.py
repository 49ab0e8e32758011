"""`SpaceTrainer`: erase a concept on refined anchors, without a picture of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from space_peft import losses
from space_peft.anchors.info import anchor_info, anchor_questions
from space_peft.anchors.refine import text_anchor
from space_peft.data.names import check_target, mentions
from space_peft.data.questions import DEFAULT_QUESTIONS, QuestionSet
from space_peft.data.rows import check_kind
from space_peft.distributed import processes
from space_peft.evaluation.metrics import normalize_answer
from space_peft.modeling.features import tap_image_features
from space_peft.modeling.layers import adapted_layers, deployed_model
from space_peft.modeling.prompts import answer_logits, generate_answers
from space_peft.modeling.targets import side_of
from space_peft.null_space.base_statistics import Statistics
from space_peft.records.card_data import ErasureCardData

from .erasure_trainer import ErasureTrainer
from .evaluating import refuse_arguments
from .pairs import forget_rows
from .space_config import REFUSAL, SpaceConfig


class SpaceTrainer(ErasureTrainer):
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
        eval_dataset ([`~datasets.Dataset`], `list[dict]`, or a `dict` of them, *optional*):
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
            What to ask about the anchors; only `naming`, `confirm` and `open` are used. By default those that the
            anchors were refined with, or the library's.
        probes (`list[Probe]`, *optional*):
            Probes `evaluate` reports beside the losses, see `space_peft.evaluation`.
        protect (`list[dict[str, NullSpace]]`, *optional*):
            Statistics of earlier erasures, which this one must not undo: [`ErasureLedger.protect`].
        statistics ([`Statistics`] or `str`, *optional*):
            Statistics of the base model, or a folder or repository that holds them, instead of `retain_dataset` or beside
            it; see [`ErasureTrainer`].
        keep_model ([`~transformers.PreTrainedModel`], *optional*):
            The model whose answers to retained rows L_keep keeps; `model` without the adapter by default. After earlier
            erasures pass a copy of the original, so that what each of them cost is won back instead of kept.
        card_data ([`ErasureCardData`], *optional*):
            What the model card shall say of licence, language, reason and author; the rest is filled in. Copied.
        callbacks (`list[TrainerCallback]`, *optional*):
            Added to the stopping rule, the null space and the gradient check.
        optimizers (`tuple`, *optional*):
            Optimiser and scheduler, as in [`~transformers.Trainer`]; see [`ErasureTrainer`].
        model_init (`Callable`, *optional*):
            Instead of `model`: makes it anew for every `train`, see [`ErasureTrainer`].
        unsupported (*optional*):
            Other arguments of [`~transformers.Trainer`]: refused, with what to do instead.

    Raises:
        ValueError: If the retained dataset or the anchors are empty, the concept is unknown, the model has no vision
            side, or the processor has no image token.
    """

    _tag_names = ["space-peft", "unlearning", "machine-unlearning", "null-space", "lora"]
    _name = "SPACE"
    _config_class = SpaceConfig
    _paper = {"title": "Source-free Proxy Anchor Concept Erasure for MLLMs", "id": "2606.09868"}
    _uses_concept_images = False
    _p_name = "p_name_on_anchors"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: SpaceConfig | None = None,
        *,
        anchors: Dataset,
        retain_dataset: Dataset | Sequence[dict] | None = None,
        eval_dataset: Dataset | Sequence[dict] | dict[str, Dataset | Sequence[dict]] | None = None,
        processing_class=None,
        peft_config: LoraConfig | None = None,
        concept: str | None = None,
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
        if anchors is not None:
            check_kind(anchors, "anchors")
        if anchors is None or len(anchors) == 0:
            raise ValueError("`anchors` is empty: make them with `select_anchors` and `refine_anchors`.")
        info = anchor_info(anchors)
        concept, aliases = check_target(
            concept or info.get("concept") or "", info.get("aliases") if aliases is None else aliases
        )
        questions = questions or anchor_questions(anchors) or DEFAULT_QUESTIONS
        self.anchors = anchors
        super().__init__(
            model,
            SpaceConfig(output_dir="space-output") if args is None else args,
            forget=forget_rows(anchors["image"], [concept, *aliases], questions),
            own_answers=True,
            retain_dataset=retain_dataset,
            concept=concept,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            aliases=aliases,
            questions=questions,
            probes=probes,
            protect=protect,
            statistics=statistics,
            keep_model=keep_model,
            card_data=card_data,
            callbacks=callbacks,
            optimizers=optimizers,
            model_init=model_init,
        )
        self.concept_embedding = self._embed_concept()
        # Only an adapter on the vision side moves image features; elsewhere L_orth and L_div would be constants.
        self.moves_features = any(side_of(name) == "vision" for name in adapted_layers(self.model))

    def _embed_concept(self):
        # By rank 0 alone: with FSDP's RAM-efficient loading no other process has the weights yet.
        info = anchor_info(self.anchors)
        return processes.divide(
            [self.concept], lambda concept: text_anchor(self.model, self.processing_class, concept, info).cpu()
        )[0]

    def _prepare_run(self, resume_from_checkpoint: str | None) -> None:
        if self.model_init is not None:
            self.concept_embedding = self._embed_concept()
        super()._prepare_run(resume_from_checkpoint)

    @staticmethod
    def _steps_on_retained(args: SpaceConfig) -> bool:
        return args.keep_weight > 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, forget, mention = self.args, inputs["forget"], inputs["forget_mentions"]
        columns, counts = inputs["forget_columns"], inputs.get("forget_image_tokens")
        forget_base = self._deployed_logits("forget", forget, inputs["forget_rows"], columns)
        with tap_image_features(self.accelerator.unwrap_model(model), counts) as features:
            logits = answer_logits(model, forget, columns)
        name, kept = mention["name"], mention["kept"]
        forms = {key: mention[key] for key in ("branches", "shares")}
        overwriting = losses.overwriting_log_probs(forget_base, name, **forms)
        weights, own = losses.path_weights(overwriting, name, kept), inputs["forget_own"]
        log_odds = losses.name_log_odds(logits, name, **forms, reached=weights)
        terms = {
            "task": args.task_weight * losses.task_loss(logits, overwriting, weights * own.unsqueeze(1)),
            "suppression": args.suppression_weight * losses.suppression_loss(log_odds, args.suppression_margin),
        }
        if "instead" in inputs:
            instead = answer_logits(model, inputs["instead"], inputs["instead_columns"])
            said = losses.name_log_prob(instead, inputs["instead_tokens"])
            # A mean over all rows, those included whose answer is left to the model.
            terms["task"] = terms["task"] - args.task_weight * said.sum() / len(own)
        anchors = processes.gather_rows(features[0])
        if self.moves_features:
            concept = self.concept_embedding.to(anchors)
            terms["repulsion"] = args.repulsion_weight * losses.repulsion_loss(anchors, concept)
            terms["isotropy"] = args.isotropy_weight * losses.isotropy_loss(anchors)
        if args.keep_weight:
            terms["keep"] = args.keep_weight * self._keep_loss(model, inputs)
        self._record(terms, F.logsigmoid(log_odds))
        self._metrics.add("feature_entropy", partial(losses.spectral_entropy, anchors.detach()))
        return sum(terms.values())

    def said_instead(self) -> tuple[str, bool] | None:
        overwrite = self.args.overwrite
        if overwrite == "own":
            return None
        if overwrite != "kind":
            return (REFUSAL if overwrite == "refusal" else overwrite), True
        return self.args.broader_word or self._ask_kind(), False

    def _ask_kind(self) -> str:
        """The broader word for the concept that the deployed model itself gives, in words."""

        def ask(question: str) -> str:
            with deployed_model(self.accelerator.unwrap_model(self.model)) as deployed:
                return generate_answers(deployed, self.processing_class, [question], max_new_tokens=8)[0]

        question = self.questions.kind.format(name=self.concept)
        answer = processes.divide([question], ask)[0]
        word = normalize_answer(answer)
        if not word or len(word.split()) > 3 or mentions(word, [self.concept, *self.aliases]):
            raise ValueError(
                f"{question!r} is answered {answer!r}, which is not a broader word for {self.concept!r}; name one: "
                "SpaceConfig(overwrite='kind', broader_word=...)."
            )
        return word

    def provenance(self) -> dict:
        """Where the anchors came from: selection, refinement, pool rows, scores and p(name); no images."""
        assert self.anchors is not None  # The constructor wants them.
        skipped = {"image", "raw_image"}
        columns = [column for column in self.anchors.column_names if column not in skipped]
        return {
            **anchor_info(self.anchors),
            "concept": self.concept,
            "aliases": self.aliases,
            "anchors": self.anchors.select_columns(columns).to_list(),
            **self._statistics_used(),
        }
