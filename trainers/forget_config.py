"""Arguments that the trainers with images of the concept share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from .erasure_config import ErasureConfig


RetainLoss = Literal["none", "nll", "kl"]
RETAIN_LOSSES: tuple[RetainLoss, ...] = get_args(RetainLoss)


@dataclass
class ForgetConfig(ErasureConfig):
    r"""
    What the configurations of methods share that see images of the concept, beside every field of [`ErasureConfig`].

    Args:
        forget_weight (`float`, defaults to 1.0):
            Weight of the loss on the rows to forget.
        retain_loss (`str`, defaults to `"nll"`):
            What holds the retained rows: `"nll"`, the negative log-likelihood of their answers; `"kl"`, the KL
            divergence to the unadapted model; `"none"`, nothing.
        retain_weight (`float`, defaults to 1.0):
            Weight of it.
    """

    forget_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on the rows to forget."})
    retain_loss: RetainLoss = field(default="nll", metadata={"help": "Loss on retained rows."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on retained rows."})

    def __post_init__(self):
        super().__post_init__()
        if self.retain_loss not in RETAIN_LOSSES:
            expected = ", ".join(map(repr, RETAIN_LOSSES))
            raise ValueError(f"`retain_loss` must be one of {expected}, got {self.retain_loss!r}.")
        self.check_not_negative("retain_weight")
        if not self.forget_weight > 0:
            raise ValueError(
                f"`forget_weight` must be above 0, or nothing would be forgotten; got {self.forget_weight}."
            )
