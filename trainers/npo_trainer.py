"""Negative preference optimisation: gradient ascent that weakens where the answer is already unlikely."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .forget_config import ForgetConfig
from .forget_trainer import ForgetTrainer
from .unlearning_losses import npo_loss


@dataclass
class NPOConfig(ForgetConfig):
    r"""
    Configuration of [`NPOTrainer`]: the field below, and every field of [`ForgetConfig`].

    Args:
        beta (`float`, defaults to 0.4):
            Inverse temperature; 0.4 as in MLLMU-Bench (arXiv 2410.22108). The smaller, the nearer to gradient ascent.
    """

    beta: float = field(default=0.4, metadata={"help": "Inverse temperature of NPO, > 0."})

    def __post_init__(self):
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"`beta` must be above 0, got {self.beta}; for gradient ascent use GradDiffTrainer.")


class NPOTrainer(ForgetTrainer):
    """
    Negative preference optimisation (arXiv 2404.05868); its reference is the model with the adapter switched off.

    Args:
        args ([`NPOConfig`], *optional*): Configuration.
        kwargs: See [`ForgetTrainer`].
    """

    _name = "NPO"
    _paper = {
        "title": "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
        "id": "2404.05868",
    }
    _config_class = NPOConfig

    @property
    def _compares_with_deployed(self) -> bool:
        return True

    def forget_loss(self, logits: torch.Tensor, log_prob: torch.Tensor, inputs: dict) -> torch.Tensor:
        rows, columns = inputs["forget_rows"], inputs["forget_columns"]
        reference = self._said(self._deployed_logits("forget", inputs["forget"], rows, columns), inputs)
        return npo_loss(log_prob, reference, self.args.beta)
