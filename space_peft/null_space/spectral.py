"""The leading eigenpairs of a second moment: as many as a filter needs, as accurate as it can tell apart.

A full decomposition costs about as much as ten to fifteen products of `(d, d)` matrices. A filter that has values of its
own for `k << d` eigenvectors needs the Krylov space of a random block only (Musco and Musco 2015, arXiv 1504.05477):
two to four times `k` columns of products with the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .precision import exact_products


# Below this many columns for each wanted one, LAPACK's full decomposition is as fast (measured, docs/decisions.md).
_FULL_RATIO = 16
# What a decomposition costs, in products of `(d, d)` matrices, and in columns for each wanted one.
_FULL_PRODUCTS, _KRYLOV_COLUMNS = 12, 3
_SEED = 0


@dataclass(frozen=True)
class Spectrum:
    """
    Eigenpairs of a symmetric matrix `C` `(d, d)`, largest eigenvalues first.

    Args:
        values (`torch.Tensor`): `l` `(n,)`, float64: the Rayleigh quotients `u^T C u`.
        vectors (`torch.Tensor`): `U` `(d, n)`, orthonormal.
        residuals (`torch.Tensor`): `||C u_i - l_i u_i||` `(n,)`, float64; zeros for a full decomposition.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    residuals: torch.Tensor


def decompose(
    matrix: torch.Tensor,
    count: int | None = None,
    sensitivity: Callable[[torch.Tensor], torch.Tensor] | None = None,
    tolerance: float = 3e-3,
) -> Spectrum:
    """Returns the `count` leading eigenpairs of a positive semidefinite matrix, or all of them where that is no dearer.

    Args:
        matrix (`torch.Tensor`): `C` `(d, d)`, float32 or float64.
        count (`int`, *optional*): How many eigenpairs are needed; all by default.
        sensitivity (`Callable`, *optional*): `|f'(l)|` of the filter they are for, elementwise. Pairs count as found
            when `sqrt(sum_i (f'(l_i) ||C u_i - l_i u_i||)^2)`, to first order the error of `f(C)`, is below `tolerance`.
            Default: 1.
        tolerance (`float`, defaults to 3e-3): In units of the filter; the error measured is a third of it or less.

    Returns:
        [`Spectrum`]: With at least `count` pairs.
    """
    d = len(matrix)
    with exact_products({matrix.device.type}):
        if count is not None and not takes_all(count, d):
            found = _krylov(matrix, count, sensitivity or torch.ones_like, tolerance)
            if found is not None:
                return found
        # float32 leaves 1e-3 in a filter of a few thousand dimensions, and 1e-7 of the largest eigenvalue in the others.
        values, vectors = torch.linalg.eigh(matrix.to(torch.float64))
    values = values.flip(0).clamp_(min=0.0)
    return Spectrum(values, vectors.flip(1), torch.zeros_like(values))


def takes_all(count: int, dim: int) -> bool:
    """Whether `count` eigenpairs of a matrix of `dim` rows come from its full decomposition."""
    return count * _FULL_RATIO > dim


def decomposition_flops(dim: int, count: int | None = None) -> float:
    """About what [`decompose`] costs, in floating-point operations."""
    if count is None or takes_all(count, dim):
        return _FULL_PRODUCTS * 2.0 * dim**3
    columns = _KRYLOV_COLUMNS * count
    # Products with the matrix, and each block made orthogonal to those before it, twice.
    return 2.0 * columns * dim**2 + 4.0 * dim * columns**2


def _krylov(c: torch.Tensor, count: int, sensitivity: Callable, tolerance: float) -> Spectrum | None:
    """Rayleigh-Ritz on a growing block Krylov space; `None` if that does not pay, or does not converge."""
    d = len(c)
    block = max(8, count // 2)
    generator = torch.Generator().manual_seed(_SEED)
    x = _orthonormal(c @ torch.randn(d, block, generator=generator).to(c))
    basis, products = c.new_empty(d, 0), c.new_empty(d, 0)  # Q and C Q
    while basis.shape[1] + block <= d // 2:
        y = c @ x
        basis, products = torch.cat([basis, x], dim=1), torch.cat([products, y], dim=1)
        if basis.shape[1] >= 2 * count:
            small = basis.T @ products
            values, rotation = torch.linalg.eigh((small + small.T) / 2)
            values, rotation = values.flip(0)[:count], rotation.flip(1)[:, :count]
            vectors = basis @ rotation
            residuals = (products @ rotation - vectors * values).norm(dim=0)
            if float((sensitivity(values) * residuals).norm()) < tolerance:
                gap = vectors.T @ vectors - torch.eye(count, dtype=c.dtype, device=c.device)
                # Blocks of less than full rank (fewer samples than columns) can end up in each other's span.
                return Spectrum(values.double(), vectors, residuals.double()) if float(gap.abs().max()) < 1e-4 else None
        # Twice: once leaves what cancellation hides.
        x = _orthonormal(y - basis @ (basis.T @ y))
        x = _orthonormal(x - basis @ (basis.T @ x))
    return None


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns' span `(d, b)`: Cholesky QR, twice; matrix products instead of reflections."""
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(x.T @ x)
        if failed:
            return torch.linalg.qr(x).Q
        x = torch.linalg.solve_triangular(factor.T, x, upper=True, left=False)
    return x
