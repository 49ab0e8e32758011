"""The projection onto the (near-)null space of a layer's retained inputs: applied, bounded, saved and loaded."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..records.io import atomic_path
from ..records.safe_json import parse_json
from .identity import FitIdentity


_FORMAT = "space_peft.null_spaces.v2"


@dataclass(frozen=True, eq=False)
class NullSpace:
    """
    The projection `P = c I + U diag(f - c) U^T` onto the (near-)null space of retained inputs; made by
    [`NullSpaceFitter.fit`]. Hard and soft constraint differ in `f` and `c` only.

    Args:
        eigenvectors (`torch.Tensor`): `U` `(d, k)`, float32: those of `C` whose filter value is not `c`.
        filters (`torch.Tensor`): `f` `(k,)`, float32.
        outside (`float`): `c`, the filter value of every direction outside of `U`.
        eigenvalues (`torch.Tensor`): The leading `l` `(n,)`, float64, descending; scaled so that all `d` have mean 1.
        next_eigenvalue (`float`): No eigenvalue after the `n`-th is larger; 0 if `n = d`.
        residuals (`torch.Tensor`): `||C u - l u||` `(k,)` of the columns `u` of `U`, float64; zeros if they are exact.
        scale (`float`): `m`, the mean eigenvalue of `C`: the mean square of an input's components.
        start (`int`): Column `j` of `U` belongs to eigenvalue `start + j`.
        constraint (`str`): The name of the constraint that made it: a key of `null_space.constraints.FITTED`.
        strength (`float`): `t` of the soft filter.
        energy (`float`): Share of the trace asked of the hard constraint.
        max_rank (`int`, *optional*): The cap that was asked for.
        statistics (`str`): `"token"` or `"pooled"`.
        counts (`dict[str, int]`): Samples seen, per group.
        uncertainty (`float`, defaults to 0.0): `C` exceeds what the eigenpairs are of in no direction by more (in units of
            `m`): it was put together from [`Statistics`], which keep its leading eigenpairs only. Bounds allow for it.
        identity ([`FitIdentity`], *optional*): The model and the data it was fitted on; [`fit_null_space`] says.
    """

    eigenvectors: torch.Tensor
    filters: torch.Tensor
    outside: float
    eigenvalues: torch.Tensor
    next_eigenvalue: float
    residuals: torch.Tensor
    scale: float
    start: int
    constraint: str
    strength: float
    energy: float
    max_rank: int | None
    statistics: str
    counts: dict[str, int]
    uncertainty: float = 0.0
    identity: FitIdentity | None = None

    @property
    def dim(self) -> int:
        """`d`, the length of an input."""
        return self.eigenvectors.shape[0]

    @property
    def rank(self) -> int:
        """Directions the constraint acts on: those removed (hard), or those with a filter value of their own (soft)."""
        columns = self.eigenvectors.shape[1]
        return self.dim - columns if self.outside == 0.0 else columns

    @property
    def acts(self) -> bool:
        """Whether `P` changes anything: it is not the identity."""
        return self.outside != 1.0 or bool((self.filters != 1).any())

    @property
    def idempotent(self) -> bool:
        """Whether `P P = P`: every direction is kept whole or removed."""
        return self.outside in (0.0, 1.0) and bool(((self.filters == 0) | (self.filters == 1)).all())

    @property
    def invertible(self) -> bool:
        """Whether `P` has an inverse: no direction is removed."""
        return self.outside != 0.0 and bool((self.filters != 0).all())

    @property
    def free_dimensions(self) -> float:
        """`trace(P)`: the directions left to learn in; `d - k` for the hard constraint."""
        return float(self.filters.sum(dtype=torch.float64)) + self.outside * (self.dim - len(self.filters))

    @property
    def kept(self) -> float:
        """Share of the retained inputs' energy kept from the adapter: `1 - trace(P C P) / trace(C)`."""
        return 1.0 - self._passed / self.dim

    @property
    def _passed(self) -> float:
        """`trace(P C P)` for a `C` of mean eigenvalue 1. Exact, for the values of `U` are Rayleigh quotients."""
        values = self._own_eigenvalues
        rest = max(self.dim - float(values.sum()), 0.0)
        return float((self.filters.cpu().double() ** 2 * values).sum()) + self.outside**2 * rest

    @property
    def _own_eigenvalues(self) -> torch.Tensor:
        """Those of the columns of `U`, `(k,)`."""
        return self.eigenvalues[self.start : self.start + len(self.filters)]

    @property
    def _largest_outside(self) -> float:
        """The largest eigenvalue of a direction outside of `U`."""
        stop = self.start + len(self.filters)
        rest = torch.cat([self.eigenvalues[: self.start], self.eigenvalues[stop:]])
        return max(float(rest.max()) if len(rest) else 0.0, self.next_eigenvalue)

    def spectrum_filters(self) -> torch.Tensor:
        """Returns the filter value of each of the `n` leading eigenvalues, `(n,)`, float64 (for plots)."""
        filters = torch.full_like(self.eigenvalues, self.outside)
        filters[self.start : self.start + len(self.filters)] = self.filters.to(filters)
        return filters

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x P` along the last dimension, computed in float32 or better; never forms a `(d, d)` matrix.

        Args:
            x (`torch.Tensor`): `(..., d)`.

        Raises:
            ValueError: If the last dimension is not `d`.
        """
        return self._apply(x, self.filters, self.outside)

    def unproject(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x P^-1` in float64: from the folded `A = A' P` back to `A'`; see [`invertible`].

        Args:
            x (`torch.Tensor`): `(..., d)`.

        Raises:
            ValueError: If `P` removes directions, so that it has no inverse.
        """
        if not self.invertible:
            raise ValueError(f"the {self.constraint} constraint removes directions, so its projection has no inverse.")
        return self._apply(x.to(torch.float64), 1.0 / self.filters.to(torch.float64), 1.0 / self.outside)

    def _apply(self, x: torch.Tensor, filters: torch.Tensor, outside: float) -> torch.Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"got a tensor of shape {tuple(x.shape)}; expected (..., {self.dim}).")
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = x.to(dtype)
        basis = self.eigenvectors.to(y.device, dtype)  # (d, k)
        gain = filters.to(y.device, dtype) - outside
        return (outside * y + ((y @ basis) * gain) @ basis.T).to(x.dtype)

    def bound(self, weight: torch.Tensor | None = None) -> float:
        """Largest root mean square of `||W P h||` over the retained inputs `h` seen.

        With `E[h h^T] = C` it is `||W P C^(1/2)||_F`, hence at most `||W||_F max_i f_i sqrt(m l_i)` and at most
        `||W||_2 sqrt(trace(P C P))`; the smaller is returned. Since `max_l sqrt(l) t / (l + t) = sqrt(t) / 2`, the soft
        constraint makes the first at most `||W||_F sqrt(m t) / 2` for every spectrum (its `worst_case`); the hard
        one makes the second `||W||_2` times the square root of the trace that is left.

        Args:
            weight (`torch.Tensor`, *optional*): `W` `(n, d)`: `A'`, or `s B A'` for a layer's output. Without it, the
                bound for a single row of norm 1.

        Returns:
            `float`: In units of the layer's output when `weight` is `s B A'`.
        """
        if weight is None:
            return self._largest_gain
        weight = weight.detach().to(torch.float64)
        spectral = float(torch.linalg.matrix_norm(weight, 2))
        # trace(P (C - C') P) <= u trace(P^2) for C <= C' + u I.
        passed = self._passed + self.uncertainty * self._squared_trace
        return min(float(weight.norm()) * self._largest_gain, spectral * math.sqrt(self.scale * passed))

    @property
    def _squared_trace(self) -> float:
        """`trace(P^2)`."""
        inside = float(self.filters.cpu().double().square().sum())
        return inside + self.outside**2 * (self.dim - len(self.filters))

    @property
    def _largest_gain(self) -> float:
        """`||P C^(1/2)||_2`: `max_i f_i sqrt(m l_i)`, and where `U` is inexact what it shares with the rest at most."""
        filters = self.filters.cpu().double()
        inside = float((filters**2 * self._own_eigenvalues).max()) if len(filters) else 0.0
        shared = self.outside * float((filters * self.residuals).norm())
        largest_filter = max(self.outside, float(filters.max()) if len(filters) else 0.0)
        unknown = self.uncertainty * largest_filter**2
        return math.sqrt(self.scale * (max(inside, self.outside**2 * self._largest_outside) + shared + unknown))

    def change(self, weight: torch.Tensor) -> float:
        """Root mean square of `||W h||` over the retained inputs seen, from the stored eigenpairs alone.

        Exact along the kept eigenvectors; what lies outside of them counts with the largest eigenvalue there, so the
        value is never too small. Unlike [`bound`] it assumes nothing about `W`.

        Args:
            weight (`torch.Tensor`): `W` `(n, d)`, e.g. `s B A` as it is saved.
        """
        return self.change_of(self.lengths(weight))

    def lengths(self, weight: torch.Tensor) -> torch.Tensor:
        """What `change` needs of a weight: `||W u_i||`, the norm of what is outside of `U`, and `||W||`; `(k + 2,)`, on
        the weight's device, where those of many layers can wait to be read together."""
        basis = self.eigenvectors.to(weight.device)  # (d, k)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        weight, basis = weight.detach().to(dtype), basis.to(dtype)
        along = weight @ basis  # (n, k)
        rest = (weight - along @ basis.T).norm()
        return torch.cat([along.norm(dim=0), rest[None], weight.norm()[None]])

    def change_of(self, lengths: torch.Tensor) -> float:
        """`change` of the weight whose `lengths` these are."""
        *_, rest, norm = lengths.tolist()
        lengths = lengths[:-2].cpu().double()  # (k,)
        inside = float((lengths**2 * self._own_eigenvalues).sum())
        shared = 2 * rest * float((lengths * self.residuals).sum())
        unknown = self.uncertainty * norm**2
        return math.sqrt(self.scale * (inside + shared + unknown + rest**2 * self._largest_outside))

    def second_moment(self) -> torch.Tensor:
        """Returns the `C` `(d, d)` it was fitted to, float64, as far as it is known from the kept eigenpairs.

        Of the directions outside of `U` only the mean eigenvalue is known (the trace is stored, in `scale`), so each
        gets that one: exact for all eigenvectors, and of the right trace for any number.

        Raises:
            ValueError: If eigenvectors of the leading eigenvalues are not kept: a hard constraint may keep the others.
        """
        if self.start:
            raise ValueError('the leading eigenvectors are not kept; fit with constraint="soft" to keep them.')
        basis, rest = self.eigenvectors.cpu().double(), self._mean_outside  # (d, k)
        moment = (basis * (self._own_eigenvalues - rest)) @ basis.T
        moment.diagonal().add_(rest)
        return self.scale * moment

    @property
    def _mean_outside(self) -> float:
        """The mean eigenvalue of the directions outside of `U`."""
        values = self._own_eigenvalues
        return max(self.dim - float(values.sum()), 0.0) / max(self.dim - len(values), 1)

    @property
    def moment_uncertainty(self) -> float:
        """In no direction does the second moment of the inputs seen exceed [`second_moment`] by more."""
        # Where U has residuals, [[0, E], [E^T, b]] is what is missing, with ||E|| at most their norm.
        beyond = max(self._largest_outside - self._mean_outside, 0.0) + float(self.residuals.norm())
        return self.scale * (beyond + self.uncertainty)

    def to(self, device: torch.device | str) -> NullSpace:
        """Returns the same null space with its tensors on a device."""
        values = dict(self.__dict__)
        for name in ("eigenvectors", "filters"):
            values[name] = values[name].to(device)
        for name in ("eigenvalues", "residuals"):
            values[name] = values[name].cpu()
        return NullSpace(**values)


_SCALARS = (
    "outside",
    "next_eigenvalue",
    "scale",
    "start",
    "constraint",
    "strength",
    "energy",
    "max_rank",
    "statistics",
    "counts",
    "uncertainty",
)
_TENSORS = ("eigenvectors", "filters", "eigenvalues", "residuals")


def save_null_spaces(path: str | os.PathLike, null_spaces: dict[str, NullSpace]) -> None:
    """Writes the null spaces of a model's layers to one safetensors file; layers that share one are stored once.

    Args:
        path (`str` or `os.PathLike`): The file, by convention `space_stats.safetensors`.
        null_spaces (`dict[str, NullSpace]`): By layer name.
    """
    unique: list[NullSpace] = []
    index_of: dict[int, int] = {}
    layers = {}
    for name, space in null_spaces.items():
        if id(space) not in index_of:
            index_of[id(space)] = len(unique)
            unique.append(space)
        layers[name] = index_of[id(space)]
    tensors = {
        f"{i}.{field}": getattr(space, field).detach().cpu().contiguous()
        for i, space in enumerate(unique)
        for field in _TENSORS
    }
    scalars = [{field: getattr(space, field) for field in _SCALARS} for space in unique]
    # Beside the others, so that version 0.1.0 reads the file as well.
    identities = [None if space.identity is None else asdict(space.identity) for space in unique]
    metadata = {
        "format": _FORMAT, "layers": json.dumps(layers), "spaces": json.dumps(scalars),
        "identities": json.dumps(identities),
    }  # fmt: skip
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_null_spaces(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict[str, NullSpace]:
    """Reads what [`save_null_spaces`] wrote.

    What the null spaces were fitted on comes with them, and is compared where they are used. Files of version 0.1.0 do
    not say; they are read all the same, and using them gives a warning.

    Args:
        path (`str` or `os.PathLike`): The file.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the eigenvectors go.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated or of another kind.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no null spaces at {path!r}; they are written by save_null_spaces.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{path!r} is a safetensors file of another kind (format {metadata.get('format')!r}); "
                    f"expected {_FORMAT!r}, as written by save_null_spaces."
                )
            spaces = _metadata(path, metadata, "spaces", list)
            # As in files of version 0.1.0, which do not say.
            identities: list[FitIdentity | None] = [None] * len(spaces)
            if "identities" in metadata:
                said = _metadata(path, metadata, "identities", list)
                identities = [None if content is None else FitIdentity.from_dict(content) for content in said]
            unique = [
                NullSpace(
                    **scalars, **{field: file.get_tensor(f"{i}.{field}") for field in _TENSORS}, identity=identities[i]
                ).to(device)
                for i, scalars in enumerate(spaces)
            ]
            return {name: unique[i] for name, i in _metadata(path, metadata, "layers", dict).items()}
    except (SafetensorError, TypeError, IndexError) as error:
        raise ValueError(f"{path!r} is not a complete safetensors file: {error}. Fit the null spaces again.") from error


def _metadata(path: str, metadata: dict[str, str], key: str, expected: type):
    where = f"the entry {key!r} of {path!r}"
    return parse_json(
        metadata.get(key, "").encode(), where=where, expected=expected, remedy="Fit the null spaces again."
    )
