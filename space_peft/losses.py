"""The losses of the erasure (METHOD: DCSI), each a plain function of logits or features.

Throughout, `logits` are the trailing logits of a batch made by `space_peft.prompts.encode_conversations`, that is
`model(**batch, logits_to_keep=answer_columns(labels)).logits`; column j of them predicts column j of `answer_labels`.

Which of these the SPACE abstract states and which are our formulation is listed in `docs/fidelity.md`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .prompts import IGNORE_INDEX, answer_columns


def answer_labels(labels: torch.Tensor) -> torch.Tensor:
    """The labels aligned with the trailing logits: `(n, length)` -> `(n, answer_columns - 1)`."""
    return labels[:, labels.shape[1] - answer_columns(labels) + 1 :]


def token_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of every target token; 0 where there is none.

    Args:
        logits (`torch.Tensor`): `(n, t, vocabulary)` or `(n, t + 1, vocabulary)` (the last column predicts nothing).
        targets (`torch.Tensor`): `(n, t)`, -100 where no token is asked for.

    Returns:
        `torch.Tensor`: `(n, t)`, float32.
    """
    log_probs = logits[:, : targets.shape[1]].float().log_softmax(dim=-1)
    picked = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(targets == IGNORE_INDEX, 0.0)


def name_log_prob(logits: torch.Tensor, name: torch.Tensor, reached: torch.Tensor | None = None) -> torch.Tensor:
    """log p(name | image, question), the sum over the name's tokens: `(n,)`.

    Args:
        logits (`torch.Tensor`): See `token_log_probs`.
        name (`torch.Tensor`): `(n, t)` name tokens, -100 elsewhere.
        reached (`torch.Tensor`, *optional*): `(n, t)` factors of each token's *gradient*; the value does not change.
            With those of `path_weights`, a name is unlearned where answers branch off it: "birthday" is not said any
            more, rather than followed by nonsense.
    """
    log_p = token_log_probs(logits, name)
    if reached is not None:
        log_p = reached * log_p + ((1 - reached) * log_p).detach()
    return log_p.sum(dim=1)


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0, accurate at both ends (Maechler 2012); x = 0 gives a large negative number."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -0.6931472, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def overwriting_log_probs(logits: torch.Tensor, name: torch.Tensor, floor: float = 0.1) -> torch.Tensor:
    """The model's own answer distribution *given that the answer does not begin with the name* (ours).

    It is the distribution closest to the model's (in KL divergence) among all that never say the name: the least
    change that erases. By the chain rule, at position j of the name

        q_j(v) ∝ p_j(v)                              for v != name_j
        q_j(name_j) ∝ p_j(name_j) (1 - Π_{i>j} p_i(name_i))

    so the last token is masked out, and an earlier one keeps what continues otherwise ("red apple" erased, "red
    pepper" kept). For a name of one token this is the masked, renormalised distribution of METHOD, section 4.

    The bracket is lowered by `floor` (and rescaled, at least 0): continuations that the model gives less than that
    together are the noise of its training, and an answer made of them is none ("birthday drum").

    Args:
        logits (`torch.Tensor`): `(n, t, vocabulary)` of the *unadapted* model, fed the name as its answer.
        name (`torch.Tensor`): `(n, t)` name tokens, -100 after the name's end.
        floor (`float`, defaults to 0.1): In [0, 1); 0 gives the exact conditional distribution.

    Returns:
        `torch.Tensor`: log q, `(n, t, vocabulary)`, float32; rows after the name's end are the model's own.
    """
    logits = logits[:, : name.shape[1]].float()
    log_p = token_log_probs(logits, name)  # (n, t)
    rest = F.pad(log_p.flip(1).cumsum(1).flip(1)[:, 1:], (0, 1))  # sum of log p over the tokens after j
    is_name = name != IGNORE_INDEX
    is_last = is_name & ~F.pad(is_name[:, 1:], (0, 1), value=False)
    otherwise = ((-torch.expm1(rest) - floor) / (1 - floor)).clamp(min=0)  # 1 - Π_{i>j} p_i(name_i), less the floor
    penalty = torch.where(is_last, torch.full_like(rest, -1e4), otherwise.log().clamp(min=-1e4))
    penalty = penalty.masked_fill(~is_name, 0.0)
    shifted = logits.scatter_add(-1, name.clamp(min=0).unsqueeze(-1), penalty.unsqueeze(-1))
    return shifted.log_softmax(dim=-1)


def path_weights(overwriting: torch.Tensor, name: torch.Tensor) -> torch.Tensor:
    """How often the overwriting distribution q gets to each token of the name: Π_{i<j} q_i(name_i).

    Args:
        overwriting (`torch.Tensor`): `(n, t, vocabulary)`, log q.
        name (`torch.Tensor`): `(n, t)` name tokens, -100 elsewhere.

    Returns:
        `torch.Tensor`: `(n, t)` in [0, 1], 1 at the first token and 0 after the name's end.
    """
    is_name = name != IGNORE_INDEX
    log_q = overwriting.gather(-1, name.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~is_name, 0.0)
    return F.pad(log_q.cumsum(dim=1)[:, :-1], (1, 0)).exp() * is_name


def task_loss(logits: torch.Tensor, overwriting: torch.Tensor, name: torch.Tensor) -> torch.Tensor:
    """L_task: KL(q || p), q = `overwriting_log_probs`, along the name's path.

    Position j counts as often as q gets there (`path_weights`), which makes the sum the part of the KL divergence
    between *whole answers* that lies on the path.

    Args:
        logits (`torch.Tensor`): `(n, t, vocabulary)` of the adapted model.
        overwriting (`torch.Tensor`): `(n, t, vocabulary)`, log q.
        name (`torch.Tensor`): `(n, t)` name tokens, -100 elsewhere.

    Returns:
        `torch.Tensor`: Scalar, mean over rows.
    """
    log_probs = logits[:, : name.shape[1]].float().log_softmax(dim=-1)
    kl = (overwriting.exp() * (overwriting - log_probs)).sum(dim=-1)  # (n, t)
    return (kl * path_weights(overwriting, name)).sum(dim=1).mean()


def suppression_loss(log_prob: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """L_out: -log(1 - p(name)), mean over rows (ours).

    In log-odds z = log p - log(1 - p) it is softplus(z). With a margin m it is softplus(z + m): as if each anchor were
    stronger evidence of the concept by m nats, as the concept's own images are.

    Args:
        log_prob (`torch.Tensor`): `(n,)`, log p(name), see `name_log_prob`.
        margin (`float`, defaults to 0): m, in nats.
    """
    return F.softplus(log_prob - log1mexp(log_prob) + margin).mean()


def repulsion_loss(features: torch.Tensor, concept: torch.Tensor) -> torch.Tensor:
    """L_orth: mean of relu(cos(z, e_c))^2, the text-anchor repulsion (the paper's term, our formula).

    Args:
        features (`torch.Tensor`): `(n, d)` pooled projected features z of the anchors.
        concept (`torch.Tensor`): `(d,)` the concept's text embedding e_c in the same space.
    """
    cosine = F.normalize(features.float(), dim=-1) @ F.normalize(concept.float(), dim=-1)
    return F.relu(cosine).square().mean()


def isotropy_loss(features: torch.Tensor) -> torch.Tensor:
    """L_div: ||G - I||_F^2 / n^2, G the Gram matrix of the normalised features `(n, d)` (our formula)."""
    z = F.normalize(features.float(), dim=-1)
    gram = z @ z.T
    return (gram - torch.eye(len(z), device=z.device)).square().mean()


def spectral_entropy(features: torch.Tensor) -> torch.Tensor:
    """H = -sum p_k log p_k, p_k = s_k / sum s, of the singular values s of the features `(n, d)`: scalar, in nats."""
    s = torch.linalg.svdvals(features.float())
    p = s / s.sum().clamp(min=1e-12)
    return -(p * p.clamp(min=1e-12).log()).sum()


def keep_loss(logits: torch.Tensor, base_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """L_keep: KL(base || adapted) on the answers of retained rows, mean over their tokens.

    Args:
        logits (`torch.Tensor`): `(n, t, vocabulary)` of the adapted model.
        base_logits (`torch.Tensor`): The same of the model with the adapter disabled.
        targets (`torch.Tensor`): `(n, t)`; tokens of -100 do not count.
    """
    mask = targets != IGNORE_INDEX
    base = base_logits[:, : targets.shape[1]].float().log_softmax(dim=-1)[mask]
    adapted = logits[:, : targets.shape[1]].float().log_softmax(dim=-1)[mask]
    return (base.exp() * (base - adapted)).sum(dim=-1).mean()
