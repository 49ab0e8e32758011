"""What `verify` asks of statistics before it computes a bound from them: each condition alone, on null spaces by hand."""

from dataclasses import replace

import pytest
import torch

from space_peft.hub_cards.certificate_checks import _statistics_problem
from space_peft.null_space import NullSpaceFitter


DIM = 24


def fitted(constraint="soft", rows=100, **settings):
    inputs = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, DIM)
    return NullSpaceFitter(DIM).update(inputs).fit(constraint, **settings)


def partial():
    """As a Krylov method leaves it: the other eigenvalues are known by the largest of them alone."""
    space = fitted(strength=0.3, max_rank=3)
    return replace(space, eigenvalues=space.eigenvalues[:3], next_eigenvalue=float(space.eigenvalues[3]))


HONEST = {
    "soft, in part": partial,
    "soft": lambda: fitted(strength=0.03),
    "soft, few vectors": lambda: fitted(strength=0.3, max_rank=3),
    "soft, fewer rows": lambda: fitted(rows=5, strength=0.03),
    "hard": lambda: fitted("hard", energy=0.9),
    "hard, the complement": lambda: fitted("hard", energy=1.0, rows=20),
    "none": lambda: fitted("none"),
}


@pytest.mark.parametrize("make", HONEST.values(), ids=HONEST)
def test_what_a_fit_gives_has_no_problem(make):
    assert _statistics_problem(make(), DIM) is None


def changed(name, place, value):
    """A null space with one value of one tensor set."""

    def change(space):
        tensor = getattr(space, name).clone()
        tensor[place] = value(tensor[place]) if callable(value) else value
        return replace(space, **{name: tensor})

    return change


def few():
    return fitted(strength=0.3, max_rank=3)


FORGED = {
    # Each is off by little, so that the condition it is for, and no coarser one, has to notice.
    "an eigenvector not quite of length 1": (few, changed("eigenvectors", (slice(None), 0), lambda u: u * 1.001)),
    "two eigenvectors not quite apart": (
        few,
        lambda space: replace(
            space, eigenvectors=space.eigenvectors + 1e-3 * space.eigenvectors.roll(1, dims=1)
        ),
    ),
    "one negative residual": (few, changed("residuals", 1, -1e-9)),
    "a filter off by a little": (few, changed("filters", 2, lambda f: f * 0.99)),
    "less trace than there is": (partial, lambda space: replace(space, next_eigenvalue=space.next_eigenvalue * 0.01)),
    "a smaller whole spectrum": (fitted, changed("eigenvalues", -1, 0.0)),
    "a larger eigenvalue": (fitted, changed("eigenvalues", 0, lambda value: value * 1.01)),
    "eigenvalues out of order": (few, lambda space: replace(space, eigenvalues=space.eigenvalues.flip(0))),
    "a negative next eigenvalue": (fitted, lambda space: replace(space, next_eigenvalue=-1e-3)),
    "a negative uncertainty": (fitted, lambda space: replace(space, uncertainty=-1e-3)),
    "an uncertainty that is no number": (fitted, lambda space: replace(space, uncertainty="none")),
    "no scale": (fitted, lambda space: replace(space, scale=0.0)),
    "a negative scale": (fitted, lambda space: replace(space, scale=-1.0)),
    "nothing let through outside": (few, lambda space: replace(space, outside=0.0)),
    "more than all let through outside": (few, lambda space: replace(space, outside=1.01)),
    "a soft one that begins late": (few, lambda space: replace(space, start=1)),
    "a hard one that lets through": (lambda: fitted("hard", energy=0.9), changed("filters", 0, 0.5)),
    "none that filters": (lambda: fitted("none"), lambda space: replace(space, outside=0.5)),
    "infinite eigenvalues": (few, changed("eigenvalues", 0, float("inf"))),
    "an infinite number": (few, lambda space: replace(space, next_eigenvalue=float("inf"))),
    "no samples": (few, lambda space: replace(space, counts={})),
    "zero samples": (few, lambda space: replace(space, counts={"image": 0})),
    "another constraint": (few, lambda space: replace(space, constraint="firm")),
    "a truth for a number": (few, lambda space: replace(space, outside=True)),
    "one filter too few": (few, lambda space: replace(space, filters=space.filters[:-1])),
}  # fmt: skip


@pytest.mark.parametrize(("make", "forge"), FORGED.values(), ids=FORGED)
def test_numbers_that_no_fit_gives_are_a_problem(make, forge):
    assert _statistics_problem(forge(make()), DIM) is not None


def test_statistics_of_another_layer_are_a_problem():
    assert "do not fit 25 inputs" in _statistics_problem(few(), DIM + 1)
