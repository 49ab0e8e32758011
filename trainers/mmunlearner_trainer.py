"""MMUnlearner: gradient ascent on those weights alone that matter more to the concept than to the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainerCallback

from space_peft.losses import answer_labels
from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.modeling.prompts import answer_logits, encode_conversations, to_device
from space_peft.modeling.targets import Target, side_of
from space_peft.retained.reading import retained_loader

from .forget_config import ForgetConfig
from .forget_trainer import ForgetTrainer
from .saliency import saliency_mask, squared_gradients
from .unlearning_losses import nll_loss


@dataclass
class MMUnlearnerConfig(ForgetConfig):
    r"""
    Configuration of [`MMUnlearnerTrainer`]: the fields below, and every field of [`ForgetConfig`]. `target` is "all" by
    default, as published.

    Args:
        saliency_threshold (`float`, defaults to 1.0):
            beta: least ratio of a weight's saliency for the concept to that for the rest at which the ascent moves it.
        forget_every (`int`, *optional*):
            Steps from one with the ascent to the next; by default |retained rows| // |rows to forget|, as published.
    """

    target: Target = field(
        default="all", metadata={"help": "Default adapter placement: 'vision', 'language' or 'all'."}
    )
    saliency_threshold: float = field(default=1.0, metadata={"help": "Least saliency ratio of a weight to be moved."})
    forget_every: int | None = field(
        default=None, metadata={"help": "Steps between two with the ascent; None: retained rows // rows to forget."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.saliency_threshold > 0:
            raise ValueError(f"`saliency_threshold` must be above 0, got {self.saliency_threshold}.")
        if self.forget_every is not None and self.forget_every < 1:
            raise ValueError(f"`forget_every` must be at least 1 or None, got {self.forget_every}.")
        if self.retain_loss == "none" and self.forget_every != 1:
            raise ValueError(
                '`retain_loss` is "none", so a step without the ascent would do nothing; set forget_every=1.'
            )


class MMUnlearnerTrainer(ForgetTrainer):
    """
    MMUnlearner (arXiv 2502.11051) on a LoRA adapter: g = m * grad(-L_forget) + grad(L_retain), m a saliency mask.

    The published method masks weights. Here the trained weights are the entries of each `lora_B`; `lora_A` keeps its
    initial value (as in LoRA-FA, arXiv 2308.03303). Masking `lora_A` as well would be no mask at all: while B is 0 its
    gradient is 0 under every loss, so that every entry would pass. With A fixed, an entry of B is one number of the
    update, its saliency at B = 0 is the gradient's there, and an entry outside of the mask is moved by no ascent.
    Nothing but adapted layers is trained.

    What is preserved is, as published, retained rows with images for layers on the vision side, and all retained rows
    for layers of the language model: so put text-only rows about the concept among them.

    Args:
        args ([`MMUnlearnerConfig`], *optional*): Configuration.
        kwargs: See [`ForgetTrainer`].

    Raises:
        ValueError: Under DeepSpeed, which keeps gradients to itself; if no retained row has an image; see also
            [`ForgetTrainer`].
    """

    _name = "MMUnlearner"
    _paper = {
        "title": "MMUnlearner: Reformulating Multimodal Machine Unlearning in the Era of Multimodal Large Language Models",
        "id": "2502.11051",
    }
    _config_class = MMUnlearnerConfig

    @staticmethod
    def _steps_on_retained(args) -> bool:
        return True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            raise ValueError(
                "MMUnlearner masks gradients, which DeepSpeed reduces and applies by itself; use DDP or FSDP2 instead."
            )
        data = self.train_dataset
        self.forget_every = self.args.forget_every or max(1, len(data.indices) // len(data.rows))
        self.masks: dict[str, torch.Tensor] = {}  # layer -> (m, r), true where the ascent moves lora_B
        # After the null space's: it changes A, and with A what an entry of B means.
        self.add_callback(_SaliencyCallback(self))

    def measure_saliency(self) -> dict[str, torch.Tensor]:
        """The masks of all adapted layers, measured at B = 0 whatever B is now, so that a resumed run has the same."""
        model = self.accelerator.unwrap_model(self.model)
        layers = adapted_layers(model)
        weights = {name: lora_weights(layer)[1] for name, layer in layers.items()}
        shown = self.train_dataset.retained.has_image()
        rows = {kind: [i for i in self.train_dataset.indices if shown[i] == kind] for kind in (True, False)}
        if not rows[True]:
            raise ValueError("no retained row has an image, so no image is preserved; add rows with images.")

        def loss(batch: dict) -> torch.Tensor:
            batch = to_device(batch, model)
            return nll_loss(answer_logits(model, batch), answer_labels(batch["labels"]))

        def saliency(loader) -> list[torch.Tensor]:
            return squared_gradients(list(weights.values()), loader, loss)

        size = self.args.train_batch_size
        held = [weight.detach().clone() for weight in weights.values()]
        with torch.no_grad():
            for weight in weights.values():
                weight.zero_()
        # Of whole answers with their end of turn, as the retained ones are and as published: what the model says itself is
        # no part of it.
        answers = [{key: row[key] for key in ("prompt", "completion", "images")} for row in self.forget.given]
        forget = saliency(
            [encode_conversations(self.processing_class, answers[i : i + size]) for i in range(0, len(answers), size)]
        )
        loaders = {
            kind: retained_loader(self.processing_class, self.retained, own, size) for kind, own in rows.items() if own
        }
        parts = {kind: saliency(loader) for kind, loader in loaders.items()}
        with torch.no_grad():
            for weight, value in zip(weights.values(), held, strict=True):
                weight.copy_(value)
        batches = {kind: len(loader) for kind, loader in loaders.items()}
        masks = {}
        for place, name in enumerate(weights):
            kinds = [True, False] if side_of(name) == "language" else [True]
            counted = [kind for kind in kinds if kind in parts]
            total = sum(batches[kind] for kind in counted)
            preserve = sum(parts[kind][place] * (batches[kind] / total) for kind in counted)
            masks[name] = saliency_mask(forget[place], preserve, self.args.saliency_threshold)
        if not any(mask.any() for mask in masks.values()):
            raise ValueError(
                f"no weight matters {self.args.saliency_threshold} times as much to the concept as to the rest, so nothing "
                "would be forgotten; lower `saliency_threshold`."
            )
        return masks

    def forget_loss(self, logits: torch.Tensor, log_prob: torch.Tensor, inputs: dict) -> torch.Tensor:
        return log_prob.mean()

    def training_step(self, model, inputs, num_items_in_batch=None):
        layers = adapted_layers(self.accelerator.unwrap_model(self.model))
        weights = {name: lora_weights(layer)[:2] for name, layer in layers.items()}
        loss = torch.zeros((), device=self.args.device)
        if self.state.global_step % self.forget_every == 0:
            # Gradients of earlier micro-batches are masked already, or not to be.
            earlier = {name: b.grad for name, (_, b) in weights.items()}
            for _, b in weights.values():
                b.grad = None
            part = {key: value for key, value in inputs.items() if key.startswith("forget")}
            loss = loss + super().training_step(model, part, num_items_in_batch)
            for name, (_, b) in weights.items():
                if b.grad is None:
                    b.grad = earlier[name]
                    continue
                b.grad.mul_(self.masks[name])
                if earlier[name] is not None:
                    b.grad.add_(earlier[name])
        if self.args.retain_loss != "none":
            part = {key: value for key, value in inputs.items() if key.startswith("retain")}
            loss = loss + super().training_step(model, part, num_items_in_batch)
        for a, _ in weights.values():
            a.grad = None
        return loss


class _SaliencyCallback(TrainerCallback):
    def __init__(self, trainer: MMUnlearnerTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.masks = self._trainer.measure_saliency()
