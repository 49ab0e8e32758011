"""Gradient ascent on what is to be forgotten, with or without a loss that holds the rest: GA, GradDiff, KL minimisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .forget_config import ForgetConfig
from .forget_trainer import ForgetTrainer


@dataclass
class GradDiffConfig(ForgetConfig):
    r"""
    Configuration of [`GradDiffTrainer`]: every field of [`ForgetConfig`].

    `retain_loss` chooses the method: `"none"` is gradient ascent (GA), `"nll"` gradient difference (GradDiff), `"kl"`
    KL minimisation.
    """


class GradDiffTrainer(ForgetTrainer):
    """
    Gradient ascent and its two remedies, as TOFU (arXiv 2401.06121) and MLLMU-Bench (arXiv 2410.22108) compare them.

    The loss is the mean log-probability of what is to be forgotten, in any form, plus the loss on retained rows that
    `args.retain_loss` names. It has no lower bound: `max_steps` (or `stop_threshold`) ends it.

    Args:
        args ([`GradDiffConfig`], *optional*): Configuration.
        kwargs: See [`ForgetTrainer`].
    """

    _name = "GradDiff"
    _paper = {"title": "TOFU: A Task of Fictitious Unlearning for LLMs", "id": "2401.06121"}
    _config_class = GradDiffConfig

    def forget_loss(self, logits: torch.Tensor, log_prob: torch.Tensor, inputs: dict) -> torch.Tensor:
        return log_prob.mean()
