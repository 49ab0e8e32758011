"""Every constraint, by its properties: what its projection does is what a dense matrix does."""

import ast
import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from space_peft.choices import CONSTRAINTS
from space_peft.config import SpaceLoraConfig
from space_peft.null_space import NullSpaceFitter
from space_peft.null_space.constraints import FITTED, most_columns


DIM = 12
SPECTRA = {
    "falling": torch.logspace(1, -3, DIM),
    "flat": torch.ones(DIM),
    "few directions": torch.tensor([4.0, 2.0, 1.0] + [0.0] * (DIM - 3)),
    "most directions": torch.tensor([1.0] * (DIM - 2) + [0.0] * 2),
}


def fitted(constraint, spectrum="falling", **settings):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64)).Q
    rows = torch.randn(200, DIM, dtype=torch.float64) * SPECTRA[spectrum].double().sqrt() @ basis.T
    return NullSpaceFitter(DIM).update(rows).fit(constraint, **settings)


def test_each_constraint_is_known_everywhere():
    assert set(FITTED) == set(CONSTRAINTS) == set(get_args(get_type_hints(SpaceLoraConfig)["constraint"]))
    settings = {field.name for field in dataclasses.fields(SpaceLoraConfig)}
    assert {kind.knob for kind in CONSTRAINTS.values() if kind.knob is not None} <= settings


def test_no_other_code_asks_for_a_name():
    """What a constraint does is in the two tables: `x.constraint == "soft"`, or a name compared, would miss a new one."""
    found = []
    for folder in ("space_peft", "trainers", "hub_cards"):
        for path in sorted((Path(__file__).parents[1] / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Compare):
                    continue
                sides = [node.left, *node.comparators]
                values = [side.value for side in ast.walk(node) if isinstance(side, ast.Constant)]
                asked = any(
                    isinstance(side, (ast.Attribute, ast.Name)) and "constraint" in ast.unparse(side) for side in sides
                )
                if {"soft", "hard"} & set(map(str, values)) or asked and "none" in values:
                    found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert not found


@pytest.mark.parametrize("constraint", FITTED)
def test_a_configuration_knows_what_the_null_space_does(constraint):
    space, asked = fitted(constraint, strength=0.3, energy=0.97), CONSTRAINTS[constraint]
    assert space.acts == asked.acts
    if asked.knob is not None:  # Stricter or not, it is this setting that says so.
        other = fitted(constraint, **{"strength": 0.3, "energy": 0.97, asked.knob: 0.5})
        assert other.free_dimensions != space.free_dimensions
    config = SpaceLoraConfig(constraint=constraint, max_rank="auto")
    assert (config.rank_limit(64) is not None) == asked.capped


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("constraint", [name for name, kind in FITTED.items() if kind.worst_case is not None])
def test_the_worst_case_is_none_of_any_spectrum(constraint, spectrum):
    space = fitted(constraint, spectrum, strength=0.3, energy=0.97)
    assert space.bound() <= FITTED[constraint].worst_case(space) * (1 + 1e-6)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("constraint", FITTED)
def test_what_a_plan_foresees_is_what_a_fit_has(constraint, spectrum):
    space = fitted(constraint, spectrum, strength=0.3, energy=0.97)
    most = most_columns(constraint, None, DIM)
    assert (space.rank <= most) or not FITTED[constraint].foreseen


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("constraint", FITTED)
def test_what_a_projection_can_do_is_what_its_matrix_can(constraint, spectrum):
    space = fitted(constraint, spectrum, strength=0.3, energy=0.97)
    matrix = space.project(torch.eye(DIM, dtype=torch.float64))
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert (matrix - matrix.T).abs().max() < 1e-6 and values.min() > -1e-6 and values.max() < 1 + 1e-6
    assert space.acts == bool((matrix - torch.eye(DIM)).abs().max() > 1e-6)
    assert space.idempotent == bool((matrix @ matrix - matrix).abs().max() < 1e-5)
    assert space.invertible == bool(values.min() > 1e-6)
    assert space.free_dimensions == pytest.approx(float(values.sum()), abs=1e-4)
    x = torch.randn(3, DIM, dtype=torch.float64)
    if space.invertible:
        torch.testing.assert_close(space.unproject(space.project(x)), x, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match=f"the {constraint} constraint removes directions"):
            space.unproject(x)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("constraint", FITTED)
def test_a_stored_filter_is_known_as_its_own(constraint, spectrum):
    space = fitted(constraint, spectrum, strength=0.3, energy=0.97)
    assert FITTED[constraint].made(space)
    for changed in (
        dataclasses.replace(space, outside=1.5),
        dataclasses.replace(space, filters=space.filters + 0.1) if len(space.filters) else None,
    ):
        assert changed is None or not FITTED[constraint].made(changed)


def test_no_constraint_that_acts_is_taken_for_another():
    spaces = {name: fitted(name, strength=0.3, energy=0.97) for name in FITTED}
    made = {(name, other): FITTED[other].made(space) for name, space in spaces.items() for other in FITTED}
    # The identity is also what the others make of an adapter that they leave alone.
    right = {pair for pair, right in made.items() if right and spaces[pair[0]].acts}
    assert right == {(name, name) for name in FITTED if spaces[name].acts}
