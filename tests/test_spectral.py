"""The partial decomposition against a full one in float64: the filter it makes, its bounds, and when it gives up."""

import pytest
import torch

from space_peft.null_space import NullSpaceFitter, spectral
from space_peft.null_space.spectral import decompose


STRENGTH = 0.3


def spectrum_of(kind, d):
    """Eigenvalues with mean 1, as real layers have them: a few outliers, then a slow decay, or a bulk."""
    places = torch.arange(1, d + 1, dtype=torch.float64)
    values = {
        "slow": places**-0.5,
        "fast": places**-1.5,
        "bulk with outliers": torch.where(places <= 4, 200.0 / places, 0.05 + 1.5 * (1 - places / d) ** 2),
    }[kind]
    return values / values.mean()


def matrix_of(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (basis * values) @ basis.T


def fitter_of(c):
    """A fitter whose second moment is `c`: its inputs are the columns of a square root."""
    root = torch.linalg.cholesky(c + 1e-12 * torch.eye(len(c), dtype=c.dtype))
    fitter = NullSpaceFitter(len(c), dtype=torch.float32)
    fitter.update(root.T.float() * len(c) ** 0.5)
    return fitter


def exact_filter(c, max_rank, strength=STRENGTH):
    """The soft filter with a limited rank, from its definition: `min(t / (l + t), the value of the first left out)`."""
    values, vectors = torch.linalg.eigh(c / c.diagonal().mean())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    filters = strength / (values + strength)
    return (vectors * filters.clamp(max=float(filters[max_rank]))) @ vectors.T


@pytest.mark.parametrize("kind", ["slow", "fast", "bulk with outliers"])
@pytest.mark.parametrize("d, max_rank", [(600, 18), (768, 24)])
def test_filter_of_partial_decomposition_is_that_of_the_full_one(kind, d, max_rank, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", small_only(torch.linalg.eigh, d))
    c = matrix_of(spectrum_of(kind, d))
    space = fitter_of(c).fit("soft", strength=STRENGTH, max_rank=max_rank)
    monkeypatch.undo()
    projection = space.project(torch.eye(d, dtype=torch.float64))
    assert torch.linalg.matrix_norm(projection - exact_filter(c, max_rank), 2) < 1e-3


def small_only(eigh, d):
    """`eigh` that refuses the full matrix, to prove that it is not what found the eigenpairs."""

    def guarded(matrix):
        assert len(matrix) <= d // 2, "the full decomposition was used"
        return eigh(matrix)

    return guarded


@pytest.mark.parametrize("kind", ["slow", "fast", "bulk with outliers"])
def test_bounds_hold_although_eigenvectors_are_inexact(kind):
    """On the true second moment, in float64, for updates that reach for its leading and its left-out directions."""
    d, max_rank = 600, 12
    c = matrix_of(spectrum_of(kind, d), seed=1)
    space = fitter_of(c).fit("soft", strength=STRENGTH, max_rank=max_rank)
    assert 0 < space.residuals.max() < 0.1, "the test is about inexact eigenvectors"
    vectors = torch.linalg.eigh(c).eigenvectors.flip(1)
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(4, d, generator=generator, dtype=torch.float64)
    for free in (mixing, mixing[:, :5] @ vectors[:, :5].T, mixing[:, :3] @ vectors[:, max_rank : max_rank + 3].T):
        weight = space.project(free)
        true = float((weight @ c @ weight.T).trace()) ** 0.5
        assert true <= space.bound(free) * (1 + 1e-6)
        assert true <= space.change(weight) * (1 + 1e-6)
    projection = space.project(torch.eye(d, dtype=torch.float64))
    mean = float(c.diagonal().mean())
    assert space.free_dimensions == pytest.approx(float(projection.trace()), rel=1e-5)
    assert space.kept == pytest.approx(1 - float((projection @ c @ projection).trace()) / (mean * d), abs=1e-5)


def test_same_eigenpairs_every_time():
    c = matrix_of(spectrum_of("slow", 512)).float()
    first, second = decompose(c, 16), decompose(c, 16)
    assert torch.equal(first.vectors, second.vectors) and torch.equal(first.values, second.values)


def test_fewer_inputs_than_eigenvectors_falls_back_to_the_full_decomposition():
    """Krylov blocks of a matrix of rank 5 run out of directions."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 640, generator=generator)
    space = NullSpaceFitter(640, dtype=torch.float32).update(inputs).fit("soft", strength=STRENGTH, max_rank=20)
    gram = space.eigenvectors.T @ space.eigenvectors
    assert torch.allclose(gram, torch.eye(space.rank), atol=1e-5)
    left = space.project(inputs).norm(dim=1) / inputs.norm(dim=1)
    assert left.max() < STRENGTH / (640 / 5 * 0.5 + STRENGTH)  # eigenvalues of about 640 / 5


def test_a_spectrum_without_a_gap_anywhere_falls_back_too():
    d = 512
    c = matrix_of(1 + 0.01 * torch.linspace(1, 0, d, dtype=torch.float64))
    found = decompose(c.float(), 16, lambda values: 100.0 * torch.ones_like(values))
    assert len(found.values) == d and found.residuals.max() == 0


def test_all_eigenpairs_where_a_part_would_be_no_cheaper():
    c = matrix_of(spectrum_of("slow", 64)).float()
    found = decompose(c, 40)
    assert len(found.values) == 64 and found.residuals.max() == 0


def test_tolerance_is_kept():
    """The stopping rule's estimate is no smaller than the error of the filter."""
    c = matrix_of(spectrum_of("slow", 600))
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(c))
    count = 18
    clipped = (STRENGTH / (values + STRENGTH)).clamp(max=float(STRENGTH / (values[count - 1] + STRENGTH)))
    exact = (vectors * clipped) @ vectors.T
    errors = []
    for tolerance in (1e-1, 1e-2, 1e-3):
        found = spectral._krylov(c.float(), count, lambda v: STRENGTH / (v + STRENGTH) ** 2, tolerance)
        filters = STRENGTH / (found.values + STRENGTH)
        u, last = found.vectors.double(), filters[-1]
        made = last * torch.eye(600, dtype=torch.float64) + (u * (filters - last)) @ u.T
        errors.append(float(torch.linalg.matrix_norm(made - exact, 2)))
        assert errors[-1] < tolerance
    assert errors[2] < errors[0]


@pytest.mark.parametrize("kind", ["slow", "fast", "bulk with outliers"])
def test_a_small_strength_makes_a_small_filter_which_is_as_exact_for_its_size(kind):
    """An error of 3e-3 would be as large as all that most directions get."""
    d, max_rank, strength = 600, 18, 0.003
    c = matrix_of(spectrum_of(kind, d))
    space = fitter_of(c).fit("soft", strength=strength, max_rank=max_rank)
    assert space.residuals.max() > 0, "the test is about a partial decomposition"
    error = space.project(torch.eye(d, dtype=torch.float64)) - exact_filter(c, max_rank, strength)
    assert torch.linalg.matrix_norm(error, 2) < 0.1 * space.outside


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_in_panels_are_the_second_moment(dtype):
    """Only the upper triangle is computed, a panel of columns at a time; several panels, the last one not full."""
    generator = torch.Generator().manual_seed(0)
    d = 1100
    inputs = torch.randn(50, d, generator=generator, dtype=torch.float64) + 0.3
    fitter = NullSpaceFitter(d, dtype=dtype)
    for part in inputs.split(20):
        fitter.update(part.to(dtype), group="image")
    fitter.update(3 * inputs[:7].to(dtype), group="text")
    images, texts = inputs.T @ inputs / 50, 9 * inputs[:7].T @ inputs[:7] / 7
    moment = fitter.second_moment()
    assert moment.dtype == dtype and torch.equal(moment, moment.T)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(moment.double(), (images + texts) / 2, atol=tolerance * float(images.abs().max()))


def orthonormal(vectors):
    gram = vectors.T @ vectors
    return float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max()) < 1e-4


@pytest.mark.parametrize("samples", [7, 8, 9])
def test_vectors_that_are_not_orthonormal_are_never_returned(samples):
    """Fewer samples than a block has columns: rounding makes up the others, at times within each other's span."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(samples + 100 * seed)
        inputs = torch.randn(samples, 640, generator=generator, dtype=torch.float64)
        c = (inputs.T @ inputs).float()
        c /= c.diagonal().mean()
        found = spectral._krylov(c, 20, lambda values: STRENGTH / (values + STRENGTH) ** 2, 3e-3)
        assert found is None or orthonormal(found.vectors)


def test_a_block_within_the_span_of_another_is_noticed(monkeypatch):
    """The same, made rather than hoped for: how rounding falls differs between processors."""
    c = matrix_of(spectrum_of("slow", 512)).float()
    arguments = c, 16, torch.ones_like, float("inf")
    assert orthonormal(spectral._krylov(*arguments).vectors)
    original, blocks = spectral._orthonormal, []

    def crooked(x):
        blocks.append(original(x))
        return (blocks[-1] + 0.1 * blocks[0]) if len(blocks) > 1 else blocks[0]

    monkeypatch.setattr(spectral, "_orthonormal", crooked)
    assert spectral._krylov(*arguments) is None
    blocks.clear()
    found = decompose(c, 16, None, float("inf"))
    assert len(found.values) == 512 and orthonormal(found.vectors)
