"""Losses of published unlearning methods, each a plain function of log-probabilities or features.

Shapes and alignment as in `space_peft.losses`: column j of the trailing logits predicts column j of `answer_labels`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from space_peft.losses import token_log_probs
from space_peft.modeling.prompts import IGNORE_INDEX


def nll_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the answers, mean over their tokens: what a causal language model is trained with.

    Args:
        logits (`torch.Tensor`): `(n, t, vocabulary)`, or one column more.
        targets (`torch.Tensor`): `(n, t)`, -100 where no token is asked for.
    """
    return -token_log_probs(logits, targets).sum() / (targets != IGNORE_INDEX).sum()


def npo_loss(log_prob: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """Negative preference optimisation (arXiv 2404.05868, eq. 3): -(2 / beta) E log sigmoid(-beta log(p / p_ref)).

    For beta -> 0 its gradient is that of gradient ascent; for larger beta an answer that is already less likely than
    under the reference pulls less.

    Args:
        log_prob (`torch.Tensor`): `(n,)`, log p of whole answers.
        reference (`torch.Tensor`): `(n,)`, the same of the reference model.
        beta (`float`): Inverse temperature, > 0.
    """
    return -2 / beta * F.logsigmoid(-beta * (log_prob - reference)).mean()


def contrastive_loss(
    features: torch.Tensor, positive: torch.Tensor, negatives: torch.Tensor, temperature: float
) -> torch.Tensor:
    """InfoNCE: pulls each feature to its positive and pushes it from all negatives, by cosine.

    -log(exp(cos(z_i, z+_i) / T) / (exp(cos(z_i, z+_i) / T) + sum_j exp(cos(z_i, z-_j) / T))), mean over i.

    Args:
        features (`torch.Tensor`): `(n, d)`, z.
        positive (`torch.Tensor`): `(n, d)`, or `(d,)` where one serves all.
        negatives (`torch.Tensor`): `(m, d)`.
        temperature (`float`): T, > 0.
    """
    z = F.normalize(features.float(), dim=-1)
    pull = (z * F.normalize(positive.float(), dim=-1)).sum(dim=-1, keepdim=True)  # (n, 1)
    push = z @ F.normalize(negatives.float(), dim=-1).T  # (n, m)
    return -(torch.cat([pull, push], dim=1) / temperature).log_softmax(dim=1)[:, 0].mean()
