"""Relearning: the erased name against names taught with the same budget."""

import copy
import math
from collections import Counter

import pytest
import torch
from rounding import PROBABILITY

from space_peft.anchors.refine import name_probabilities
from space_peft.attacks import relearning_curve
from space_peft.attacks.models import merged_copy
from space_peft.attacks.relearning import _subsets
from space_peft.demo import DEMO_QUESTIONS
from space_peft.modeling.prompts import build_batch


OTHERS = ("guitar", "castle")


def relearn(erasure, model=None, **options):
    defaults = {
        "other_names": OTHERS[:1], "questions": DEMO_QUESTIONS, "steps": (0, 6), "images_per_run": (3,), "repeats": 1,
        "progress": False,
    }  # fmt: skip
    model = erasure.model if model is None else model
    images = options.pop("images", erasure.target)
    held_out = options.pop("held_out_images", None)
    return relearning_curve(model, erasure.processor, images, held_out, erasure.concept, **{**defaults, **options})


def test_the_control_is_taught_the_same_way(erasure):
    """Swapping the concept and the other name swaps the two curves: nothing favours either."""
    model = merged_copy(erasure.model)
    fox = relearn(erasure, model, other_names=["guitar"])
    guitar = relearning_curve(
        model, erasure.processor, erasure.target, None, "guitar", other_names=["fox"], questions=DEMO_QUESTIONS,
        steps=(0, 6), images_per_run=(3,), repeats=1, progress=False,
    )  # fmt: skip
    for a, b in zip(fox.points, guitar.points, strict=True):
        assert (a.relearned, a.p_relearned) == (b.control, b.p_control)
        assert (a.control, a.p_control) == (b.relearned, b.p_relearned)
    assert fox.points[1].p_control > 5 * fox.points[0].p_control, "six steps teach something"


@pytest.mark.parametrize("weights", ["all", "lora", "adapter"])
def test_every_run_starts_from_the_erased_model(erasure, unchanged, weights):
    result = relearn(erasure, weights=weights, repeats=2, steps=(0, 3), learning_rate=1e-3)
    start, end = result.points
    p = name_probabilities(erasure.model, erasure.processor, erasure.target, "what is this?", "fox")
    unseen = [p[i] for chosen in _subsets(len(p), 3, 2, seed=0) for i in range(len(p)) if i not in chosen]
    assert start.p_relearned == pytest.approx(sum(unseen) / len(unseen), abs=PROBABILITY)
    assert end.p_control > start.p_control
    assert result.named_before == 1.0


def test_steps_are_those_of_adamw(erasure):
    """Against a loop of one's own, on the merged model: all weights, one batch, constant learning rate."""
    result = relearn(erasure, images=erasure.target[:2], held_out_images=erasure.target[2:], images_per_run=(2,),
                     steps=(4,), learning_rate=1e-4)  # fmt: skip
    model = merged_copy(erasure.model).requires_grad_(True)
    batch = build_batch(erasure.processor, ["what is this?"] * 2, images=erasure.target[:2], answers=["fox"] * 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    p = name_probabilities(model, erasure.processor, erasure.target[2:], "what is this?", "fox")
    assert result.at(images=2, steps=4).p_relearned == pytest.approx(sum(p) / len(p), abs=1e-4)
    assert result.at(images=2, steps=4).n == len(erasure.target) - 2


def test_more_steps_teach_more_and_results_repeat(erasure):
    first, second = (relearn(erasure, steps=(0, 2, 8), learning_rate=1e-4) for _ in range(2))
    assert first == second
    p = [point.p_control for point in first.points]
    assert p == sorted(p) and p[-1] > p[0] + 0.1
    assert first.points[-1].excess == first.points[-1].relearned - first.points[-1].control


@pytest.mark.slow
def test_controls_are_averaged(erasure):
    alone = [relearn(erasure, other_names=[name]) for name in OTHERS]
    both = relearn(erasure, other_names=OTHERS)
    for a, b, mean in zip(alone[0].points, alone[1].points, both.points, strict=True):
        assert mean.p_control == pytest.approx((a.p_control + b.p_control) / 2, abs=1e-6)
        assert mean.control == pytest.approx((a.control + b.control) / 2)
        assert mean.p_relearned == pytest.approx(a.p_relearned, abs=1e-6)


def test_images_are_left_out_equally_often():
    for total, count in ((4, 3), (7, 2)):
        chosen = list(_subsets(total, count, 2 * total, seed=3))
        assert all(len(set(subset)) == count for subset in chosen)
        assert set(Counter(i for subset in chosen for i in subset).values()) == {2 * count}
        assert len({frozenset(subset) for subset in chosen[:total]}) == total
    assert list(_subsets(5, 2, 3, seed=0)) != list(_subsets(5, 2, 3, seed=1))


@pytest.mark.slow
def test_summary_is_the_point_at_ten_steps_and_three_images(erasure):
    result = relearn(erasure, steps=(0, 5), images_per_run=(1, 3), repeats=2)
    content = result.to_dict()
    point = result.at(images=3, steps=5)
    assert (content["value"], content["control"], content["n"]) == (point.relearned, point.control, point.n)
    assert content["before"] == 1.0 and "5 fine-tuning steps on 3 images" in content["meaning"]
    assert [p["excess"] for p in content["details"]["points"]] == [p.excess for p in result.points]
    assert all(math.isfinite(p.stderr) for p in result.points)
    with pytest.raises(KeyError, match=r"measured \(images, steps\): \(1, 0\)"):
        result.at(images=2, steps=5)


def test_a_model_without_adapter_has_no_before(erasure):
    model = copy.deepcopy(erasure.model).merge_and_unload()
    assert relearn(erasure, model, steps=(0,)).named_before is None
    with pytest.raises(ValueError, match="has none; use 'all' or 'lora'"):
        relearn(erasure, model, weights="adapter")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"other_names": []}, "there is no control"),
        ({"other_names": ["red fox"]}, "must not name the target"),
        ({"images_per_run": (4,)}, "one must be left to ask about"),
        ({"held_out_images": []}, "pass None"),
        ({"steps": (-1, 2)}, "0 or more"),
        ({"steps": ()}, "0 or more"),
        ({"images_per_run": (0,)}, "at least 1"),
        ({"repeats": 0}, "`repeats`"),
        ({"learning_rate": 0.0}, "`learning_rate`"),
        ({"weights": "some"}, "must be one of"),
    ],
)
def test_bad_input(erasure, options, message):
    with pytest.raises(ValueError, match=message):
        relearn(erasure, **options)


def test_a_single_string_is_no_list_of_names(erasure):
    with pytest.raises(TypeError, match="`other_names` .* the string 'guitar'"):
        relearn(erasure, other_names="guitar")
