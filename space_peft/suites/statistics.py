"""How many answers are scored together: truth ratio, forget quality, leakage, utility.

The definitions are those of TOFU and open-unlearning (read at commit d3d7cf9), without their faults; docs/suites.md says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .extras import require


_NOTHING = 1e-10
# Of the histogram behind the Jensen-Shannon divergence.
BINS = 10
# Share of an answer's least likely tokens that Min-K% looks at.
MIN_K = 0.4


def truth_ratio(right: Sequence[float], wrong: Sequence[float]) -> float:
    """R = P_wrong / P_right of one question: how much likelier wrong answers are than the right one.

    P = exp(-loss), loss the mean over an answer's tokens; of several answers the losses are averaged.

    Args:
        right (`list[float]`): Loss of each paraphrase of the right answer (of the answer itself, where there is none).
        wrong (`list[float]`): Loss of each wrong answer.

    Returns:
        `float`: At least 0; below 1 the right answer is likelier.

    Raises:
        ValueError: If one of them is empty.
    """
    if not right or not wrong:
        raise ValueError(f"expected losses of right and of wrong answers, got {len(right)} and {len(wrong)}.")
    return math.exp(-float(np.mean(wrong))) / (math.exp(-float(np.mean(right))) + _NOTHING)


def truth_ratio_score(ratios: Sequence[float], *, forgotten: bool) -> float | None:
    """The mean over questions, so that higher is better on either side.

    Of forgotten people, right and wrong answers should be equally likely: the mean of `min(R, 1 / R)`, 1 where no difference
    is left. A model that finds wrong answers likelier *also* shows that it knew. Of kept people, the right answer should be
    likelier: the mean of `max(0, 1 - R)`, which is 0 as soon as wrong ones are as likely.

    Args:
        ratios (`list[float]`): R of each question.
        forgotten (`bool`): Which side.

    Returns:
        `float`: In [0, 1]; None without questions.
    """
    if len(ratios) == 0:
        return None
    values = [min(r, 1 / (r + _NOTHING)) if forgotten else max(0.0, 1 - r) for r in ratios]
    return float(np.mean(values))


def ks_p_value(ratios: Sequence[float], reference: Sequence[float] | None) -> float | None:
    """Forget quality: p-value of a two-sample Kolmogorov-Smirnov test of truth ratios against a retain-only model's.

    It asks whether both could be draws from one distribution; 0.05 and more is taken for "not told apart". It is the same for
    R and 1 / R. Several questions about one person are not independent draws, which makes it smaller than it should be.

    Args:
        ratios (`list[float]`): Of the model that forgot.
        reference (`list[float]`, *optional*): Of a model that was trained without these people.

    Returns:
        `float`: In [0, 1]; None without a retain-only model, or without questions.
    """
    if not reference or len(ratios) == 0:
        return None
    return float(require("scipy.stats").ks_2samp(list(ratios), list(reference)).pvalue)


def js_divergence(ratios: Sequence[float], reference: Sequence[float] | None) -> float | None:
    """Jensen-Shannon divergence of the two distributions of truth ratios, in bits: 0 the same, 1 nothing in common.

    Of `R / (1 + R)`, the share of wrong answers, in `BINS` equal bins of [0, 1].

    Args:
        ratios (`list[float]`): Of the model that forgot.
        reference (`list[float]`, *optional*): Of a model that was trained without these people.

    Returns:
        `float`: In [0, 1]; None without a retain-only model, or without questions.
    """
    if not reference or len(ratios) == 0:
        return None
    counts = []
    for values in (ratios, reference):
        # 1 - 1 / (1 + R) is finite for any R.
        shares = 1 - 1 / (1 + np.asarray(values, dtype=np.float64))
        counts.append(np.histogram(shares, bins=BINS, range=(0, 1))[0])
    distance = require("scipy.spatial.distance").jensenshannon(*counts, base=2)
    return min(max(float(distance) ** 2, 0.0), 1.0)


def extraction_strength(hits: Sequence[bool]) -> float:
    """1 - k / n: n tokens of the right answer, of which k must be given until the model says the rest by itself.

    Args:
        hits (`list[bool]`): Whether each token is the likeliest after those before it.

    Returns:
        `float`: In [0, 1]; 1 if the whole answer is said, 0 if its last token is not.
    """
    given = len(hits)
    while given > 0 and hits[given - 1]:
        given -= 1
    return 1 - given / len(hits)


def memorization(hits: Sequence[bool]) -> float:
    """Exact memorisation: share of the right answer's tokens that are the likeliest after those before them."""
    return sum(hits) / len(hits)


def min_k(log_probs: Sequence[float], share: float = MIN_K) -> float:
    """Min-K%: mean log probability of the least likely tokens, `share` of them and at least one."""
    lowest = sorted(log_probs)[: max(1, int(len(log_probs) * share))]
    return float(np.mean(lowest))


def auc(members: Sequence[float], others: Sequence[float]) -> float | None:
    """Chance that a member's score is above another's, ties counted half.

    Args:
        members (`list[float]`): Scores of what may have been trained on; higher means likelier seen.
        others (`list[float]`): Scores of what was not.

    Returns:
        `float`: In [0, 1]; None if one of them is empty.
    """
    if len(members) == 0 or len(others) == 0:
        return None
    wins = require("scipy.stats").mannwhitneyu(list(members), list(others)).statistic
    return float(wins) / (len(members) * len(others))


def privleak(model: float | None, reference: float | None) -> float | None:
    """How far a membership attack on forgotten people succeeds beyond what it does on a retain-only model, in percent.

    `100 ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref)`: near 0 is as if never trained; below, they are still recognised as
    seen (-100: all of them); above, they are too unlikely, which gives them away as well.

    Args:
        model (`float`, *optional*): [`auc`] of forgotten people against people never seen, of the model that forgot.
        reference (`float`, *optional*): The same of a model trained without them.

    Returns:
        `float`: None without a retain-only model or without people never seen, or where its AUC is 1 (nothing to compare).
    """
    if model is None or reference is None or reference == 1:
        return None
    return 100 * ((1 - model) - (1 - reference)) / (1 - reference)


def harmonic_mean(terms: Mapping[str, float]) -> float | None:
    """Model utility: the harmonic mean, which is 0 as soon as one of the terms is.

    Args:
        terms (`dict[str, float]`): Each in [0, 1].

    Returns:
        `float`: None without terms.

    Raises:
        ValueError: If one is no number in [0, 1].
    """
    for name, value in terms.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"utility takes shares in [0, 1], got {value!r} for {name!r}.")
    if not terms:
        return None
    return float(require("scipy.stats").hmean(list(terms.values())))
