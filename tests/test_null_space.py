"""The null space: statistics, projection, bounds and files, against float64 references."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch

from space_peft.null_space import NullSpace, NullSpaceFitter, load_null_spaces, save_null_spaces
from space_peft.null_space.constraints import FITTED
from space_peft.null_space.moments import _upper
from space_peft.null_space.spectral import Spectrum


def samples_with_spectrum(eigenvalues, seed=0):
    """Rows `(d, d)` float64 whose second moment has exactly these eigenvalues, and the eigenvectors `(d, d)`."""
    generator = torch.Generator().manual_seed(seed)
    d = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return (d * eigenvalues).sqrt()[:, None] * basis.T, basis


def random_spectrum(generator, d):
    """Anything from flat to one dominant direction, some with exact zeros."""
    decay = 10 ** (3 * torch.rand(1, generator=generator, dtype=torch.float64) - 1.5)
    spectrum = torch.rand(d, generator=generator, dtype=torch.float64) * torch.linspace(0, 1, d).double() ** decay
    if torch.rand(1, generator=generator) < 0.3:
        spectrum[: d // 3] = 0.0
    return spectrum * 10 ** (4 * torch.rand(1, generator=generator, dtype=torch.float64) - 2)


def fitted(rows, constraint="soft", **settings):
    return NullSpaceFitter(rows.shape[-1]).update(rows).fit(constraint, **settings)


def reference_projection(rows, constraint, strength=0.3, count=None):
    """`P` `(d, d)` in float64 from its definition."""
    second_moment = rows.T @ rows / len(rows)
    values, vectors = torch.linalg.eigh(second_moment)
    if constraint == "soft":
        filters = strength / (values / values.mean() + strength)
    else:
        filters = torch.ones_like(values)
        filters[len(values) - count :] = 0.0
    return vectors @ torch.diag(filters) @ vectors.T


@pytest.mark.parametrize("d", [1, 2, 7, 40])
def test_soft_projection_is_the_filter(d):
    generator = torch.Generator().manual_seed(d)
    rows = torch.randn(3 * d, d, generator=generator, dtype=torch.float64) * torch.logspace(-3, 1, d).double()
    x = torch.randn(5, 2, d, generator=generator)
    projected = fitted(rows, strength=0.1).project(x)
    expected = x.double() @ reference_projection(rows, "soft", strength=0.1)
    assert projected.dtype == torch.float32 and projected.shape == x.shape
    # Filters within 1e-3 of the value outside are not kept apart.
    assert (projected - expected).norm() <= 2e-3 * x.norm()
    assert (projected - x).norm() > 0.01 * x.norm()


@pytest.mark.parametrize("protected", [3, 12, 17])
def test_hard_projection_removes_the_leading_directions_whichever_side_is_kept(protected):
    eigenvalues = torch.cat([torch.full((protected,), 10.0), torch.full((20 - protected,), 1e-4)]).double()
    rows, _ = samples_with_spectrum(eigenvalues)
    space = fitted(rows, "hard", energy=0.99)
    x = torch.randn(6, 20)
    expected = x.double() @ reference_projection(rows, "hard", count=protected)
    torch.testing.assert_close(space.project(x), expected.float(), rtol=0, atol=1e-5)
    assert space.rank == protected and space.free_dimensions == 20 - protected
    assert space.eigenvectors.shape == (20, min(protected, 20 - protected))
    assert space.kept == pytest.approx(1 - (20 - protected) * 1e-4 / float(eigenvalues.sum()), abs=1e-9)


def test_hard_projection_is_idempotent_and_soft_is_not():
    rows = torch.randn(50, 16, dtype=torch.float64) * torch.logspace(-2, 1, 16).double()
    x = torch.randn(4, 16)
    for constraint, same in (("hard", True), ("soft", False)):
        space = fitted(rows, constraint, energy=0.9)
        once = space.project(x)
        assert torch.allclose(space.project(once), once, atol=1e-5) is same


def test_full_energy_protects_exactly_the_span_of_the_data():
    rows = torch.randn(6, 30)
    space = fitted(rows, "hard", energy=1.0)
    assert space.rank == 6
    leak = space.project(rows).norm() / rows.norm()
    assert leak < 1e-6


def test_no_constraint_changes_nothing_but_knows_the_spectrum():
    rows = torch.randn(40, 8)
    space = fitted(rows, "none")
    x = torch.randn(3, 8)
    assert torch.equal(space.project(x), x)
    assert space.kept == pytest.approx(0.0, abs=1e-12) and space.rank == 0
    assert space.eigenvalues.mean() == pytest.approx(1.0)


def test_low_precision_input_is_projected_in_float32():
    rows = torch.randn(100, 64) * torch.logspace(-2, 1, 64)
    space = fitted(rows)
    x = torch.randn(8, 64).bfloat16()
    assert space.project(x).dtype == torch.bfloat16
    assert torch.equal(space.project(x), space.project(x.float()).bfloat16())


def test_unproject_inverts_the_soft_projection():
    rows = torch.randn(100, 24, dtype=torch.float64) * torch.logspace(-2, 1, 24).double()
    space = fitted(rows)
    x = torch.randn(4, 24, dtype=torch.float64)
    torch.testing.assert_close(space.project(space.unproject(x)), x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no inverse"):
        fitted(rows, "hard").unproject(x)


def rms(rows, weight):
    return float((rows @ weight.T).square().sum(dim=1).mean().sqrt())


@pytest.mark.parametrize("max_rank", [None, 3])
def test_soft_bound_holds_on_100_random_spectra(max_rank):
    """RMS ||W P h|| <= bound(W) <= ||W||_F sqrt(m t) / 2, for random W and for the worst W of each spectrum."""
    generator = torch.Generator().manual_seed(0)
    closest = 0.0
    for trial in range(100):
        d = int(torch.randint(2, 24, (1,), generator=generator))
        strength = float(10 ** (4 * torch.rand(1, generator=generator) - 3))
        rows, basis = samples_with_spectrum(random_spectrum(generator, d), seed=trial)
        space = fitted(rows, strength=strength, max_rank=max_rank)
        for weight in (torch.randn(3, d, generator=generator, dtype=torch.float64), *basis.T[:, None]):
            measured = rms(rows, space.project(weight))
            # Eigenvectors are stored in float32: beside a change of size 1, below 1e-6 is zero.
            assert measured <= space.bound(weight) * (1 + 1e-5) + 1e-6 * rms(rows, weight)
            assert space.bound(weight) <= float(weight.norm()) * FITTED["soft"].worst_case(space) * (1 + 1e-5)
            closest = max(closest, measured / (float(weight.norm()) * FITTED["soft"].worst_case(space)))
    assert closest > 0.95


@pytest.mark.parametrize("strength", [0.003, 0.03, 0.3, 0.9])
def test_soft_bound_is_reached_on_the_worst_spectrum(strength):
    """An eigenvalue equal to t is let through with sqrt(t) / 2, which is the bound for every spectrum."""
    eigenvalues = torch.full((16,), (16 - strength) / 15).double()
    eigenvalues[0] = strength
    rows, basis = samples_with_spectrum(7.0 * eigenvalues)
    space = fitted(rows, strength=strength)
    weight = basis[:, :1].T
    assert space.scale == pytest.approx(7.0)
    assert rms(rows, space.project(weight)) == pytest.approx(FITTED["soft"].worst_case(space), rel=1e-4)
    assert space.bound() == pytest.approx(FITTED["soft"].worst_case(space), rel=1e-4)


def test_hard_bound_is_the_trace_left_over():
    rows, _ = samples_with_spectrum(torch.tensor([50.0, 20.0, 1.0, 0.5, 0.2, 0.1]).double())
    space = fitted(rows, "hard", energy=0.95)
    assert space.rank == 2
    weight = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert space.bound(weight) == pytest.approx(1.8**0.5, rel=1e-6)
    assert rms(rows, space.project(weight)) == pytest.approx(1.8**0.5, rel=1e-6)
    assert space.bound() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("constraint", ["soft", "hard", "none"])
@pytest.mark.parametrize("max_rank", [None, 2, 9])
def test_change_from_stored_eigenpairs_is_never_too_small(constraint, max_rank):
    generator = torch.Generator().manual_seed(3)
    for trial in range(20):
        rows, _ = samples_with_spectrum(random_spectrum(generator, 12), seed=trial)
        space = fitted(rows, constraint, energy=0.97, max_rank=max_rank)
        weight = torch.randn(3, 12, generator=generator, dtype=torch.float64)
        for update in (weight, space.project(weight)):
            measured = rms(rows, update)
            # Eigenvectors are stored in float32: beside a change of size 1, below 1e-6 is zero.
            assert measured <= space.change(update) * (1 + 1e-5) + 1e-6 * rms(rows, weight)
        if constraint == "soft" and max_rank is None:
            assert space.change(update) <= 1.05 * measured + 1e-6 * rms(rows, weight)


def test_max_rank_caps_protected_directions_and_keeps_the_soft_bound():
    rows = torch.randn(200, 20, dtype=torch.float64) * torch.logspace(-1, 1, 20).double()
    assert fitted(rows, "hard", energy=0.999, max_rank=4).rank == 4
    capped, full = fitted(rows, max_rank=4), fitted(rows)
    assert capped.rank == 4 < full.rank
    # Never lets more through than the full filter, in any direction.
    assert bool((capped.spectrum_filters() <= full.spectrum_filters() + 1e-3).all())
    assert capped.kept >= full.kept - 1e-3


@pytest.mark.parametrize("statistics", ["token", "pooled"])
def test_merge_equals_one_pass_and_order_does_not_matter(statistics):
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 6, 10, generator=generator), torch.rand(4, 6, generator=generator) < 0.7, group)
        for group in ("text", "image", "text", "text", "image")
    ]

    def fit(order):
        fitter = NullSpaceFitter(10, statistics=statistics)
        for i in order:
            fitter.update(*batches[i])
        return fitter

    whole, parts = fit(range(5)), (fit([3, 0]), fit([4, 2]), fit([1]))
    merged = parts[0] + parts[1] + parts[2]
    for other in (merged, fit([4, 2, 0, 1, 3])):
        assert other.counts == whole.counts
        torch.testing.assert_close(other.second_moment(), whole.second_moment(), rtol=1e-12, atol=1e-14)
    assert parts[0].counts.keys() == {"text"}, "adding must not change what was added"
    restored = NullSpaceFitter(10, statistics=statistics)
    restored.load_state_dict(whole.state_dict())
    assert torch.equal(restored.second_moment(), whole.second_moment())
    with pytest.raises(ValueError, match="cannot merge"):
        whole.merge(NullSpaceFitter(11, statistics=statistics))
    with pytest.raises(ValueError, match="expected dimension 11"):
        NullSpaceFitter(11, statistics=statistics).load_state_dict(whole.state_dict())


WORKER = """
import sys
import torch
from space_peft.null_space import NullSpaceFitter

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
rows = torch.load(f"{folder}/rows.pt")
fitter = NullSpaceFitter(6).update(rows[:30] if rank == 0 else rows[30:], group="image")
if rank == 1:
    fitter.update(rows[:5], group="text")  # a group that the other process has not seen
torch.save(fitter.all_reduce().state_dict(), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow  # test_processes.py fits in two
def test_two_processes_add_up_to_one(tmp_path):
    rows = torch.randn(40, 6)
    torch.save(rows, tmp_path / "rows.pt")
    command = [sys.executable, "-c", WORKER]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    whole = NullSpaceFitter(6).update(rows, group="image").update(rows[:5], group="text")
    for rank in range(2):
        fitter = NullSpaceFitter(6)
        fitter.load_state_dict(torch.load(tmp_path / f"{rank}.pt"))
        assert fitter.counts == {"image": 40, "text": 5}
        torch.testing.assert_close(fitter.second_moment(), whole.second_moment(), rtol=1e-12, atol=1e-14)


def test_second_moment_in_float64_of_float32_inputs():
    rows = torch.randn(500, 12)
    fitter = NullSpaceFitter(12)
    for chunk in rows.split(7):
        fitter.update(chunk)
    expected = rows.double().T @ rows.double() / 500
    torch.testing.assert_close(fitter.second_moment(), expected, rtol=1e-13, atol=1e-14)


def test_padding_does_not_count():
    h = torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    poisoned = h.masked_fill(mask[..., None] == 0, float("nan"))
    fitter = NullSpaceFitter(8).update(poisoned, mask)
    assert fitter.counts == {"token": 9}
    torch.testing.assert_close(fitter.second_moment(), NullSpaceFitter(8).update(h[mask.bool()]).second_moment())


def test_pooled_counts_each_row_once():
    h = torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    fitter = NullSpaceFitter(8, statistics="pooled").update(h, mask)
    means = torch.stack([h[0, :3].mean(dim=0), h[1].mean(dim=0)]).double()
    assert fitter.counts == {"token": 2}, "a row without a token is no sample"
    torch.testing.assert_close(fitter.second_moment(), means.T @ means / 2, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(
        fitter.second_moment(), NullSpaceFitter(8).update(h, mask).second_moment(), rtol=0.1, atol=1e-2
    )


def test_groups_weigh_the_same_however_many_samples_they_have():
    many, few = torch.randn(1000, 6), torch.randn(10, 6)
    fitter = NullSpaceFitter(6).update(many, group="image").update(few, group="text")
    expected = (many.double().T @ many.double() / 1000 + few.double().T @ few.double() / 10) / 2
    torch.testing.assert_close(fitter.second_moment(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_are_named(value):
    h = torch.randn(2, 3, 4)
    h[1, 2, 0] = value
    with pytest.raises(ValueError, match=r"1 of 6 retained inputs of 'layers\.3\.q_proj' contain NaN or infinity"):
        NullSpaceFitter(4, name="layers.3.q_proj").update(h)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NullSpaceFitter(0), "at least 1"),
        (lambda: NullSpaceFitter(4, statistics="mean"), "expected one of 'token', 'pooled'"),
        (lambda: NullSpaceFitter(4).update(torch.zeros(2, 5)), r"expected \(..., 4\)"),
        (lambda: NullSpaceFitter(4).update(torch.zeros(2, 3, 4), torch.ones(3, 2)), "the mask"),
        (lambda: NullSpaceFitter(4).fit(), "nothing to fit"),
        (lambda: fitted(torch.zeros(3, 4)), "all retained inputs are zero"),
        (lambda: fitted(torch.randn(3, 4), "firm"), "one of 'soft', 'hard', 'none'"),
        (lambda: fitted(torch.randn(3, 4), strength=0.0), "expected a number > 0"),
        (lambda: fitted(torch.randn(3, 4), strength=float("nan")), "expected a number > 0"),
        (lambda: fitted(torch.randn(3, 4), "hard", energy=1.5), r"share in \(0, 1\]"),
        (lambda: fitted(torch.randn(3, 4)).project(torch.zeros(2, 3)), r"expected \(..., 4\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_null_spaces_survive_the_file(tmp_path):
    shared = fitted(torch.randn(50, 12))
    spaces = {
        "q": shared,
        "k": shared,
        "hard": fitted(torch.randn(50, 12), "hard", energy=0.99, max_rank=3),
        "complement": fitted(torch.randn(50, 12), "hard", energy=0.9),
        "none": fitted(torch.randn(50, 5), "none"),
    }
    path = tmp_path / "folder" / "space_stats.safetensors"
    save_null_spaces(path, spaces)
    loaded = load_null_spaces(path)
    assert list(loaded) == list(spaces) and loaded["q"] is loaded["k"]
    for name, space in spaces.items():
        for field in dataclasses.fields(space):
            before, after = getattr(space, field.name), getattr(loaded[name], field.name)
            same = torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
            assert same, (name, field.name)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "temporary files are left over"


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "space_stats.safetensors"
    with pytest.raises(FileNotFoundError, match="no null spaces"):
        load_null_spaces(path)
    save_null_spaces(path, {"a": fitted(torch.randn(50, 12))})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_null_spaces(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="of another kind"):
        load_null_spaces(path)


def inexact(spectrum, columns, strength=0.3, seed=0, noise=0.5):
    """A soft null space on Ritz vectors of a subspace that is off, as a Krylov method's may be, and its `C`, float64."""
    generator = torch.Generator().manual_seed(seed)
    d = len(spectrum)
    values = spectrum.double() / spectrum.double().mean()
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    moment = (basis * values) @ basis.T
    off = basis[:, :columns] + noise * torch.randn(d, columns, generator=generator, dtype=torch.float64) / d**0.5
    vectors = torch.linalg.qr(off).Q
    found, rotation = torch.linalg.eigh(vectors.T @ moment @ vectors)
    found, vectors = found.flip(0), (vectors @ rotation.flip(1)).float()
    outside = torch.linalg.qr(vectors.double(), mode="complete").Q[:, columns:]
    largest = float(torch.linalg.eigvalsh(outside.T @ moment @ outside)[-1])
    space = NullSpace(
        eigenvectors=vectors,
        filters=(strength / (found + strength)).float(),
        outside=strength / (largest + strength),
        eigenvalues=found,
        next_eigenvalue=largest,
        residuals=(moment @ vectors.double() - vectors.double() * found).norm(dim=0),
        scale=2.0,
        start=0,
        constraint="soft",
        strength=strength,
        energy=1.0,
        max_rank=columns,
        statistics="token",
        counts={"token": 1},
    )
    return space, 2.0 * moment


def test_bound_and_change_hold_for_inexact_eigenvectors():
    """What an eigenvector shares with the directions left out counts: without its residual each is too small."""
    beyond = {"bound": 0, "change": 0}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        d = int(torch.randint(3, 16, (1,), generator=generator))
        spectrum = random_spectrum(generator, d).sort(descending=True).values
        space, moment = inexact(spectrum, max(1, d // 3), seed=seed)
        values, vectors = torch.linalg.eigh(moment)
        root = vectors * values.clamp(min=0).sqrt()  # C = root root^T
        gain = float(torch.linalg.matrix_norm(space.project(root.T), 2))
        assert gain <= space.bound() * (1 + 1e-5)
        exact = dataclasses.replace(space, residuals=torch.zeros_like(space.residuals))
        beyond["bound"] += gain > exact.bound() * (1 + 1e-5)
        reached = space.eigenvectors.double() @ torch.randn(space.rank, 2, generator=generator, dtype=torch.float64)
        for weight in (torch.randn(2, d, generator=generator, dtype=torch.float64), vectors[:, -1:].T, reached.T):
            measured = float((weight @ root).norm())
            assert measured <= space.change(weight) * (1 + 1e-5) + 1e-6 * float(weight.norm())
            beyond["change"] += measured > exact.change(weight) * (1 + 1e-5) + 1e-6 * float(weight.norm())
            assert float((space.project(weight) @ root).norm()) <= space.bound(weight) * (1 + 1e-5)
    assert beyond["bound"] >= 3 and beyond["change"] >= 10, beyond


@pytest.mark.parametrize("angle", [0.1, 0.4, 0.7])
def test_bound_and_change_are_reached_in_two_dimensions(angle):
    """Where one direction is left out the formulas are equations, so that no term of them can be missing or too large."""
    c, s = math.cos(angle), math.sin(angle)
    moment = torch.tensor([[1.6, 0.0], [0.0, 0.4]], dtype=torch.float64)
    u, v = torch.tensor([c, s], dtype=torch.float64), torch.tensor([-s, c], dtype=torch.float64)
    along, beside, shared = float(u @ moment @ u), float(v @ moment @ v), abs(float(u @ moment @ v))
    outside = 0.9
    made = NullSpace(
        eigenvectors=u[:, None].float(),
        # The same is let through in both directions: what they share adds up in full.
        filters=torch.tensor([outside * math.sqrt(beside / along)]),
        outside=outside,
        eigenvalues=torch.tensor([along], dtype=torch.float64),
        next_eigenvalue=beside,
        residuals=torch.tensor([shared], dtype=torch.float64),
        scale=3.0,
        start=0,
        constraint="soft",
        strength=1.0,
        energy=1.0,
        max_rank=1,
        statistics="token",
        counts={"token": 1},
    )
    root = (3.0 * moment).sqrt()
    assert made.bound() == pytest.approx(float(torch.linalg.matrix_norm(made.project(root), 2)), rel=1e-6)
    for turn in (0.3, 1.0):
        row = math.cos(turn) * u - math.sin(turn) * v  # on the side where u and v pull together
        assert made.change(row[None]) == pytest.approx(float((row @ root).norm()), rel=1e-6)
    assert torch.allclose(made.second_moment(), 3.0 * (along * torch.outer(u, u) + (2 - along) * torch.outer(v, v)))


def test_second_moment_is_that_of_the_inputs_and_keeps_its_trace():
    """All eigenvectors kept: it is `C`. Some: it is on their span, and the others share what is left of the trace."""
    rows, basis = samples_with_spectrum(torch.tensor([9.0, 4.0, 1.0, 0.5, 0.3, 0.2]).double())
    moment = rows.T @ rows / len(rows)
    tolerance = {"rtol": 0, "atol": 1e-6 * float(moment.diagonal().sum())}
    torch.testing.assert_close(fitted(rows, "soft").second_moment(), moment, **tolerance)
    some = fitted(rows, "soft", max_rank=2).second_moment()
    values, vectors = torch.linalg.eigh(moment)
    rest = float(values[:4].mean())
    expected = (vectors * torch.cat([torch.full((4,), rest).double(), values[4:]])) @ vectors.T
    torch.testing.assert_close(some, expected, **tolerance)


def test_an_eigenvalue_left_out_is_no_smaller_than_its_residual_allows():
    spectrum = Spectrum(torch.tensor([3.0, 1.0]).double(), torch.eye(4)[:, :2], torch.tensor([0.5, 0.25]).double())
    assert [_upper(spectrum, i) for i in range(3)] == [3.5, 1.25, 0.0]


def test_the_largest_eigenvalue_left_out_may_be_on_either_side():
    """A hard constraint that keeps the complement: eigenvalues before it and after it are left out."""
    rows, _ = samples_with_spectrum(torch.tensor([9.0, 4.0, 1.0, 0.5, 0.3, 0.2]).double())
    space = fitted(rows, "none")
    assert space._largest_outside == pytest.approx(9.0 / 2.5, rel=1e-6)
    shorter = dataclasses.replace(space, eigenvalues=space.eigenvalues[3:], next_eigenvalue=2.0)
    assert shorter._largest_outside == 2.0
