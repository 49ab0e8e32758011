"""The constraints: which filter each makes of a spectrum, and whether a stored one is such a filter.

What a projection can do (`NullSpace.acts`, `.idempotent`, `.invertible`) follows from its filter, not from its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .space import NullSpace
from .spectral import Spectrum, decompose


# A soft filter within this distance of the value used outside the kept eigenvectors is not worth an eigenvector.
_FLAT = 1e-3
# Eigenpairs computed where no constraint uses them: their largest value goes into the certificate's bound.
_UNCONSTRAINED = 8
# Eigenpairs are found until the filter's error is below `decompose`'s tolerance, in units of this value or of the one that all
# directions outside get, the smaller: a small strength makes all of the filter small.
_FILTER_UNIT = 0.03
# Filters are stored in float32.
_STORED = 2.0**-20


class Filter(NamedTuple):
    """
    What a constraint makes of a second moment.

    Args:
        spectrum ([`Spectrum`]): The eigenpairs that were computed.
        start, stop (`int`): Those that get a filter value of their own.
        filters (`torch.Tensor`): These values, `(stop - start,)`.
        outside (`float`): The value of every other direction.
    """

    spectrum: Spectrum
    start: int
    stop: int
    filters: torch.Tensor
    outside: float


@dataclass(frozen=True)
class Constraint:
    """
    One way to keep an adapter off retained inputs.

    Args:
        fit (`Callable`): `(moment, limit, strength, energy, uncertainty) -> Filter`, of a second moment `(d, d)` of mean
            eigenvalue 1 and with at most `limit` eigenvectors. The inputs' own second moment may exceed it in any direction
            by the uncertainty.
        pairs (`Callable`): `(limit, dim) -> int or None`: how many eigenpairs it asks for; `None` for all of them.
        columns (`Callable`): `(limit, dim) -> int`: how many eigenvectors it keeps at most, whatever the inputs are.
        made (`Callable`): Whether a stored null space has such a filter; asked of files that anybody may have written,
            whose tensors have the right shapes and are finite.
        dtype (`torch.dtype`): Of the sums that it needs.
        foreseen (`bool`, defaults to `True`): Whether a plan may say of `columns` that it acts on as many directions; else it
            is the inputs that decide how many it removes.
        formula (`Callable`, *optional*): The filter as a figure's legend says it, of a null space.
        worst_case (`Callable`, *optional*): `||P C^(1/2)||_2` of a null space at most, whatever the spectrum of its mean.
    """

    fit: Callable[[torch.Tensor, int, float, float, float], Filter]
    pairs: Callable[[int, int], int | None]
    columns: Callable[[int, int], int]
    made: Callable[[NullSpace], bool]
    dtype: torch.dtype
    foreseen: bool = True
    formula: Callable[[NullSpace], str] | None = None
    worst_case: Callable[[NullSpace], float] | None = None


def computed_pairs(constraint: str, limit: int | None, dim: int) -> int | None:
    """How many eigenpairs a constraint asks for; `None` for all of them."""
    return FITTED[constraint].pairs(min(limit or dim, dim), dim)


def most_columns(constraint: str, limit: int | None, dim: int) -> int:
    """How many eigenvectors a null space keeps at most, whatever the inputs are.

    Args:
        constraint (`str`): A key of `FITTED`.
        limit (`int`, *optional*): See `SpaceLoraConfig.rank_limit`.
        dim (`int`): Length of an input.
    """
    return FITTED[constraint].columns(min(limit or dim, dim), dim)


def soft_sensitivity(values: torch.Tensor, strength: float) -> torch.Tensor:
    """`|f'(l)|` of the soft filter, larger where the filter itself is small; see [`decompose`].

    Args:
        values (`torch.Tensor`): Eigenvalues, descending; the filter value of the last one is that of all others.
        strength (`float`): `t`.
    """
    outside = strength / (values[-1] + strength)
    return strength / (values + strength) ** 2 * (_FILTER_UNIT / outside).clamp(min=1.0)


def _soft(moment: torch.Tensor, limit: int, strength: float, energy: float, uncertainty: float) -> Filter:
    # One more than is used: it says what the filter does to all directions beyond.
    spectrum = decompose(moment, min(limit, len(moment)) + 1, lambda values: soft_sensitivity(values, strength))
    filters = strength / (spectrum.values + strength)  # (n,), ascending
    stop = min(int((filters < 1.0 - _FLAT).sum()), limit)
    # The filter value of the largest eigenvalue outside is the smallest one outside: with it nothing outside is let through more
    # than its own filter would, whatever the eigenvectors left out.
    outside = 1.0
    if stop < len(filters):
        # Statistics have one value, the mean, for all that they left out: the smallest eigenvalue here. The largest of what was
        # left out is larger by the uncertainty.
        largest = max(float(spectrum.values[stop]), float(spectrum.values[-1]) + uncertainty)
        outside = strength / (largest + strength)
    return Filter(spectrum, 0, stop, filters[:stop], outside)


def _hard(moment: torch.Tensor, limit: int, strength: float, energy: float, uncertainty: float) -> Filter:
    spectrum = decompose(moment)
    values, dim = spectrum.values, len(moment)
    # Eigenvalues below rounding are those of directions that no input has.
    seen = int((values > values[0] * dim * torch.finfo(values.dtype).eps).sum())
    enough = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    stop = min(enough, seen, limit)
    if stop <= dim - stop:
        return Filter(spectrum, 0, stop, values.new_zeros(stop), 1.0)
    # The complement is the smaller side: keep what is left over instead of what is removed.
    return Filter(spectrum, stop, dim, values.new_ones(dim - stop), 0.0)


def _none(moment: torch.Tensor, limit: int, strength: float, energy: float, uncertainty: float) -> Filter:
    spectrum = decompose(moment, _UNCONSTRAINED)
    return Filter(spectrum, 0, 0, spectrum.values.new_zeros(0), 1.0)


def _is_soft(space: NullSpace) -> bool:
    own = space.eigenvalues[: len(space.filters)]
    differs = (space.filters.double() - space.strength / (own + space.strength)).abs()
    return not space.start and 0 < space.outside <= 1 and bool((differs <= _STORED).all())


def _is_hard(space: NullSpace) -> bool:
    removed = (space.start, space.outside) == (0, 1.0) and not space.filters.any()
    return bool(removed or space.outside == 0.0 and (space.filters == 1).all())


def _is_none(space: NullSpace) -> bool:
    return not len(space.filters) and space.outside == 1.0


FITTED = {
    "soft": Constraint(
        _soft,
        pairs=lambda limit, dim: limit + 1,
        columns=lambda limit, dim: limit,
        made=_is_soft,
        dtype=torch.float32,
        formula=lambda space: f"t / (λ + t), t = {space.strength:g}",
        worst_case=lambda space: math.sqrt(space.scale * space.strength) / 2,  # sqrt(l) t / (l + t) <= sqrt(t) / 2
    ),
    "hard": Constraint(
        _hard,
        pairs=lambda limit, dim: None,
        columns=lambda limit, dim: min(limit, dim // 2),  # The smaller side is kept.
        made=_is_hard,
        dtype=torch.float64,  # A direction that no input has must come out as zero, see `NullSpaceFitter`.
        foreseen=False,
    ),
    "none": Constraint(
        _none,
        pairs=lambda limit, dim: _UNCONSTRAINED,
        columns=lambda limit, dim: 0,
        made=_is_none,
        dtype=torch.float32,
    ),
}
"""By the value of `SpaceLoraConfig.constraint`; what a configuration has to know of each is in `choices.CONSTRAINTS`."""
