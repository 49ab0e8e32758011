"""Arguments of `SpaceTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


@dataclass
class SpaceConfig(TrainingArguments):
    r"""
    Configuration of [`SpaceTrainer`]: the fields below, and every field of [`~transformers.TrainingArguments`].

    Defaults that differ from [`~transformers.TrainingArguments`]: `learning_rate` 5e-3 (the projection shortens every
    update), `max_steps` 60 (the stopping rule usually ends earlier), `per_device_train_batch_size` 16,
    `lr_scheduler_type` "constant" (so that stopping early does not depend on `max_steps`), `logging_steps` 1 and
    `remove_unused_columns` `False`.

    Args:
        target (`str`, defaults to `"language"`):
            Which side of the model gets the adapter when `peft_config` names no `target_modules`: "vision" (tower and
            projector), "language" or "all". Measured in `docs/decisions.md`.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Arguments of `from_pretrained` when the model is given as an id.
        task_weight (`float`, defaults to 1.0):
            Weight of L_task, the overwriting answer.
        suppression_weight (`float`, defaults to 1.0):
            Weight of L_out, -log(1 - p(name)).
        suppression_margin (`float`, defaults to 2.0):
            Nats added to the log-odds of the name in L_out, because anchors are weaker evidence than real images.
        repulsion_weight (`float`, defaults to 1.0):
            Weight of L_orth, the text-anchor repulsion. Without effect on an adapter that leaves image features alone.
        isotropy_weight (`float`, defaults to 0.1):
            Weight of L_div. Without effect on an adapter that leaves image features alone.
        keep_weight (`float`, defaults to 20.0):
            Weight of L_keep, the KL divergence to the unadapted model on retained rows; it is small to begin with.
        retain_per_anchor (`int`, defaults to 1):
            Retained rows drawn per anchor row of a batch.
        stop_threshold (`float` or `None`, defaults to 0.02):
            Training stops when the smoothed largest p(name) over the refined anchors is below it; `None` trains for
            `max_steps`. Over-training is what damages the rest.
        stop_smoothing (`float`, defaults to 0.7):
            Share of the old value in that running mean, in [0, 1).
        certificate_share (`float`, defaults to 0.1):
            Share of the retained rows kept out of fitting and training; the certificate's change is measured on them.
        fit_batch_size (`int`, defaults to 32):
            Retained rows a forward pass while the null space is fitted.
        fit_save_steps (`int`, *optional*):
            Batches between two saves of what fitting has seen, so that a run killed while fitting goes on from there.
            The file is as large as the second moments of all adapted layers; none is written by default.
        offload_null_spaces (`bool`, defaults to `False`):
            Whether the null spaces' eigenvectors stay in CPU memory and visit the device for each projection.
    """

    learning_rate: float = field(default=5e-3, metadata={"help": "Peak learning rate."})
    max_steps: int = field(default=60, metadata={"help": "Most optimiser steps; the stopping rule may end earlier."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Anchor rows a device and step."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many optimiser steps."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Kept False: rows are conversations."})

    # Parameters that control the model
    target: str = field(
        default="language", metadata={"help": "Default adapter placement: 'vision', 'language' or 'all'."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained` when the model is given as an id."}
    )

    # Parameters that control the losses
    task_weight: float = field(default=1.0, metadata={"help": "Weight of L_task, the overwriting answer."})
    suppression_weight: float = field(default=1.0, metadata={"help": "Weight of L_out, -log(1 - p(name))."})
    suppression_margin: float = field(default=2.0, metadata={"help": "Nats added to the name's log-odds in L_out."})
    repulsion_weight: float = field(default=1.0, metadata={"help": "Weight of L_orth, the text-anchor repulsion."})
    isotropy_weight: float = field(default=0.1, metadata={"help": "Weight of L_div, the isotropy of anchor features."})
    keep_weight: float = field(default=20.0, metadata={"help": "Weight of L_keep, the KL on retained rows."})
    retain_per_anchor: int = field(default=1, metadata={"help": "Retained rows drawn per anchor row."})

    # Parameters that control the stopping rule
    stop_threshold: float | None = field(
        default=0.02, metadata={"help": "Stop when the smoothed largest p(name) is below this; None: never."}
    )
    stop_smoothing: float = field(default=0.7, metadata={"help": "Share of the old value in the running mean."})

    # Parameters that control the constraint's statistics and its certificate
    certificate_share: float = field(
        default=0.1, metadata={"help": "Share of retained rows held out for the certificate."}
    )
    fit_batch_size: int = field(default=32, metadata={"help": "Retained rows a pass while fitting the null space."})
    fit_save_steps: int | None = field(
        default=None, metadata={"help": "Save what fitting has seen every so many batches; None: never."}
    )
    offload_null_spaces: bool = field(
        default=False, metadata={"help": "Keep the null spaces' eigenvectors in CPU memory."}
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        if self.target not in ("vision", "language", "all"):
            raise ValueError(f"`target` must be 'vision', 'language' or 'all', got {self.target!r}.")
        for name in (
            "task_weight",
            "suppression_weight",
            "repulsion_weight",
            "isotropy_weight",
            "keep_weight",
            "suppression_margin",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        if self.task_weight == 0 and self.suppression_weight == 0:
            raise ValueError(
                "`task_weight` and `suppression_weight` are both 0, so nothing would be forgotten; raise one of them."
            )
        if self.stop_threshold is not None and not 0 < self.stop_threshold < 1:
            raise ValueError(f"`stop_threshold` must be in (0, 1) or None, got {self.stop_threshold}.")
        if not 0 <= self.stop_smoothing < 1:
            raise ValueError(f"`stop_smoothing` must be in [0, 1), got {self.stop_smoothing}.")
        if not 0 <= self.certificate_share < 1:
            raise ValueError(f"`certificate_share` must be in [0, 1), got {self.certificate_share}.")
        for name in ("retain_per_anchor", "fit_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.fit_save_steps is not None and self.fit_save_steps < 1:
            raise ValueError(f"`fit_save_steps` must be at least 1 or None, got {self.fit_save_steps}.")
