"""Bounds on shares and means: against the definition by enumeration, against published values, and by simulation."""

import math
import random
import statistics
from fractions import Fraction

import pytest

from space_peft.statistics.intervals import (
    MOST_TRIALS,
    bernstein_bound,
    binomial_cdf,
    exact_interval,
    exact_upper_bound,
    share_interval,
)


def enumerated(hits: int, n: int, share: Fraction) -> Fraction:
    """The definition, in rational numbers."""
    return sum((math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(hits + 1)), Fraction(0))


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_the_distribution_is_that_of_its_definition(n):
    for hits in range(-1, n + 1):
        for share in (Fraction(0), Fraction(1, 1000), Fraction(1, 3), Fraction(9, 10), Fraction(1)):
            wanted = float(enumerated(hits, n, share))
            assert math.isclose(binomial_cdf(hits, n, float(share)), wanted, rel_tol=1e-11, abs_tol=1e-300)


def test_a_small_tail_is_accurate_relative_to_its_size():
    wanted = float(enumerated(3, 200, Fraction(1, 2)))
    assert wanted < 1e-50 and math.isclose(binomial_cdf(3, 200, 0.5), wanted, rel_tol=1e-10)


def test_the_bound_is_where_the_tail_is_as_large_as_allowed():
    for n in (1, 5, 19, 300):
        for hits in {0, n // 3, n - 1}:
            bound = exact_upper_bound(hits, n, 0.9)
            assert float(enumerated(hits, n, Fraction(bound))) == pytest.approx(0.1, rel=1e-6)
    assert exact_upper_bound(4, 4) == 1.0


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # 1 - (alpha / 2)^(1 / n) and its like in closed form; 81 of 263 as in Newcombe (Statistics in Medicine 17, 1998, table I).
    [(0, 10, 0.0, 1 - 0.025**0.1), (10, 10, 0.025**0.1, 1.0), (81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617),
     (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)],
)  # fmt: skip
def test_published_intervals(hits, n, low, high):
    assert exact_interval(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert share_interval(hits / n, n) == exact_interval(hits, n)


def test_the_rule_of_three():
    assert exact_upper_bound(0, 1000) == pytest.approx(1 - 0.05 ** (1 / 1000), abs=1e-11)


@pytest.mark.parametrize("n", [3, 12, 40])
def test_coverage_is_at_least_as_promised_for_every_share(n):
    # Exactly, by enumeration of all outcomes: no share is covered less often than 95 %.
    intervals, uppers = [exact_interval(k, n) for k in range(n + 1)], [exact_upper_bound(k, n) for k in range(n + 1)]
    for share in (i / 97 for i in range(98)):
        chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
        assert sum(p for p, (low, high) in zip(chances, intervals) if low <= share <= high) >= 0.95 - 1e-12
        assert sum(p for p, upper in zip(chances, uppers) if share <= upper) >= 0.95 - 1e-12


def test_counts_of_any_size_take_no_time():
    low, high = exact_interval(MOST_TRIALS // 2, MOST_TRIALS)
    assert 0.4996 < low < 0.5 < high < 0.5004
    assert exact_interval(0, MOST_TRIALS)[1] == pytest.approx(-math.log(0.025) / MOST_TRIALS, rel=1e-4)


@pytest.mark.parametrize(("hits", "n"), [(1, 0), (0, 0), (-1, 3), (4, 3), (0.5, 3), (True, 3), (0, MOST_TRIALS + 1)])
def test_what_is_no_count_is_refused(hits, n):
    with pytest.raises(ValueError, match="hits"):
        exact_upper_bound(hits, n)


def bernstein_of(values, low, high, confidence=0.95):
    return bernstein_bound(statistics.fmean(values), statistics.variance(values), len(values), low, high, confidence)


def test_bernstein_is_the_published_formula():
    # By hand: as many zeros as ones have the mean 1/2 and the sample variance n / (n - 1) / 4; delta = 0.5 gives ln 4.
    values, variance, log = [0.0] * 200 + [1.0] * 200, 400 / 399 / 4, math.log(4)
    wanted = 0.5 + math.sqrt(2 * variance * log / 400) + 7 * log / (3 * 399)
    assert bernstein_of(values, 0, 1, 0.5) == pytest.approx(wanted, rel=1e-12)
    shifted = [10 * value - 4 for value in values]
    assert bernstein_of(shifted, -4, 6, 0.5) == pytest.approx(10 * wanted - 4, rel=1e-12)


def test_bernstein_needs_values_in_its_range():
    assert bernstein_bound(0.5, 0.0, 1, 0, 1) is None and bernstein_of([0.0, 0.0], 0, 1) == 1.0
    for odd in ((1.1, 0.0), (-0.1, 0.0), (math.nan, 0.0), (0.5, math.nan), (0.5, -1.0)):
        with pytest.raises(ValueError, match="have no mean"):
            bernstein_bound(*odd, 10, 0, 1)
    with pytest.raises(ValueError, match="low < high"):
        bernstein_bound(1.0, 0.0, 10, 1, 1)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_bernstein_holds_as_often_as_promised(share):
    draw = random.Random(0)

    def sample(n):
        return [float(draw.random() < share) * draw.random() for _ in range(n)]

    held = [share / 2 <= bernstein_of(sample(60), 0, 1, 0.8) for _ in range(400)]
    assert sum(held) >= 0.8 * 400
    # It says something: nowhere near the trivial bound for many values.
    assert bernstein_of(sample(5000), 0, 1) < share / 2 + 0.05
