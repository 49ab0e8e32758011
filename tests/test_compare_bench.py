"""The figures of `benchmarks/compare.py`: hypervolume, the chosen settings, the split of the images."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import compare  # noqa: E402
from compare_parts import images, methods, tables  # noqa: E402


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_the_dominated_area(seed):
    generator = np.random.default_rng(seed)
    points = np.stack([generator.random(6), 0.85 + 0.15 * generator.random(6)], axis=1)
    samples = generator.random((200_000, 2)) * [1, 0.1] + [0, 0.9]
    dominated = np.zeros(len(samples), bool)
    for forget, retain in points:
        dominated |= (samples[:, 0] >= forget) & (samples[:, 1] <= retain)
    assert tables.hypervolume([tuple(p) for p in points]) == pytest.approx(dominated.mean(), abs=4e-3)


def test_hypervolume_bounds():
    assert tables.hypervolume([(0.0, 1.0)]) == pytest.approx(1.0)
    # The unerased model, and one that forgot by breaking, dominate nothing.
    assert tables.hypervolume([(1.0, 1.0), (0.0, 0.5)]) == 0.0
    assert tables.hypervolume([(0.5, 0.95)]) == pytest.approx(0.25)


def row(method, settings, concept, forget, retain):
    curve = [
        {"scale": scale, "forget": 1 - scale * (1 - forget), "retain_all": 1 - scale * (1 - retain)}
        for scale in (0.0, 1.0)
    ]
    return {"method": method, "settings": settings, "concept": concept, "seed": 0, "curve": curve}


def test_the_settings_with_the_largest_hypervolume_on_validation_concepts_are_chosen():
    good, bad, *_ = methods.METHODS["GradDiff"].settings()
    rows = [row("GradDiff", bad, c, 0.5, 0.99) for c in images.VALIDATION]
    rows += [row("GradDiff", good, c, 0.1, 0.98) for c in images.VALIDATION]
    # Test concepts must not decide.
    rows += [row("GradDiff", bad, c, 0.0, 1.0) for c in images.TEST]
    assert compare.choose(rows, ["GradDiff"]) == {"GradDiff": good}


def test_point_at_a_retention():
    curve = [
        {"scale": 0.0, "forget": 1.0, "retain_all": 1.0},
        {"scale": 1.0, "forget": 0.2, "retain_all": 0.99},
        {"scale": 2.0, "forget": 0.0, "retain_all": 0.97},
    ]
    assert tables.at_retention(curve, 0.985)["scale"] == 1.0
    assert tables.at_retention(curve, 0.95)["scale"] == 2.0
    assert tables.at_retention(curve, 0.995)["scale"] == 0.0


def test_seeds_of_a_concept_count_once():
    rows = [{"concept": "owl", "x": 0.0}] * 9 + [{"concept": "shark", "x": 1.0}]
    assert tables.over_concepts(rows, lambda r: r["x"])["mean"] == 0.5


def test_every_method_may_choose_from_as_many_settings():
    counts = {name: len(method.settings()) for name, method in methods.METHODS.items()}
    assert set(counts.values()) == {8}, counts
    assert not set(images.TEST) & set(images.VALIDATION) and len(images.TEST) >= 16


@pytest.mark.parametrize("concept, seed", list(itertools.product(("owl", "fox"), range(3))))
def test_no_method_is_measured_on_an_image_it_was_given(concept, seed):
    data = images.concept_data(concept, seed)

    def pixels(pictures):
        return {picture.tobytes() for picture in pictures}

    given, unseen = pixels(data.given), pixels(data.unseen)
    assert given and unseen and not given & unseen
    assert not given & pixels(data.probe_images["image"])
    assert concept not in {name for _, name in data.others} and len(data.others) == len(data.is_sibling)
    assert any(data.is_unseen_style) and any(data.is_sibling)
    # The design that is held out goes round with the seed.
    assert len({frozenset(pixels(images.concept_data(concept, s).unseen)) for s in range(3)}) > 1
