"""Encoding conversations for the embedded model: what is padded, what is masked, what the logits mean."""

import copy

import numpy as np
import pytest
import torch
from architectures import build
from peft import LoraConfig, get_peft_model
from PIL import Image

from space_peft.losses import answer_labels, token_log_probs
from space_peft.modeling.features import pool_features, tap_image_features
from space_peft.modeling.processors import image_token
from space_peft.modeling.prompts import (
    IGNORE_INDEX,
    answer_columns,
    answer_logits,
    build_batch,
    conversation,
    encode_conversations,
    generate_answers,
    load_rgb,
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
    assert (labels != IGNORE_INDEX).sum(dim=1).tolist() == [2, 3, 3]


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


class WholeLogits(torch.nn.Module):
    """A model whose forward cannot be told to compute its last logits only."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, attention_mask, pixel_values):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)


@pytest.mark.parametrize("wrap", [lambda m: m, WholeLogits, torch.nn.DataParallel])
def test_answer_logits_are_the_trailing_ones_of_any_model(demo, demo_images, wrap):
    model, processor = demo
    batch = build_batch(processor, ["what is this?"] * 2, images=demo_images["image"][:2], answers=["fox", "hot dog"])
    labels = batch["labels"]
    with torch.no_grad():
        whole = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        got = answer_logits(wrap(model), batch)
    assert got.shape[1] == answer_columns(labels) < labels.shape[1]
    torch.testing.assert_close(got, whole[:, -answer_columns(labels) :])
    assert batch["labels"] is labels, "the batch stays as it is"


def test_only_needed_logits_are_computed(demo, demo_images):
    model, processor = demo
    batch = build_batch(processor, ["what is this?"], images=demo_images["image"][:1], answers=["fox"])
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    widths = []
    adapted.get_output_embeddings().register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    with torch.no_grad():
        answer_logits(adapted, batch)
    assert widths == [answer_columns(batch["labels"])] and widths[0] < batch["input_ids"].shape[1]


def test_paligemma_answers_are_not_seen_ahead():
    """Its prompts are read in both directions: an answer must not be, or it would be known before it is predicted."""
    model, processor = build("paligemma")
    image = Image.new("RGB", (20, 20), "red")
    rows = [
        conversation("What is this?", answer="red fox", image=image),
        conversation("What kind is the wolf?", answer="red fox"),
    ]
    batch = encode_conversations(processor, rows)
    answered = torch.arange(batch["input_ids"].shape[1]) > batch["input_ids"].shape[1] - answer_columns(batch["labels"])
    assert torch.equal(batch["token_type_ids"], answered.long().expand(2, -1))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    last = int((batch["labels"][0] != IGNORE_INDEX).nonzero().max())
    other["input_ids"][:, last - 1] = 5
    with torch.no_grad():
        a, b = answer_logits(model, batch), answer_logits(model, other)
    torch.testing.assert_close(a[:, :2], b[:, :2])
    assert (a[:, 2] - b[:, 2]).abs().max() > 1e-3
    # BOS, the prompt and a line break, as its processor writes prompts with an image.
    tokenizer = processor.tokenizer
    text = tokenizer.decode(batch["input_ids"][1][batch["attention_mask"][1] == 1])
    assert text.startswith("<s>") and text.count("<s>") == 1 and "answer : \n red fox" in text


def test_mllama_answers_see_the_image():
    model, processor = build("mllama")
    images = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    batch = build_batch(processor, ["What is this?"] * 2, images=images, answers=["red fox", "owl"])
    mask = batch["cross_attention_mask"]
    assert mask.shape[:2] == batch["input_ids"].shape
    width = answer_columns(batch["labels"]) - 1
    asked, answers = mask[:, -width - 1], mask[:, -width:]
    assert torch.equal(answers, asked[:, None].expand_as(answers)) and answers.any()
    swapped = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    with torch.no_grad():
        difference = (answer_logits(model, batch) - answer_logits(model, swapped))[:, :-1].abs().amax(dim=(0, 2))
    assert difference.min() > 1e-3, "every token of an answer depends on the image"


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
    _, processor = demo
    broken = copy.copy(processor)
    broken.chat_template = (
        "{% for m in messages %}{{ m['role'] }}{{ m['content'][0]['text'] }}{% endfor %}"
        "{% if add_generation_prompt %}bot{% endif %}"
    )
    with pytest.raises(ValueError, match="does not extend the prompt"):
        build_batch(broken, ["what is this?"], answers=["fox"])


def test_a_processor_without_template_is_refused(demo):
    _, processor = demo
    bare = copy.copy(processor)
    bare.chat_template = None
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template"):
        build_batch(bare, ["what is this?"])


def test_a_processor_without_image_token_is_refused(demo):
    _, processor = demo
    assert image_token(processor) == "<image>"
    bare = copy.copy(processor)
    bare.image_token = None
    assert image_token(bare) == "<image>", "by its id"
    bare.image_token_id = None
    with pytest.raises(ValueError, match="has no image token"):
        image_token(bare)
