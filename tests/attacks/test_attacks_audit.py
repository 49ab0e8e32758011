"""The audit finds an image for what the model knows, and says what it did."""

import pytest
import torch
from architectures import build
from peft import LoraConfig, get_peft_model
from PIL import Image
from rounding import PROBABILITY

from space_peft.anchors.refine import name_probabilities
from space_peft.attacks import audit_concept
from space_peft.data.names import mentions
from space_peft.data.questions import QuestionSet
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.modeling.prompts import generate_answers


def audit(model, processor, concept="fox", **options):
    defaults = {"questions": DEMO_QUESTIONS, "noise_size": 64, "progress": False}
    return audit_concept(model, processor, concept, **{**defaults, **options})


@pytest.fixture(scope="module")
def searched(erasure):
    """One audit that several tests look at."""
    return audit(
        erasure.model, erasure.processor, images=erasure.others[:4], restarts=1, steps=30, control_name="animal"
    )


def test_what_the_model_knows_is_found_and_what_is_erased_is_not(searched):
    assert searched.before.best >= 0.9
    assert searched.after.best <= 0.5 * searched.before.best
    assert searched.starts == ("image",) * 4 + ("noise",)


def test_p_is_that_of_the_stored_images(searched, erasure):
    p = name_probabilities(erasure.model, erasure.processor, list(searched.after.images), "what is this?", "fox")
    assert searched.after.p == pytest.approx(p, abs=PROBABILITY) and searched.after.best == max(searched.after.p)
    with erasure.model.disable_adapter():
        p = name_probabilities(erasure.model, erasure.processor, list(searched.before.images), "what is this?", "fox")
    assert searched.before.p == pytest.approx(p, abs=PROBABILITY)


def test_steps_to_half_agree_with_the_curve(searched):
    for search in (searched.after, searched.before, searched.control):
        assert list(search.curve) == sorted(search.curve) and len(search.curve) == 30
        first = next((step for step, p in enumerate(search.curve) if p >= 0.5), None)
        reached = [step for step in search.steps_to_half if step is not None]
        assert (min(reached) if reached else None) == first
    assert any(step is not None for step in searched.before.steps_to_half)


def test_the_model_is_left_alone_and_results_repeat(erasure, unchanged):
    options = {"images": erasure.others[:2], "restarts": 1, "steps": 3}
    first, second = (audit(erasure.model, erasure.processor, **options) for _ in range(2))
    assert first == second
    assert audit(erasure.model, erasure.processor, seed=1, **options).after.p != first.after.p
    assert all(parameter.grad is None for parameter in erasure.model.get_base_model().parameters())


def test_before_and_after_are_the_same_search(erasure):
    """With an adapter that changes nothing, both find the same; so does the bare model, which has no before."""
    model, processor = load_demo_model()
    bare = audit(model, processor, images=erasure.others[:2], restarts=1, steps=4)
    assert bare.before is None and bare.control is None
    idle = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    result = audit(idle, processor, images=erasure.others[:2], restarts=1, steps=4)
    assert result.before == result.after == bare.after


def test_more_steps_find_more(erasure):
    model, processor = load_demo_model()
    few, many = (audit(model, processor, images=erasure.others[:2], restarts=0, steps=steps).after for steps in (1, 25))
    assert many.best > few.best + 0.5 and many.curve[0] == pytest.approx(few.curve[0], abs=PROBABILITY)


@pytest.mark.slow
def test_without_shifts_any_word_is_found(erasure):
    """Why the search shifts images, and why it needs a control: adversarial noise says "the", too."""
    model, processor = load_demo_model()
    options = {"images": erasure.others[:1], "restarts": 0, "steps": 50}
    noise, shifted = (audit(model, processor, "the", max_shift=shift, **options).after for shift in (0.0, 0.0625))
    assert noise.best > 0.3 and noise.best > 10 * shifted.best


def test_summary(searched):
    content = searched.to_dict()
    assert (content["value"], content["before"]) == (searched.after.best, searched.before.best)
    assert content["control"] == searched.control.best and content["n"] == 5
    assert "30 steps" in content["meaning"] and "fox" not in content["meaning"]
    assert "images" not in content["details"]["after"]


def test_another_architecture():
    model, processor = build("qwen2_5_vl")
    questions = QuestionSet(naming=("What is this?",), naming_held_out=(), confirm=(), confirm_held_out=())
    image = Image.new("RGB", (44, 20), "red")
    result = audit(model, processor, "wolf", images=[image], restarts=1, noise_size=20, steps=3, questions=questions)
    assert len(result.after.p) == 2 and all(0 <= p <= 1 for p in result.after.p)
    assert [image.size for image in result.after.images] == [(32, 16), (16, 16)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"restarts": 0}, "nothing to start from: got 0 images and restarts=0"),
        ({"restarts": -1}, "restarts=-1"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"noise_size": 0}, "`noise_size`"),
        ({"control_name": "zyzzyva"}, "does not know 'zyzzyva'"),
        ({"concept": "  "}, "empty"),
    ],
)
def test_bad_input(erasure, options, message):
    with pytest.raises(ValueError, match=message):
        audit(erasure.model, erasure.processor, **options)


def test_gradients_that_are_off_stay_off(erasure):
    with torch.no_grad():
        audit(erasure.model, erasure.processor, restarts=1, steps=1)
        assert not torch.is_grad_enabled()


def test_an_image_counts_as_named_if_any_answer_says_it(searched, erasure):
    """In any form, and also in a sentence: both questions are asked about each image found."""
    asked = (DEMO_QUESTIONS.naming[0], DEMO_QUESTIONS.open[0])
    images = list(searched.before.images)
    n = len(images)
    with erasure.model.disable_adapter():
        # In one batch, as the audit asks: noise is named by a margin that another batch's rounding could turn.
        asked = [question for question in asked for _ in images]
        said = generate_answers(erasure.model, erasure.processor, asked, images=images * 2, max_new_tokens=32)
    expected = tuple(mentions(said[i], ["fox"]) or mentions(said[n + i], ["fox"]) for i in range(n))
    assert searched.before.named == expected and any(expected)
    assert sum(searched.after.named) <= sum(expected)
