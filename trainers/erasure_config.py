"""Arguments that every erasure trainer has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from space_peft.canary.items import MOST_ITEMS
from space_peft.modeling.targets import Target


# What `None` stands for; `num_train_epochs` is Trainer's own default, which `max_steps` overrides.
RESOLVED: dict[str, Any] = {"max_steps": 60, "num_train_epochs": 3.0}
# Options of `TrainingArguments` that would do nothing here, or not what they say.
_WITHOUT_EFFECT = {
    "remove_unused_columns": (False, "rows are conversations, whose columns no model's `forward` names"),
    "label_smoothing_factor": (0.0, "the losses are the method's own and smooth no labels"),
    "train_sampling_strategy": ("random", "the order of the rows is fixed by `seed`, so that runs can be resumed"),
    "group_by_length": (False, "the order of the rows is fixed by `seed`, so that runs can be resumed"),
    "fp16_full_eval": (False, "`evaluate` compares with the deployed model in the precision it is loaded in"),
    "bf16_full_eval": (False, "`evaluate` compares with the deployed model in the precision it is loaded in"),
}


@dataclass
class ErasureConfig(TrainingArguments):
    r"""
    What the configurations of all erasure trainers share, beside every field of [`~transformers.TrainingArguments`].

    Defaults that differ from [`~transformers.TrainingArguments`]: `learning_rate` 2e-3 (there are few steps, and the
    projection shortens every update), `max_steps` 60, `per_device_train_batch_size` 16, `lr_scheduler_type` "constant"
    (so that stopping early does not depend on `max_steps`), `logging_steps` 1, `remove_unused_columns` `False` and
    `per_device_eval_batch_size` that of `fit_batch_size`. Every step is logged, to `report_to` and
    `trainer.state.log_history`; some ten lines of a run are shown (all, as they are: `callbacks=[PrinterCallback()]`). With `num_train_epochs` and without `max_steps` training goes on
    for as many epochs; one is every row to forget once. With both `max_steps` counts, as in Trainer.

    Args:
        target (`str`, defaults to `"language"`):
            Which side of the model gets the adapter when `peft_config` names no `target_modules`: "vision" (tower and
            projector), "language" or "all". Measured in `docs/decisions.md`.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Arguments of `from_pretrained` when the model is given as an id.
        retain_per_forget (`int`, defaults to 1):
            Retained rows drawn per row to forget of a batch.
        own_answers (`bool`, defaults to `True`):
            Whether the model is asked how it names the concept: each place at which its answers to naming and open
            questions do becomes a row to forget. Without, only the name alone as an answer is forgotten, and sentences
            go on naming it.
        answer_tokens (`int`, defaults to 24):
            Longest answer, in tokens, that the model gives to a naming or open question when it is asked how it names the
            concept.
        refresh_steps (`int`, *optional*, defaults to 20):
            Steps after which the model is asked again, as it is then; what it still says becomes a row to forget. `None`:
            it is asked before training only.
        stop_threshold (`float`, *optional*):
            Training stops when the smoothed largest p(name) over the rows to forget is below it; by default it goes on
            for `max_steps`.
        stop_smoothing (`float`, defaults to 0.7):
            Share of the old value in that running mean, in [0, 1).
        certificate_share (`float`, defaults to 0.1):
            Share of the distinct images and of the distinct texts of the retained rows kept out of fitting and training,
            with all of their rows; the certificate's change is measured on them.
        canary_items (`int`, defaults to 4):
            Most images drawn from a seed, and most anchors, whose answers are stored with the adapter so that loading it
            can be checked (`space_peft.canary`); 0 for none.
        fit_batch_size (`int`, defaults to 32):
            Retained rows a forward pass while the null space is fitted.
        fit_save_steps (`int`, *optional*):
            Batches between two saves of what fitting has seen, so that a run killed while fitting goes on from there.
            The file is as large as the second moments of all adapted layers; none is written by default.
        offload_null_spaces (`bool`, defaults to `False`):
            Whether the null spaces' eigenvectors stay in CPU memory and visit the device for each projection.
    """

    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    max_steps: int | None = field(
        default=None, metadata={"help": "Most optimiser steps; None: 60, or as many as `num_train_epochs` takes."}
    )
    num_train_epochs: float | None = field(default=None, metadata={"help": "Epochs, where `max_steps` is not set."})
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Retained rows a pass in `evaluate` and `predict`; None: `fit_batch_size`."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows to forget a device and step."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many optimiser steps."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Kept False: rows are conversations."})

    # Parameters that control the model
    target: Target = field(
        default="language", metadata={"help": "Default adapter placement: 'vision', 'language' or 'all'."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained` when the model is given as an id."}
    )

    # Parameters that control the data
    retain_per_forget: int = field(default=1, metadata={"help": "Retained rows drawn per row to forget."})

    # Parameters that control what of the model's own answers is forgotten
    own_answers: bool = field(default=True, metadata={"help": "Forget the name where the model's own answers say it."})
    answer_tokens: int = field(
        default=24, metadata={"help": "Longest answer asked for to find the name in, in tokens."}
    )
    refresh_steps: int | None = field(
        default=20, metadata={"help": "Ask the model again every so many steps; None: before training only."}
    )

    # Parameters that control the stopping rule
    stop_threshold: float | None = field(
        default=None, metadata={"help": "Stop when the smoothed largest p(name) is below this; None: never."}
    )
    stop_smoothing: float = field(default=0.7, metadata={"help": "Share of the old value in the running mean."})

    # Parameters that control the constraint's statistics and its certificate
    certificate_share: float = field(
        default=0.1, metadata={"help": "Share of retained rows held out for the certificate."}
    )
    canary_items: int = field(
        default=4, metadata={"help": "Images of each kind whose answers are stored to check loading; 0: none."}
    )
    fit_batch_size: int = field(default=32, metadata={"help": "Retained rows a pass while fitting the null space."})
    fit_save_steps: int | None = field(
        default=None, metadata={"help": "Save what fitting has seen every so many batches; None: never."}
    )
    offload_null_spaces: bool = field(
        default=False, metadata={"help": "Keep the null spaces' eigenvectors in CPU memory."}
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """`model_init_kwargs`, or none; a copy."""
        assert not isinstance(self.model_init_kwargs, str)  # A text has been read by now.
        return dict(self.model_init_kwargs or {})

    def __post_init__(self):
        if self.max_steps is None:
            self.max_steps = RESOLVED["max_steps"] if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = RESOLVED["num_train_epochs"]
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.fit_batch_size
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # There is nothing to copy to, and torch would warn of it.
        if isinstance(self.model_init_kwargs, str):
            raise ValueError(
                f"`model_init_kwargs` is the text {self.model_init_kwargs!r:.80}; expected a dict, or one written as JSON: "
                """'{"revision": "main"}'."""
            )
        for name, (allowed, why) in _WITHOUT_EFFECT.items():
            if getattr(self, name, allowed) != allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but {why}; leave it at {allowed!r}.")
        if self.target not in ("vision", "language", "all"):
            raise ValueError(f"`target` must be 'vision', 'language' or 'all', got {self.target!r}.")
        if self.stop_threshold is not None and not 0 < self.stop_threshold < 1:
            raise ValueError(f"`stop_threshold` must be in (0, 1) or None, got {self.stop_threshold}.")
        if not 0 <= self.stop_smoothing < 1:
            raise ValueError(f"`stop_smoothing` must be in [0, 1), got {self.stop_smoothing}.")
        if not 0 <= self.certificate_share < 1:
            raise ValueError(f"`certificate_share` must be in [0, 1), got {self.certificate_share}.")
        if not 0 <= self.canary_items <= MOST_ITEMS // 2:
            raise ValueError(f"`canary_items` must be in [0, {MOST_ITEMS // 2}], got {self.canary_items}.")
        for name in ("retain_per_forget", "fit_batch_size", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("fit_save_steps", "refresh_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 or None, got {getattr(self, name)}.")
        if self.refresh_steps is not None and self.dataloader_num_workers > 0:
            raise ValueError(
                f"`refresh_steps` adds rows while training, which {self.dataloader_num_workers} dataloader workers would "
                "not see. Set `dataloader_num_workers=0` (images are few and decoded once), or `refresh_steps=None`."
            )

    def check_not_negative(self, *names: str) -> None:
        """Raises `ValueError` for a field below 0 (or NaN)."""
        for name in names:
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
