"""Where retained knowledge lives in a layer's inputs: `NullSpaceFitter` observes them and yields a `NullSpace`.

Mathematics only, plain torch. `C = E[h h^T]` is the uncentred second moment of the inputs `h` on retained data, with
eigenpairs `(m l_i, u_i)` where `m` is the mean eigenvalue, so that the `l_i` have mean 1 (docs/method.md, section 4).
"""

from __future__ import annotations

import torch

from ..choices import INPUT_KINDS, ConstraintName, InputKind
from .constraints import FITTED
from .precision import exact_products
from .space import NullSpace, load_null_spaces, save_null_spaces
from .spectral import Spectrum


__all__ = ["NullSpace", "NullSpaceFitter", "load_null_spaces", "save_null_spaces"]

# Columns of a second moment that are computed at a time; only those on and above the diagonal are.
_PANEL = 256


def sum_flops(samples: int, dim: int) -> int:
    """What adding samples of length `dim` to a sum costs."""
    return sum(2 * samples * min(_PANEL, dim - start) * (dim - start) for start in range(0, dim, _PANEL))


class NullSpaceFitter:
    """
    Streaming estimate of the second moment `C` of a layer's inputs; `fit` turns it into a [`NullSpace`].

    Sums are kept per group: `C` is the mean over the groups of each group's own mean, so that many image tokens do not
    drown few text tokens. Only the upper triangle of a sum is computed.

    Args:
        dim (`int`): Length `d` of an input.
        statistics (`str`, defaults to `"token"`): `"token"`: every unmasked token is a sample; `"pooled"`: the mean
            over the unmasked tokens of a row is.
        name (`str`, *optional*): What is observed, for error messages.
        dtype (`torch.dtype`, defaults to `torch.float64`): Of the sums. A hard constraint needs float64: a direction
            that no retained input has must come out as zero, and what float32 leaves there instead (1e-7 of the
            largest eigenvalue) would show as 3e-4 in the inputs. A soft one cannot tell: float32 is faster and half the
            size.
    """

    def __init__(
        self,
        dim: int,
        *,
        statistics: InputKind = "token",
        name: str | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"`dim` is {dim!r}; expected an integer of at least 1.")
        if statistics not in INPUT_KINDS:
            raise ValueError(f"`statistics` is {statistics!r}; expected one of {', '.join(map(repr, INPUT_KINDS))}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`dtype` is {dtype}; expected torch.float32 or torch.float64.")
        self.dim = dim
        self.dtype = dtype
        self.statistics = statistics
        self.name = name
        self._sums: dict[str, torch.Tensor] = {}  # group -> sum of h h^T, (d, d), upper triangle
        self._counts: dict[str, int] = {}
        self._uncertainty: dict[str, float] = {}  # group -> by how much its moment may be too small in any direction

    @property
    def _where(self) -> str:
        return f" of {self.name!r}" if self.name else ""

    @property
    def counts(self) -> dict[str, int]:
        """Samples seen, per group."""
        return dict(sorted(self._counts.items()))

    @torch.no_grad()
    def update(self, h: torch.Tensor, mask: torch.Tensor | None = None, group: str = "token") -> NullSpaceFitter:
        """Adds a batch of inputs.

        Args:
            h (`torch.Tensor`): `(..., d)`; for pooled statistics the first dimension counts the rows.
            mask (`torch.Tensor`, *optional*): `(...)`, true where an input counts (padding does not).
            group (`str`, defaults to `"token"`): Kind of input; kinds weigh the same however many samples they have.

        Raises:
            ValueError: If shapes do not fit, or an input that counts is NaN or infinite.
        """
        if h.ndim < 2 or h.shape[-1] != self.dim:
            raise ValueError(f"inputs{self._where} have shape {tuple(h.shape)}; expected (..., {self.dim}).")
        if mask is None:
            mask = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device)
        if mask.shape != h.shape[:-1]:
            raise ValueError(
                f"the mask{self._where} has shape {tuple(mask.shape)}; expected that of the inputs without the last "
                f"dimension, {tuple(h.shape[:-1])}."
            )
        mask = mask.to(h.device, torch.bool)
        rows = h[mask]  # (n, d)
        bad = int((~torch.isfinite(rows).all(dim=-1)).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(rows)} retained inputs{self._where} contain NaN or infinity; the statistics would be "
                "meaningless. Check the retained data, or load the model in bfloat16 or float32 instead of float16."
            )
        rows = rows.to(self.dtype)
        if self.statistics == "pooled" and h.ndim > 2:
            flat = mask.reshape(len(h), -1)  # (b, tokens)
            row_of = torch.arange(len(h), device=h.device)[:, None].expand_as(flat)[flat]  # (n,)
            sizes = flat.sum(dim=1)
            means = rows.new_zeros(len(h), self.dim).index_add_(0, row_of, rows)
            rows = means[sizes > 0] / sizes[sizes > 0, None]
        if len(rows) == 0:
            return self
        if group not in self._sums:
            self._sums[group] = rows.new_zeros(self.dim, self.dim)
            self._counts[group] = 0
        total = self._sums[group] = self._sums[group].to(rows.device)  # a loaded state comes on the CPU
        # A mean has more digits than what it is of.
        half = h.dtype in (torch.bfloat16, torch.float16) and self.statistics == "token"
        with exact_products({rows.device.type}, half=half):
            for start in range(0, self.dim, _PANEL):
                panel = rows[:, start : start + _PANEL]
                total[start : start + _PANEL, start:].addmm_(panel.T, rows[:, start:])
        self._counts[group] += len(rows)
        return self

    def merge(self, other: NullSpaceFitter) -> NullSpaceFitter:
        """Adds what another fitter of the same layer has seen, e.g. in another process, to this one.

        Raises:
            ValueError: If dimension or statistics differ.
        """
        if (self.dim, self.statistics) != (other.dim, other.statistics):
            raise ValueError(
                f"cannot merge a fitter of dimension {other.dim} and {other.statistics!r} statistics into one of "
                f"dimension {self.dim} and {self.statistics!r} statistics."
            )
        for group, total in other._sums.items():
            unknown = [one._uncertainty.get(group, 0.0) * one._counts.get(group, 0) for one in (self, other)]
            if group in self._sums:
                self._sums[group] += total.to(self._sums[group])
            else:
                self._sums[group] = total.to(self.dtype, copy=True)
            self._counts[group] = self._counts.get(group, 0) + other._counts[group]
            self._uncertainty[group] = sum(unknown) / self._counts[group]
        return self

    def add_moment(self, moment: torch.Tensor, group: str, *, uncertainty: float = 0.0) -> NullSpaceFitter:
        """Adds inputs of which nothing but their second moment is known, as a group of its own.

        Args:
            moment (`torch.Tensor`): `(d, d)`, E[h h^T] over those inputs, see [`NullSpace.second_moment`].
            group (`str`): Its name, e.g. "request 1".
            uncertainty (`float`, defaults to 0.0): The inputs' own second moment exceeds `moment` in no direction by more.

        Raises:
            ValueError: If the shape does not fit, or the group has been seen before.
        """
        if moment.shape != (self.dim, self.dim):
            raise ValueError(
                f"the second moment{self._where} has shape {tuple(moment.shape)}; expected ({self.dim}, {self.dim})."
            )
        if group in self._sums:
            raise ValueError(f"inputs of the group {group!r} were added before.")
        device = next((total.device for total in self._sums.values()), moment.device)
        self._sums[group] = moment.to(device, self.dtype, copy=True)
        self._counts[group] = 1
        self._uncertainty[group] = uncertainty
        return self

    def __add__(self, other: NullSpaceFitter) -> NullSpaceFitter:
        return self._empty().merge(self).merge(other)

    def _empty(self) -> NullSpaceFitter:
        return NullSpaceFitter(self.dim, statistics=self.statistics, name=self.name, dtype=self.dtype)

    def all_reduce(
        self, groups: tuple[str, ...] = ("image", "text"), device: torch.device | None = None
    ) -> NullSpaceFitter:
        """Adds up this fitter over all processes of the initialised `torch.distributed` group, in place.

        Args:
            groups (`tuple[str, ...]`): Every group that any process may have seen, so that all of them send the same.
            device (`torch.device`, *optional*): Where a process that has seen nothing takes part. Defaults to the CPU.
        """
        device = next((total.device for total in self._sums.values()), device or torch.device("cpu"))
        for group in sorted({*groups, *self._sums}):
            total = self._sums.get(group, torch.zeros(self.dim, self.dim, dtype=self.dtype, device=device))
            count = torch.tensor(self._counts.get(group, 0), dtype=torch.int64, device=device)
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(count)
            if count > 0:
                self._sums[group], self._counts[group] = total, int(count)
        return self

    def state_dict(self) -> dict:
        """Everything seen, as tensors and plain values; `load_state_dict` of another fitter takes it."""
        return {
            "dim": self.dim,
            "statistics": self.statistics,
            "counts": dict(self._counts),
            "sums": {group: total.clone() for group, total in self._sums.items()},
            "uncertainty": dict(self._uncertainty),
        }

    def load_state_dict(self, state: dict) -> None:
        """Replaces everything seen by a saved state.

        Raises:
            ValueError: If the state is that of a fitter with another dimension or other statistics.
        """
        if (state["dim"], state["statistics"]) != (self.dim, self.statistics):
            raise ValueError(
                f"the state is of dimension {state['dim']} and {state['statistics']!r} statistics; expected dimension "
                f"{self.dim} and {self.statistics!r} statistics."
            )
        self._sums = {group: total.to(self.dtype, copy=True) for group, total in state["sums"].items()}
        self._counts = dict(state["counts"])
        self._uncertainty = dict(state.get("uncertainty", {}))

    def second_moment(self) -> torch.Tensor:
        """Returns `C` `(d, d)`, of the sums' dtype: the mean over groups of each group's mean of `h h^T`.

        Raises:
            ValueError: If nothing was seen.
        """
        if not self._sums:
            raise ValueError(f"no retained inputs{self._where} were seen; nothing to fit.")
        groups = sorted(self._sums)
        total = torch.zeros_like(self._sums[groups[0]])
        for group in groups:
            total.add_(self._sums[group].to(total), alpha=1 / (self._counts[group] * len(groups)))
        # In panels, because a mirrored copy of the whole would be a third matrix of this size.
        for start in range(0, self.dim, _PANEL):
            stop = start + _PANEL
            corner = total[start:stop, start:stop].triu()
            total[start:stop, start:stop] = corner + corner.triu(1).T
            total[stop:, start:stop] = total[start:stop, stop:].T
        return total

    def fit(
        self,
        constraint: ConstraintName = "soft",
        *,
        strength: float = 1.0,
        energy: float = 0.999,
        max_rank: int | None = None,
    ) -> NullSpace:
        """Returns the projection that a constraint makes of the inputs seen; see [`SpaceLoraConfig`] for the settings.

        Args:
            constraint (`str`, defaults to `"soft"`): `"soft"`, `"hard"` or `"none"`.
            strength (`float`, defaults to 1.0): `t` of the soft filter.
            energy (`float`, defaults to 0.999): Share of `trace(C)` that the hard constraint removes.
            max_rank (`int`, *optional*): Largest number of eigenvectors used; all by default. A small one is also
                faster: the others are not computed then.

        Raises:
            ValueError: If nothing was seen, all inputs were zero, or a setting is out of range.
        """
        if constraint not in FITTED:
            raise ValueError(f"`constraint` is {constraint!r}; expected one of {', '.join(map(repr, FITTED))}.")
        if not strength > 0:
            raise ValueError(f"`strength` is {strength}; expected a number > 0.")
        if not 0 < energy <= 1:
            raise ValueError(f"`energy` is {energy}; expected a share in (0, 1].")
        moment = self.second_moment()
        mean = float(moment.diagonal().mean(dtype=torch.float64))
        if mean == 0.0:
            raise ValueError(f"all retained inputs{self._where} are zero; nothing to fit.")
        moment /= mean
        limit = self.dim if max_rank is None else min(max_rank, self.dim)
        uncertainty = sum(self._uncertainty.values()) / (len(self._sums) * mean)
        spectrum, start, stop, kept, outside = FITTED[constraint].fit(moment, limit, strength, energy, uncertainty)
        known = len(spectrum.values) if len(spectrum.values) == self.dim else stop
        return NullSpace(
            eigenvectors=spectrum.vectors[:, start:stop].to(torch.float32).contiguous(),
            filters=kept.to(torch.float32),
            outside=outside,
            eigenvalues=spectrum.values[:known].cpu(),
            next_eigenvalue=_upper(spectrum, known),
            residuals=spectrum.residuals[start:stop].cpu(),
            scale=mean,
            start=start,
            constraint=constraint,
            strength=float(strength),
            energy=float(energy),
            max_rank=max_rank,
            statistics=self.statistics,
            counts=self.counts,
            uncertainty=uncertainty,
        )


def _upper(spectrum: Spectrum, index: int) -> float:
    """An eigenvalue, no less than it is by what its residual allows; 0 beyond the last one of a full decomposition."""
    if index >= len(spectrum.values):
        return 0.0
    return float(spectrum.values[index] + spectrum.residuals[index])
