"""What a share or a mean of a few values says of the rest: exact and distribution-free bounds, without a normal curve.

Every bound here assumes *independent* draws from one distribution (sampled images, each asked one thing). Several
questions about one image are not independent: their share is that of fewer draws than rows, and its true interval wider.
"""

from __future__ import annotations

import math


CONFIDENCE = 0.95
# Sums below take about the square root of this many steps; a count above it is not one of answers.
MOST_TRIALS = 10**7


def binomial_cdf(hits: int, n: int, share: float) -> float:
    """`P(X <= hits)` for `X ~ Binomial(n, share)`.

    Args:
        hits (`int`): At least -1.
        n (`int`): Number of trials.
        share (`float`): Of hits, in [0, 1].

    Returns:
        `float`: The probability; the smaller tail is summed, so that it is accurate relative to its size.
    """
    if hits < 0:
        return 0.0
    if hits >= n or share <= 0:
        return 1.0
    if share >= 1:
        return 0.0
    if hits > n * share:
        return 1.0 - binomial_cdf(n - hits - 1, n, 1 - share)
    # From the largest term, which is the last one, downwards.
    term = math.lgamma(n + 1) - math.lgamma(hits + 1) - math.lgamma(n - hits + 1)
    term = math.exp(term + hits * math.log(share) + (n - hits) * math.log1p(-share))
    total, k = 0.0, hits
    while k >= 0 and term > total * 1e-18:
        total += term
        term *= k * (1 - share) / ((n - k + 1) * share)
        k -= 1
    return min(total, 1.0)


def exact_upper_bound(hits: int, n: int, confidence: float = CONFIDENCE) -> float:
    """Clopper and Pearson's one-sided upper bound on a share: the largest `p` with `P(X <= hits; n, p) >= 1 - confidence`.

    The true share is below it with at least that confidence, whatever it is and however few trials there are
    (C. J. Clopper and E. S. Pearson, Biometrika 26, 1934).

    Args:
        hits (`int`): Trials that count, of `n` independent ones.
        n (`int`): Number of trials, at least 1.
        confidence (`float`, defaults to 0.95): In (0, 1).

    Returns:
        `float`: In [0, 1]; rounded up rather than down.

    Raises:
        ValueError: If the counts are no counts.
    """
    _check_counts(hits, n, confidence)
    if hits == n:
        return 1.0
    low, high = hits / n, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if binomial_cdf(hits, n, middle) >= 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def exact_interval(hits: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Clopper and Pearson's two-sided interval of a share; see [`exact_upper_bound`].

    Args:
        hits (`int`): Trials that count, of `n` independent ones.
        n (`int`): Number of trials, at least 1.
        confidence (`float`, defaults to 0.95): Half of what is left lies on either side.

    Returns:
        `tuple[float, float]`: Lower and upper end, in [0, 1].

    Raises:
        ValueError: If the counts are no counts.
    """
    side = (1 + confidence) / 2
    return max(0.0, 1 - exact_upper_bound(n - hits, n, side)), exact_upper_bound(hits, n, side)


def share_interval(share: float, n: int) -> tuple[float, float]:
    """[`exact_interval`] of a share that is given as such: of `round(share * n)` hits."""
    return exact_interval(min(max(round(share * n), 0), n), n)


def interval_text(share: float, n: int) -> str:
    """The exact 95 % interval of a share in words, rounded outwards: `"0.00 to 0.11"`."""
    low, high = share_interval(share, n)
    return f"{math.floor(low * 100) / 100:.2f} to {math.ceil(high * 100) / 100:.2f}"


def bernstein_bound(
    mean: float, variance: float, n: int, low: float, high: float, confidence: float = CONFIDENCE
) -> float | None:
    """An upper bound on what values in a known range are the mean of, from their own variance.

    Theorem 4 of A. Maurer and M. Pontil, "Empirical Bernstein Bounds and Sample Variance Penalization" (COLT 2009): for
    independent values in [0, 1] with sample variance `V` (divided by `n - 1`), with probability at least `1 - delta` their
    expected mean is at most `average + sqrt(2 V ln(2 / delta) / n) + 7 ln(2 / delta) / (3 (n - 1))`.

    Args:
        mean (`float`): Average of `n` independent values.
        variance (`float`): Their sample variance.
        n (`int`): How many there are.
        low (`float`): Smallest value there can be.
        high (`float`): Largest value there can be.
        confidence (`float`, defaults to 0.95): `1 - delta`.

    Returns:
        `float`: At most `high`; `None` for fewer than two values, which say nothing of their variance.

    Raises:
        ValueError: If the range is empty, or values in it cannot have that mean (NaN included).
    """
    if not low < high or not 0 < confidence < 1:
        raise ValueError(f"expected low < high and a confidence in (0, 1), got {low}, {high} and {confidence}.")
    if not low <= mean <= high or not variance >= 0:
        raise ValueError(f"values in [{low}, {high}] have no mean {mean!r} with a variance {variance!r}.")
    if n < 2:
        return None
    width, log = high - low, math.log(2 / (1 - confidence))
    bound = mean + math.sqrt(2 * variance * log / n) + width * 7 * log / (3 * (n - 1))
    return min(bound, high)


def _check_counts(hits: int, n: int, confidence: float) -> None:
    if any(isinstance(count, bool) or not isinstance(count, int) for count in (hits, n)):
        raise ValueError(f"expected whole numbers of hits and trials, got {hits!r} and {n!r}.")
    if not 0 <= hits <= n or not 1 <= n <= MOST_TRIALS:
        raise ValueError(f"expected 0 <= hits <= n and n from 1 to {MOST_TRIALS:,}, got {hits} hits of {n}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
