"""The figures of `benchmarks/compare.py`: hypervolume, the chosen settings, the split of the images."""

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import compare  # noqa: E402
from compare_parts import images, methods, pages, recipes, search, tables  # noqa: E402


ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "compare.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("seed", range(3))
def test_a_concept_counts_once_in_the_curve_however_many_runs_it_has(seed):
    forget = np.random.default_rng(seed).random(4)
    rows = [row("a", {}, name, value, 0.99) for name, value in zip(("owl", "owl", "owl", "fox"), forget)]
    curve = tables.mean_curve(rows)
    assert [point["scale"] for point in curve] == [0.0, 1.0] and curve[0]["forget"] == pytest.approx(1.0)
    assert curve[1]["forget"] == pytest.approx((forget[:3].mean() + forget[3]) / 2)


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


def test_a_difference_of_hypervolumes_is_paired():
    """Concepts differ far more than the methods do; drawn for both alike, they cancel."""
    names = [f"concept {i}" for i in range(12)]
    hard = np.linspace(0, 0.9, len(names))
    first = [row("a", {}, name, 0.8 * h, 0.99) for name, h in zip(names, hard)]
    second = [row("b", {}, name, 0.8 * h + 0.01, 0.99) for name, h in zip(names, hard)]
    found = tables.hypervolume_difference(first, second + [row("b", {}, "only here", 0.0, 1.0)])
    low, high = tables.hypervolume_interval(first)
    assert found["mean"] == pytest.approx(0.01 * 0.9, abs=1e-4) and high - low > 0.1
    assert 0 < found["ci95"][0] <= found["mean"] <= found["ci95"][1] < 0.02
    assert tables.hypervolume_difference(first, first) == {"mean": 0.0, "ci95": [0.0, 0.0]}


def row(method, settings, concept, forget, retain):
    curve = [
        {"scale": scale, "forget": 1 - scale * (1 - forget), "retain_all": 1 - scale * (1 - retain),
         "name_log_prob": 0.0, "divergence": 0.0}
        for scale in (0.0, 1.0)
    ]  # fmt: skip
    return {"method": method, "settings": settings, "concept": concept, "seed": 0, "curve": curve}


def test_the_settings_with_the_largest_hypervolume_on_validation_concepts_are_chosen():
    good, bad, *_ = methods.METHODS["GradDiff"].settings()
    rows = [row("GradDiff", bad, c, 0.5, 0.99) for c in images.VALIDATION]
    rows += [row("GradDiff", good, c, 0.1, 0.98) for c in images.VALIDATION]
    # Test concepts must not decide.
    rows += [row("GradDiff", bad, c, 0.0, 1.0) for c in images.TEST]
    assert search.choose(rows, ["GradDiff"]) == {"GradDiff": good}


def test_the_best_two_on_the_first_validation_concept_go_on():
    settings = methods.METHODS["GradDiff"].settings()
    first = images.VALIDATION[0]
    rows = [row("GradDiff", each, first, 0.1, retain) for each, retain in zip(settings, (0.95, 0.99, 0.99, 0.98, 0.96))]
    # The third's run is the same as the second's: it would take a place and tell nothing new.
    assert search.finalists(rows, "GradDiff") == [settings[1], settings[3]]
    # Nor do concepts count that only finalists see, or other methods.
    rows += [row("GradDiff", settings[0], images.VALIDATION[1], 0.0, 1.0), row("GA", settings[0], first, 0.0, 1.0)]
    assert search.finalists(rows, "GradDiff") == [settings[1], settings[3]]


def test_settings_tried_on_fewer_concepts_are_not_chosen():
    dropped, tried, *_ = methods.METHODS["GradDiff"].settings()
    rows = [row("GradDiff", tried, concept, 0.2, 0.97) for concept in images.VALIDATION]
    rows.append(row("GradDiff", dropped, images.VALIDATION[0], 0.0, 1.0))
    assert search.choose(rows, ["GradDiff"]) == {"GradDiff": tried}


def test_the_learning_rate_beyond_the_range_may_be_chosen():
    first, *_ = methods.METHODS["GradDiff"].settings()
    rates = methods.METHODS["GradDiff"].knobs["learning_rate"]
    assert search.beyond("GradDiff", {**first, "learning_rate": min(rates)})["learning_rate"] == min(rates) / 2
    outside = search.beyond("GradDiff", {**first, "learning_rate": max(rates)})
    assert outside == {**first, "learning_rate": 2 * max(rates)} and outside in search.candidates("GradDiff")
    rows = [row("GradDiff", first, concept, 0.1, 0.98) for concept in images.VALIDATION]
    rows += [row("GradDiff", outside, concept, 0.1, 0.99) for concept in images.VALIDATION]
    assert search.choose(rows, ["GradDiff"]) == {"GradDiff": outside}
    assert search.beyond("closed form", {"strength": 1.0}) is None


def test_parts_are_tried_beside_the_whole_with_its_settings():
    chosen = {"NS-CVF": {"learning_rate": 0.1}}
    tasks = compare.parts_tasks(chosen, ["owl"])
    assert {task["method"] for task in tasks} == {"NS-CVF", "NS-CVF, no null space", "NS-CVF, projector alone"}
    assert all(task["settings"] == chosen["NS-CVF"] and task["probes"] for task in tasks)


def test_features_are_measured_where_an_adapter_of_ours_moves_them():
    chosen = {"SPACE": {"learning_rate": 0.1}, "MMUnlearner": {"learning_rate": 0.1}}
    asked = {task["method"] for task in compare.parts_tasks(chosen, ["owl"]) if task["features"]}
    assert asked == {name for name in methods.VARIANTS if methods.VARIANTS[name].fixed.get("target") == "all"}


def test_a_run_is_finished_when_all_that_is_asked_for_was_measured():
    task = {"method": "SPACE, all layers", "probes": True, "depth": False, "features": True}
    row = {**task, "scores": {"forget": 0.0}}
    assert not compare.finished(row, task)
    row["entropy"] = {"target": [1.0, 1.1]}
    assert compare.finished(row, task)
    attacked = {**task, "depth": True}
    assert not compare.finished(row, attacked) and compare.finished({**row, "depth": {"audit": 0.0}}, attacked)


@pytest.mark.parametrize("seed", range(3))
def test_entropy_before_and_after_is_averaged_over_runs(seed):
    values = np.random.default_rng(seed).random((4, 2, 2))
    rows = [
        {**row("a", {}, "owl", 0.1, 0.99), "steps": 1, "seconds": {"erase": 1.0},
         "entropy": dict(zip(("target", "others"), own.tolist()))}
        for own in values
    ]  # fmt: skip
    mean = values.mean(axis=0)
    assert np.allclose(list(tables.summarise(rows, {})["entropy"].values()), mean, atol=1e-4)
    line = tables.entropy_table({"a": tables.summarise(rows, {})}).splitlines()[-1]
    assert line == f"| a | {mean[0, 1]:.3f} ({mean[0, 0]:.3f}) | {mean[1, 1]:.3f} ({mean[1, 0]:.3f}) |"
    assert tables.summarise([{k: v for k, v in r.items() if k != "entropy"} for r in rows], {})["entropy"] is None


def test_parts_are_compared_on_the_concepts_that_all_have():
    settings = {"learning_rate": 0.1}
    names = ["NS-CVF", "NS-CVF, no null space", "NS-CVF, projector alone"]
    common = {"scores": {}, "steps": 1, "seconds": {"erase": 1.0}}
    rows = [{**row(name, settings, concept, 0.1, 0.99), **common} for name in names for concept in ("owl", "shark")]
    found = compare.parts(rows[:-1], {"NS-CVF": settings})  # The last one has not seen the shark.
    assert list(found) == names and {summary["concepts"] for summary in found.values()} == {1}
    assert compare.parts(rows[:4], {"NS-CVF": settings}) == {}


def test_blocks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    text = "before\n<!-- a: begin (made by x) -->\nold\n<!-- a: end -->\nbetween\n<!-- b: begin -->\n<!-- b: end -->\nafter\n"
    page.write_text(text)
    pages.write_blocks(page, {"a": "| new \\1 |", "b": "2"})
    written = text.replace("old", "| new \\1 |").replace("begin -->\n<!-- b", "begin -->\n2\n<!-- b")
    assert page.read_text() == written
    with pytest.raises(ValueError, match="`c: begin`"):
        pages.write_blocks(page, {"a": "3", "c": "4"})
    assert page.read_text() == written


@pytest.mark.parametrize("page, name", [(page, name) for page, names in compare.PAGES.items() for name in names])
def test_pages_show_the_results_that_are_stored(page, name):
    text = (ROOT / page).read_text(encoding="utf-8")
    block = re.search(rf"<!-- {name}: begin[^>]*-->\n(.*?)\n<!-- {name}: end -->", text, flags=re.DOTALL)
    demo = json.loads((ROOT / "benchmarks" / "results" / "erase_demo.json").read_text(encoding="utf-8"))
    assert block[1] == {**tables.tables(RESULTS), "demo": tables.demo_table(demo)}[name]


def test_the_stored_summary_is_that_of_the_stored_runs():
    made = json.loads(json.dumps(compare.report(RESULTS["rows"], list(methods.METHODS), RESULTS["earlier"])))
    for key in ("chosen", "families", "methods", "hypervolume_above", "parts", "longer"):
        assert made[key] == RESULTS[key]


def test_the_stored_runs_were_made_as_they_would_be_made_today():
    """A changed default of the library, or of the bench, makes other runs; they must not be averaged with the stored."""
    assert RESULTS["recipes"] == recipes.check_recipes(RESULTS["recipes"])
    assert set(RESULTS["recipes"]) == {*methods.METHODS, *methods.VARIANTS}


def test_runs_made_with_other_values_are_refused():
    own = recipes.recipe("NS-CVF")
    # What the search chooses is in each run's settings; what is left to the library is not.
    assert not set(own["training"]) & set(methods.METHODS["NS-CVF"].knobs)
    assert own["training"]["temperature"] == 0.1 and own["adapter"]["strength"] == 1.0 and own["adapter"]["r"] == 8
    recipes.check_recipes({"NS-CVF": own, "one that is no more": {"adapter": {"r": 1}}})
    with pytest.raises(ValueError, match=r"'NS-CVF' were made with adapter.strength = 0.3, it is 1.0 now"):
        recipes.check_recipes({"NS-CVF": {**own, "adapter": {**own["adapter"], "strength": 0.3}}})
    # "auto" was another number of eigenvectors when recipes did not say which.
    before = {key: value for key, value in own["adapter"].items() if key != "auto_rank"}
    with pytest.raises(ValueError, match=r"adapter.auto_rank = None, it is 'd / 4' now"):
        recipes.check_recipes({"NS-CVF": {**own, "adapter": before}})
    fewer = {key: value for key, value in own["training"].items() if key != "temperature"}
    with pytest.raises(ValueError, match=r"training.temperature = None, it is 0.1 now"):
        recipes.check_recipes({"NS-CVF": {**own, "training": fewer}})


@pytest.mark.parametrize(
    "interval, words", [((0.01, 0.03), "ahead of"), ((-0.01, 0.03), "level with"), ((-0.03, -0.01), "behind")]
)
def test_the_page_claims_no_lead_that_the_interval_does_not_show(interval, words):
    names = {"SPACE": (False, 0.95), "closed form": (False, 0.99), "GA": (True, 0.8), "NPO": (True, 0.9)}
    results = {
        "methods": {
            name: {"sees_images": sees, "hypervolume": volume, "at_retain_0985": {"forget": 0.1},
                   "divergence_at_p_001": {"mean": 0.01}}
            for name, (sees, volume) in names.items()
        },
        "hypervolume_above": {
            "closed form": {"mean": 0.5, "ci95": (0.4, 0.6)}, "GA": {"mean": 0.5, "ci95": (0.4, 0.6)},
            "NPO": {"mean": sum(interval) / 2, "ci95": interval},
        },
    }  # fmt: skip
    text = tables.lead(results).replace("\n", " ")
    size = "larger by 0.0" if sum(interval) > 0 else "smaller by 0.0"
    assert f"It is {words} the best method that does, NPO.**" in text and size in text
    assert text.endswith(" Beside the others, SPACE is ahead of closed form, GA.")


def test_relearning_after_five_steps_is_that_of_the_adapter():
    curves = {"all": [[0, 0.0, 0.0], [5, 0.9, 0.8]], "adapter": [[0, 0.0, 0.0], [5, 0.3, 0.2], [10, 1.0, 1.0]]}
    flat = tables.flat_depth({"concept": "owl", "depth": {"relearn_adapter": 1.0, "curves": curves}})
    assert (flat["relearn_adapter_5"], flat["relearn_adapter_5_control"], flat["relearn_adapter"]) == (0.3, 0.2, 1.0)


def test_point_at_a_retention():
    curve = [
        {"scale": 0.0, "forget": 1.0, "retain_all": 1.0},
        {"scale": 1.0, "forget": 0.2, "retain_all": 0.99},
        {"scale": 2.0, "forget": 0.0, "retain_all": 0.97},
    ]
    assert tables.at_retention(curve, 0.985)["scale"] == 1.0
    assert tables.at_retention(curve, 0.95)["scale"] == 2.0
    assert tables.at_retention(curve, 0.995)["scale"] == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_divergence_at_a_probability(seed):
    slope, height = np.random.default_rng(seed).random(2) + [8, 0.1]
    scales = (0.0, 0.2, 0.4, 0.7, 1.0)
    curve = [{"name_log_prob": -slope * s, "divergence": height * s**2} for s in scales]
    for probability in (0.5, 0.05, 0.001):
        scale = -np.log(probability) / slope
        assert tables.divergence_at(curve, probability) == pytest.approx(height * scale**2)
    assert tables.divergence_at(curve, np.exp(-slope - 1)) is None


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
