"""The losses of the erasure (docs/method.md, section 3), each a plain function of logits or features.

Throughout, `logits` are the trailing logits of a batch made by `modeling.prompts.encode_conversations`, that is
`model(**batch, logits_to_keep=answer_columns(labels)).logits`; column j of them predicts column j of `answer_labels`.

Which of these the SPACE abstract states and which are our formulation is listed in `docs/fidelity.md`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .modeling.prompts import IGNORE_INDEX, answer_columns


# log of a probability that counts as none: finite, so that differences and gradients are.
_NEVER = -1e4


def answer_labels(labels: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """The labels aligned with the trailing logits: `(n, length)` -> `(n, answer_columns - 1)`; `columns` if it is known."""
    columns = answer_columns(labels) if columns is None else columns
    return labels[:, labels.shape[1] - columns + 1 :]


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


def name_log_prob(logits: torch.Tensor, name: torch.Tensor) -> torch.Tensor:
    """log p of the name's tokens as they stand in the row, one form of it: `(n,)`; for any form see `name_log_odds`.

    Args:
        logits (`torch.Tensor`): See `token_log_probs`.
        name (`torch.Tensor`): `(n, t)` name tokens, -100 elsewhere.
    """
    return token_log_probs(logits, name).sum(dim=1)


def name_log_odds(
    logits: torch.Tensor,
    name: torch.Tensor,
    branches: torch.Tensor | None = None,
    shares: torch.Tensor | None = None,
    reached: torch.Tensor | None = None,
) -> torch.Tensor:
    """log P - log(1 - P), P the probability that the name is said here in *any* form (ours).

    The forms of a name are a tree of tokens. A row follows one path through it; at each of the path's tokens other forms
    branch off ("fox" | "fo" "xes" | "Fox"). What follows a branch is not in the row, so the share of it that ends in a
    form is the deployed model's (`shares`, exact for a branch that is a whole form: 1). With path t_0 .. t_m-1

        P     = Π_j p_j(t_j) + sum_j Π_{i<j} p_i(t_i) sum_{v in branches_j} w_j(v) p_j(v)
        1 - P =                sum_j Π_{i<j} p_i(t_i) sum_{v != t_j} (1 - w_j(v)) p_j(v)

    Both are summed as logarithms, from the logits, so neither is rounded to 0 or 1: a name that leads by 50 nats has a
    gradient as any other.

    Args:
        logits (`torch.Tensor`): `(n, t, vocabulary)`, or one column more.
        name (`torch.Tensor`): `(n, t)` tokens of the path, -100 elsewhere; each row has at least one.
        branches (`torch.Tensor`, *optional*): `(n, t, c)` tokens that begin other forms, -100 for none.
        shares (`torch.Tensor`, *optional*): `(n, t, c)`, w in [0, 1].
        reached (`torch.Tensor`, *optional*): `(n, t)` factors of each position's *gradient*; the value does not change.
            With those of `path_weights`, a name is unlearned where answers branch off it: "birthday" is not said any
            more, rather than followed by nonsense.

    Returns:
        `torch.Tensor`: `(n,)`, float32.
    """
    log_p = logits[:, : name.shape[1]].float().log_softmax(dim=-1)  # (n, t, vocabulary)
    if reached is not None:
        factor = reached.unsqueeze(-1)
        log_p = factor * log_p + ((1 - factor) * log_p).detach()
    is_name = name != IGNORE_INDEX
    path = name.clamp(min=0).unsqueeze(-1)
    on_path = log_p.gather(-1, path).squeeze(-1).masked_fill(~is_name, 0.0)  # (n, t)
    before = F.pad(on_path.cumsum(dim=1)[:, :-1], (1, 0))  # sum of log p over the path's tokens before j
    # What leaves the path at j without saying the name.
    left = log_p.scatter(-1, path, float("-inf"))
    said = [on_path.sum(dim=1, keepdim=True)]
    if branches is not None:
        assert shares is not None, "`branches` without `shares`"
        tokens, present = branches.clamp(min=0), branches != IGNORE_INDEX
        shares = shares.to(log_p).masked_fill(~present, 0.0)
        branched = log_p.gather(-1, tokens) + shares.log().clamp(min=_NEVER)
        said.append((before + branched.logsumexp(dim=-1)).masked_fill(~is_name, float("-inf")))
        left = left.scatter_add(-1, tokens, torch.log1p(-shares).clamp(min=_NEVER).masked_fill(~present, 0.0))
    left = (before + left.logsumexp(dim=-1)).masked_fill(~is_name, float("-inf"))
    return torch.cat(said, dim=1).logsumexp(dim=1) - left.logsumexp(dim=1)


def overwriting_log_probs(
    logits: torch.Tensor,
    name: torch.Tensor,
    branches: torch.Tensor | None = None,
    shares: torch.Tensor | None = None,
    floor: float = 0.1,
) -> torch.Tensor:
    """The model's own answer distribution *given that the name is not said here, in any form* (ours).

    It is the distribution closest to the model's (in KL divergence) among all that never say the name: the least
    change that erases. By the chain rule, at position j of the path (see `name_log_odds`)

        q_j(v) ∝ p_j(v) (1 - w_j(v)),   w_j(t_j) = w_{j+1}, the chance that the name is said from the next position on

    so the last token and all one-token forms are masked out, and an earlier one keeps what continues otherwise ("red
    apple" erased, "red pepper" kept).

    Each factor is lowered by `floor` (and rescaled, at least 0): continuations that the model gives less than that
    together are the noise of its training, and an answer made of them is none ("birthday drum").

    Args:
        logits (`torch.Tensor`): `(n, t, vocabulary)` of the *unadapted* model, fed the row.
        name (`torch.Tensor`): `(n, t)` tokens of the path, -100 elsewhere.
        branches (`torch.Tensor`, *optional*): `(n, t, c)`, see `name_log_odds`; before the path, what is not to be said
            there either.
        shares (`torch.Tensor`, *optional*): `(n, t, c)`, see `name_log_odds`.
        floor (`float`, defaults to 0.1): In [0, 1); 0 gives the exact conditional distribution.

    Returns:
        `torch.Tensor`: log q, `(n, t, vocabulary)`, float32; outside of path and branches it is the model's own.
    """
    logits = logits[:, : name.shape[1]].float()
    is_name = name != IGNORE_INDEX
    log_p = token_log_probs(logits, name)  # (n, t)
    if branches is None:
        branches = name.new_full((*name.shape, 1), IGNORE_INDEX)
        shares = torch.zeros_like(branches, dtype=torch.float)
    assert shares is not None, "`branches` without `shares`"
    present = branches != IGNORE_INDEX
    shares = shares.float().masked_fill(~present, 0.0)
    aside = (logits.log_softmax(dim=-1).gather(-1, branches.clamp(min=0)).exp() * shares).sum(dim=-1)  # (n, t)
    # From the path's end backwards: the chance that the name is said from position j on, by the path or beside it.
    said = torch.ones_like(log_p[:, 0])
    rest = []
    for j in reversed(range(name.shape[1])):
        rest.append(said)
        said = torch.where(is_name[:, j], aside[:, j] + log_p[:, j].exp() * said, said)
    rest = torch.stack(rest[::-1], dim=1).clamp(max=1.0)  # (n, t): w of the path's own token

    def penalty(weight: torch.Tensor) -> torch.Tensor:
        return (((1 - weight) - floor) / (1 - floor)).clamp(min=0).log().clamp(min=_NEVER)

    shifted = logits.scatter_add(
        -1, name.clamp(min=0).unsqueeze(-1), penalty(rest).masked_fill(~is_name, 0).unsqueeze(-1)
    )
    shifted = shifted.scatter_add(-1, branches.clamp(min=0), penalty(shares).masked_fill(~present, 0.0))
    return shifted.log_softmax(dim=-1)


def path_weights(overwriting: torch.Tensor, name: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """How often the overwriting distribution q gets to each token of the row: Π_{i<j} q_i(name_i) on the name's path.

    Args:
        overwriting (`torch.Tensor`): `(n, t, vocabulary)`, log q.
        name (`torch.Tensor`): `(n, t)` name tokens, -100 elsewhere.
        kept (`torch.Tensor`, *optional*): `(n, t)`, true for tokens before the name that count 1.

    Returns:
        `torch.Tensor`: `(n, t)` in [0, 1], 1 at the name's first token, 0 after its end and before it where not kept.
    """
    is_name = name != IGNORE_INDEX
    log_q = overwriting.gather(-1, name.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~is_name, 0.0)
    weights = F.pad(log_q.cumsum(dim=1)[:, :-1], (1, 0)).exp() * is_name
    return weights if kept is None else weights + (kept & ~is_name)


def task_loss(logits: torch.Tensor, overwriting: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """L_task: KL(q || p), q = `overwriting_log_probs`, of the sentence up to the name and along the name's path.

    Position j counts as often as q gets there (`path_weights`), which makes the sum over the path the part of the KL
    divergence between *whole answers* that lies on it. Before the name, q is what the model says anyway: the sentence
    that leads to the name stays, only the name goes.

    Args:
        logits (`torch.Tensor`): `(n, t, vocabulary)` of the adapted model.
        overwriting (`torch.Tensor`): `(n, t, vocabulary)`, log q.
        weights (`torch.Tensor`): `(n, t)`, see `path_weights`.

    Returns:
        `torch.Tensor`: Scalar, mean over rows.
    """
    log_probs = logits[:, : weights.shape[1]].float().log_softmax(dim=-1)
    kl = (overwriting.exp() * (overwriting - log_probs)).sum(dim=-1)  # (n, t)
    return (kl * weights).sum(dim=1).mean()


def suppression_loss(log_odds: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """L_out: -log(1 - p(name)), mean over rows (ours).

    In log-odds z it is softplus(z). With a margin m it is softplus(z + m): as if each anchor were stronger evidence of
    the concept by m nats, as the concept's own images are.

    Args:
        log_odds (`torch.Tensor`): `(n,)`, of the name, see `name_log_odds`.
        margin (`float`, defaults to 0): m, in nats.
    """
    return F.softplus(log_odds + margin).mean()


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
    base = base_logits[:, : targets.shape[1]].float().log_softmax(dim=-1)
    adapted = logits[:, : targets.shape[1]].float().log_softmax(dim=-1)
    # Not those under the mask alone: how many they are a card would have to tell the host first.
    divergence = (base.exp() * (base - adapted)).sum(dim=-1)
    return divergence.masked_fill(~mask, 0.0).sum() / mask.sum()
