"""Encoding conversations for the embedded model: what is padded, what is masked, what the logits mean."""

import numpy as np
import pytest
import torch
from PIL import Image

from space_peft.features import pool_features, tap_image_features
from space_peft.losses import answer_labels, token_log_probs
from space_peft.prompts import (
    IGNORE_INDEX,
    answer_columns,
    build_batch,
    conversation,
    encode_conversations,
    generate_answers,
    load_rgb,
    name_tokens,
)


@pytest.fixture(scope="module")
def demo():
    from space_peft.demo import load_demo_model

    return load_demo_model()


def test_labels_are_the_answer_and_its_end(demo, demo_images):
    _, processor = demo
    answers = ["fox", "birthday cake", "ice cream"]
    batch = build_batch(processor, ["what is this?"] * 3, images=demo_images["image"][:3], answers=answers)
    labels = answer_labels(batch["labels"])
    assert labels.shape[1] == 3  # two words and the end of the turn
    for row, answer in zip(labels, answers):
        assert processor.tokenizer.decode(row[row != IGNORE_INDEX], skip_special_tokens=True).strip() == answer
        assert row[row != IGNORE_INDEX][-1] == processor.tokenizer.eos_token_id
    names = name_tokens(labels, processor.tokenizer)
    assert (names != IGNORE_INDEX).sum(dim=1).tolist() == [1, 2, 2]


def test_a_row_does_not_depend_on_what_it_is_batched_with(demo, demo_images):
    model, processor = demo
    image = demo_images[0]["image"]
    rows = [
        conversation("what is this?", answer="fox", image=image),
        conversation("is this a alarm clock?", answer="no", image=image),
        conversation("what kind of thing is a birthday cake?", answer="sweet"),
    ]
    with torch.no_grad():

        def log_probs(batch):
            labels = batch.pop("labels")
            logits = model(**batch, logits_to_keep=answer_columns(labels)).logits
            return [
                p[t != IGNORE_INDEX]
                for p, t in zip(token_log_probs(logits, answer_labels(labels)), answer_labels(labels))
            ]

        together = log_probs(encode_conversations(processor, rows))
        for row, expected in zip(rows, together):
            (alone,) = log_probs(encode_conversations(processor, [row]))
            torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)


def test_trailing_logits_predict_the_answer(demo, demo_images):
    model, processor = demo
    batch = build_batch(processor, ["what is this?"], images=demo_images["image"][:1], answers=["fox"])
    labels = batch.pop("labels")
    with torch.no_grad():
        full = model(**batch).logits
        kept = model(**batch, logits_to_keep=answer_columns(labels)).logits
    position = int((labels[0] != IGNORE_INDEX).int().argmax())
    torch.testing.assert_close(kept[0, 0], full[0, position - 1])


def test_generation_ignores_batch_size_and_restores_the_mode(demo, demo_images):
    model, processor = demo
    images = demo_images["image"][:10]
    model.train()
    one = generate_answers(model, processor, ["what is this?"] * 10, images=images, batch_size=3)
    assert model.training
    model.eval()
    assert one == generate_answers(model, processor, ["what is this?"] * 10, images=images, batch_size=10)


def test_tapped_features_are_those_of_the_forward_pass(demo, demo_images):
    model, processor = demo
    batch = build_batch(processor, ["what is this?"] * 2, images=demo_images["image"][:2])
    batch.pop("labels")
    with torch.no_grad(), tap_image_features(model) as tapped:
        model(**batch)
    assert "get_image_features" not in vars(model.model)
    with torch.no_grad():
        expected = pool_features(model.get_image_features(pixel_values=batch["pixel_values"]))
    torch.testing.assert_close(tapped[0], expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8))
    image = Image.new("I;16", (12, 12), 300) if mode == "I;16" else image.convert(mode)
    assert load_rgb(image).mode == "RGB"


def test_transparency_becomes_white():
    assert load_rgb(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((1, 1)) == (255, 255, 255)


def test_what_does_not_decode_is_an_error(tmp_path):
    path = tmp_path / "broken.png"
    Image.new("RGB", (64, 64), "red").save(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="does not decode"):
        load_rgb(Image.open(path))
    with pytest.raises(TypeError, match="PIL"):
        load_rgb("fox.png")


def test_mismatched_and_empty_columns(demo):
    _, processor = demo
    with pytest.raises(ValueError, match="2 questions but 1 answers"):
        build_batch(processor, ["a", "b"], answers=["c"])
    with pytest.raises(ValueError, match="no rows"):
        encode_conversations(processor, [])
    with pytest.raises(ValueError, match="no row of the batch has an answer"):
        answer_columns(torch.full((2, 5), IGNORE_INDEX))


def test_a_template_that_hides_the_answer_is_refused(demo):
    import copy

    _, processor = demo
    broken = copy.copy(processor)
    broken.chat_template = (
        "{% for m in messages %}{{ m['role'] }}{% endfor %}{% if add_generation_prompt %}bot{% endif %}"
    )
    with pytest.raises(ValueError, match="does not extend the prompt"):
        build_batch(broken, ["what is this?"], answers=["fox"])
