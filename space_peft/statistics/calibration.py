"""How strong an adapter may be for a risk that its user names: Learn-then-Test over its scale.

A. N. Angelopoulos, S. Bates, E. J. Candès, M. I. Jordan, L. Lei, "Learn then Test: Calibrating Predictive Algorithms to
Achieve Risk Control" (arXiv 2110.01052): a setting is chosen by testing, for each candidate, the hypothesis that its risk
is above the one allowed. Here the candidates are scales, in ascending order, tested one after another until the first
hypothesis that cannot be rejected (fixed sequence testing, section 4.1 there, which needs no correction for their number).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from .intervals import MOST_TRIALS, binomial_cdf


SCALES = tuple(step / 10 for step in range(1, 11))
"""The scales that are tried, from the weakest."""
DELTA = 0.05
_MOST_SCALES = 1000


@dataclass(frozen=True)
class Calibration:
    """
    The scale that was chosen for an adapter, and what that guarantees.

    With probability `1 - delta` over the items drawn, at most a share `risk` of the answers to items like these change,
    if they are exchangeable with these and independent: one question about each image or text.

    Args:
        risk (`float`): Largest share of answers that may change, in (0, 1).
        delta (`float`): Probability that it is exceeded nevertheless.
        scale (`float`): The factor that the trained `lora_B` was multiplied by; it is in the weights.
        images (`int`): Distinct images asked about.
        texts (`int`): Distinct prompts without an image asked.
        scales (`tuple[float, ...]`): The scales tested, in ascending order, up to the first that failed, if one did.
        changed (`tuple[int, ...]`): Answers that each of them changed.
        left_out (`int`, defaults to 0): Images not counted, see [`EndToEnd`].
    """

    risk: float
    delta: float
    scale: float
    images: int
    texts: int
    scales: tuple[float, ...]
    changed: tuple[int, ...]
    left_out: int = 0

    def __post_init__(self) -> None:
        check_risk(self.risk, self.delta)
        object.__setattr__(self, "scales", tuple(self.scales))  # From JSON they are lists.
        object.__setattr__(self, "changed", tuple(self.changed))
        counts = (self.images, self.texts, self.left_out, *self.changed)
        if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
            raise ValueError(f"a calibration counts answers, got {counts}.")
        if not 1 <= self.n <= MOST_TRIALS or len(self.changed) != len(self.scales) or max(self.changed) > self.n:
            raise ValueError(
                f"a calibration on {self.n} answers has {self.changed} changed at the scales {self.scales}."
            )
        check_scales(self.scales)
        if self.scale != (chosen := choose(self.scales, self.changed, self.n, self.risk, self.delta)):
            raise ValueError(
                f"the scale {self.scale!r} does not follow from the answers changed ({self.changed} of {self.n} at the "
                f"scales {self.scales}): that is {chosen!r} for a risk of {self.risk} and delta {self.delta}."
            )

    @property
    def n(self) -> int:
        """Number of answers."""
        return self.images + self.texts

    @property
    def p_value(self) -> float:
        """Of the hypothesis that the chosen scale changes more answers than allowed."""
        return p_value(self.changed[self.scales.index(self.scale)], self.n, self.risk)

    def to_dict(self) -> dict:
        """Plain values."""
        return {**asdict(self), "scales": list(self.scales), "changed": list(self.changed)}


def p_value(changed: int, n: int, risk: float) -> float:
    """`P(Binomial(n, risk) <= changed)`: how likely so few are where the share that changes is `risk` or more."""
    return binomial_cdf(changed, n, risk)


def items_needed(risk: float, delta: float = DELTA) -> int:
    """How many independent items it takes, none of them changed, to show a risk: the smallest n with `(1 - risk)^n <= delta`."""
    n = max(1, math.ceil(math.log(delta) / math.log1p(-risk)) - 1)
    while p_value(0, n, risk) > delta:
        n += 1
    return n


def choose(scales: Sequence[float], changed: Sequence[int], n: int, risk: float, delta: float) -> float | None:
    """Fixed sequence testing: the last scale before the first whose hypothesis stands; `None` if that is the first."""
    chosen = None
    for scale, count in zip(scales, changed):
        if p_value(count, n, risk) > delta:
            break
        chosen = scale
    return chosen


def try_scales(
    count_changed: Callable[[float], int], scales: Sequence[float], n: int, risk: float, delta: float = DELTA
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Tests scales in order, and stops at the first that fails: what comes behind it must not be looked at.

    Args:
        count_changed (`Callable`): Returns how many of the `n` answers a scale changes.
        scales (`list[float]`): In ascending order.
        n (`int`): Number of items.
        risk (`float`): Largest share that may change.
        delta (`float`, defaults to 0.05): Probability of being wrong that is allowed.

    Returns:
        `tuple[tuple[float, ...], tuple[int, ...]]`: The scales tested, and the answers that each one changed.
    """
    counts: list[int] = []
    for scale in scales:
        counts.append(count_changed(scale))
        if p_value(counts[-1], n, risk) > delta:
            break
    return tuple(scales[: len(counts)]), tuple(counts)


def check_risk(risk: float, delta: float) -> None:
    """Raises `ValueError` if one of them is no probability that can be shown."""
    for name, value in (("risk", risk), ("delta", delta)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ValueError(f"`{name}` must be in (0, 1), got {value!r}.")


def check_scales(scales: Sequence[float]) -> None:
    """Raises `ValueError` unless they are positive numbers in ascending order."""
    numbers = all(
        isinstance(s, (int, float)) and not isinstance(s, bool) and math.isfinite(s) and s > 0 for s in scales
    )
    if not 1 <= len(scales) <= _MOST_SCALES or not numbers or any(b <= a for a, b in zip(scales, scales[1:])):
        raise ValueError(
            f"`scales` must be 1 to {_MOST_SCALES} positive numbers in ascending order, got {scales!r:.200}: they are tested from the weakest, and "
            "a strong one first would leave nothing to choose once it fails."
        )
