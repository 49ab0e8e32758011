"""Retained rows without labels: the deployed model's own answers, resumable, and texts of any dataset."""

import json

import pytest
from datasets import Dataset

from space_peft import retained_answers, retained_texts
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.modeling.prompts import answer_text, generate_answers
from space_peft.retained import self_distillation
from space_peft.retained.reading import RetainedRows


ASKED = (*DEMO_QUESTIONS.naming[:1], *DEMO_QUESTIONS.open[:2])


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


@pytest.fixture(scope="module")
def pictures(demo_images):
    return demo_images.select([i for i, name in enumerate(demo_images["name"]) if name in ("fox", "owl")])


def test_answers_are_the_deployed_models_own(demo, pictures):
    rows = retained_answers(*demo, pictures, questions=ASKED, per_image=2, progress=False)
    assert len(rows) == 2 * len(pictures)
    asked = [ASKED[(2 * image + turn) % 3] for image in range(len(pictures)) for turn in range(2)]
    images = [image for image in pictures["image"] for _ in range(2)]
    expected = generate_answers(*demo, asked, images=images, max_new_tokens=32)
    assert [answer_text(row) for row in rows] == expected and len(set(expected)) > 4
    assert RetainedRows(rows)[0]["images"][0].size == pictures[0]["image"].size


def test_answers_that_name_the_target_are_left_out(demo, pictures):
    rows = retained_answers(*demo, list(pictures["image"]), questions=ASKED, names=["fox"], progress=False)
    assert 0 < len(rows) < 2 * len(pictures) and not any("fox" in answer_text(row) for row in rows)


def test_questions_in_words_alone(demo):
    rows = retained_answers(*demo, questions=["what kind of thing is a fox?"], progress=False)
    assert [answer_text(row) for row in rows] == ["mammal"] and rows[0]["images"] == []


def test_an_interrupted_call_goes_on(demo, pictures, tmp_path, monkeypatch):
    cache, options = tmp_path / "answers.jsonl", {"questions": ASKED, "batch_size": 4, "progress": False}
    whole = retained_answers(*demo, pictures, **options)
    asked, generate = [], self_distillation.generate_tokens

    def killed(model, processor, rows, **kwargs):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(rows))
        return generate(model, processor, rows, **kwargs)

    monkeypatch.setattr(self_distillation, "generate_tokens", killed)
    with pytest.raises(KeyboardInterrupt):
        retained_answers(*demo, pictures, cache=cache, **options)
    with open(cache, "a") as file:
        file.write('"half of a li')
    monkeypatch.setattr(self_distillation, "generate_tokens", generate)
    assert len(cache.read_text().splitlines()) == 1 + 8 + 1
    resumed = retained_answers(*demo, pictures, cache=cache, **options)
    assert [answer_text(row) for row in resumed] == [answer_text(row) for row in whole]
    monkeypatch.setattr(self_distillation, "generate_tokens", None)  # All is there: nothing is asked again.
    assert len(retained_answers(*demo, pictures, cache=cache, **options)) == len(whole)


def test_a_cache_of_something_else_is_refused(demo, pictures, tmp_path):
    cache = tmp_path / "answers.jsonl"
    retained_answers(*demo, pictures.select([0]), questions=ASKED, cache=cache, progress=False)
    with pytest.raises(ValueError, match="other questions"):
        retained_answers(*demo, pictures.select([0]), questions=ASKED[:2], cache=cache, progress=False)
    model, processor = load_demo_model()
    model.lm_head.weight.data.add_(1)
    with pytest.raises(ValueError, match="another model"):
        retained_answers(model, processor, pictures.select([0]), questions=ASKED, cache=cache, progress=False)
    cache.write_text("not JSON\n")
    with pytest.raises(ValueError, match="is not a cache of answers"):
        retained_answers(*demo, pictures.select([0]), questions=ASKED, cache=cache, progress=False)


def test_a_cache_of_other_pictures_is_refused(demo, demo_images, tmp_path):
    cache, options = tmp_path / "answers.jsonl", {"questions": ASKED[:1], "per_image": 1, "progress": False}
    pictures = list(demo_images.select(range(3))["image"])
    rows = retained_answers(*demo, pictures, cache=cache, **options)
    # As many of them: the answers would stand beside other pictures.
    with pytest.raises(ValueError, match="in answer 1, one about another picture than image 1 is now"):
        retained_answers(*demo, [pictures[0], pictures[2], pictures[1]], cache=cache, **options)
    assert len(retained_answers(*demo, pictures, cache=cache, **options)) == len(rows)
    model, processor = load_demo_model()
    # Any weight, not some of them.
    model.get_submodule("model.language_model.layers.1.self_attn.q_proj").weight.data[-1, -1] += 1
    with pytest.raises(ValueError, match="another model"):
        retained_answers(model, processor, pictures, cache=cache, **options)


def test_nothing_to_ask_is_refused(demo, pictures):
    for options, message in [
        ({"images": []}, "0 images"),
        ({"questions": ()}, "0 questions"),
        ({"images": pictures, "per_image": 0}, "per_image=0"),
        ({"images": Dataset.from_dict({"picture": [1]})}, "a column `image`"),
        ({"images": ["no image"]}, "image 0"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            retained_answers(*demo, **{"questions": ASKED, "progress": False, **options})


def test_texts_become_rows():
    words = [f"w{i}" for i in range(100)]
    rows = retained_texts(["too short", " ".join(words)], beginning=10, longest=20)
    assert len(rows) == 1 and json.dumps(rows[0]["prompt"]).endswith('w8 w9"}]}]')
    assert answer_text(rows[0]) == " ".join(words[10:30])
    for texts, options, error in [
        (["a b"], {}, "no text has more than 12 words"),
        ([1], {}, "text 0 is a int"),
        (["a"], {"prompt": "x"}, "field"),
    ]:
        with pytest.raises((ValueError, TypeError), match=error):
            retained_texts(texts, **options)
