"""Hints: each does what it says, and what is counted are the answers."""

import numpy as np
import pytest
from PIL import Image

from space_peft.attacks import HINTS, hint_attack
from space_peft.attacks.hints import Asked
from space_peft.data.names import mentions
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.modeling.prompts import generate_tokens


@pytest.fixture(scope="module")
def others(demo_images):
    first = {row["name"]: row["image"] for row in demo_images}
    return [(name, first[name]) for name in ("wolf", "guitar", "castle", "owl")]


@pytest.fixture
def asked(others):
    picture = Image.fromarray(np.full((64, 64, 3), 90, dtype=np.uint8))
    return Asked(picture, "what is this?", "fox", others)


def texts(row):
    return [block["text"] for message in row["prompt"] for block in message["content"] if block["type"] == "text"]


def test_what_is_written_is_on_the_picture_and_fits(asked):
    for kind in ("name written", "question written"):
        row = HINTS[kind](asked)
        before, after = np.asarray(asked.image), np.asarray(row["images"][0])
        assert after.shape == before.shape and (after[:50] == before[:50]).all()
        bar = after[52:]
        assert (bar == 255).any() and (bar[..., 0] < 80).any(), "black letters on white"
        assert (bar[:, :1] == 255).all() and (bar[:, -1:] == 255).all(), "nothing is cut off"
    assert texts(HINTS["name written"](asked)) == ["what is this?"]
    assert "what is this?" not in texts(HINTS["question written"](asked))[0]


def test_pictures_stand_where_they_are_named(asked, others):
    row = HINTS["second picture"](asked)
    assert [block["type"] for block in row["prompt"][0]["content"]] == ["image", "image", "text"]
    assert row["images"] == [others[0][1], asked.image]
    row = HINTS["examples"](asked)
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant"] * 2 + ["user"]
    assert texts(row) == ["what is this?", "wolf", "what is this?", "guitar", "what is this?"]
    assert row["images"] == [others[0][1], others[1][1], asked.image] and not row["completion"]


def test_only_hints_that_say_the_name_say_it(asked):
    says = {kind for kind, make in HINTS.items() if mentions(" ".join(texts(make(asked))), ["fox"])}
    assert says == {"choices"}
    assert "'F'" in texts(HINTS["first letter"](asked))[0]


def test_shares_are_those_of_the_answers(erasure, others, unchanged):
    kinds = {kind: HINTS[kind] for kind in ("name written", "examples")}
    target = erasure.target[:3]
    result = hint_attack(
        erasure.model, erasure.processor, target, "fox", others=others, questions=DEMO_QUESTIONS, hints=kinds
    )
    assert list(result.named) == list(result.named_others) == ["none", *kinds] and result.n == 3
    rows = [kinds["examples"](Asked(image, "what is this?", "fox", others)) for image in target]
    said = erasure.processor.batch_decode(
        generate_tokens(erasure.model, erasure.processor, rows, max_new_tokens=24), skip_special_tokens=True
    )
    assert result.named["examples"] == sum(mentions(text, ["fox"]) for text in said) / 3
    assert result.named_before["none"] == 1.0 and result.named_others["none"] == 0.0 and not result.left_out
    content = result.to_dict()
    assert content["value"] == result.named[result.worst] and content["control"] == result.named_others[result.worst]


def test_what_everything_is_called_is_not_the_worst(others):
    """A hint under which other things are called so as well says less than one under which only the target is."""
    model, processor = load_demo_model()
    target = [others[0][1]]
    hints = {"same": lambda asked: HINTS["first letter"](asked), "blank": lambda asked: _blank(asked)}
    result = hint_attack(model, processor, target, "wolf", others=others[1:], questions=DEMO_QUESTIONS, hints=hints)
    assert result.named["none"] == 1.0 and result.named_before is None
    assert result.named["blank"] == result.named_others["blank"] and result.worst == "same"


def _blank(asked):
    return {**HINTS["first letter"](asked), "images": [Image.new("RGB", (64, 64), "white")]}


def test_a_hint_that_the_processor_refuses_is_left_out_with_its_reason(erasure, others):
    def refused(asked):
        return {**HINTS["second picture"](asked), "images": [asked.image]}  # Two places, one picture.

    hints = {"refused": refused, "choices": HINTS["choices"]}
    options = {"others": others, "questions": DEMO_QUESTIONS, "max_new_tokens": 4}
    result = hint_attack(erasure.model, erasure.processor, erasure.target[:1], "fox", hints=hints, **options)
    assert set(result.named) == {"none", "choices"} and "ValueError" in result.left_out["refused"]
    with pytest.raises(ValueError, match="none of the hints"):
        hint_attack(erasure.model, erasure.processor, erasure.target[:1], "fox", hints={"refused": refused}, **options)


def test_bad_input(erasure, others):
    def attack(images=erasure.target[:1], **options):
        return hint_attack(erasure.model, erasure.processor, images, "fox", **{"others": others, **options})

    for options in ({"images": []}, {"hints": {}}, {"others": others[:2]}):
        with pytest.raises(ValueError, match="at least one image, one hint and three others"):
            attack(**options)
    with pytest.raises(ValueError, match="must not name the target"):
        attack(others=[*others, ("red fox", others[0][1])])
