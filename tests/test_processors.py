"""What processors do otherwise than others, and in older versions of transformers."""

import pytest
import torch
from architectures import build
from PIL import Image

from space_peft.modeling import processors
from space_peft.modeling.processors import encode_prompts, image_token, placeholder
from space_peft.modeling.prompts import conversation, encode_conversations


def test_gemma_is_shown_an_image_by_the_token_of_its_template():
    _, processor = build("gemma3")
    assert image_token(processor) == processor.tokenizer.boi_token
    assert processor.apply_chat_template(conversation("?", image=Image.new("RGB", (8, 8)))["prompt"]).count(
        image_token(processor)
    )


def mllama_rows(processor):
    images = [[], [Image.new("RGB", (20, 20), "red")], [], [Image.new("RGB", (44, 20), "blue")]]
    questions = ["What kind is the wolf?", "What is this?", "?", "What is this?"]
    prompts = [f"<s>{processor.image_token * len(own)}{text}" for text, own in zip(questions, images)]
    return prompts, images


@pytest.mark.parametrize("mixes", [True, False], ids=["its own", "of older versions"])
def test_mllama_takes_rows_without_an_image_beside_others(monkeypatch, mixes):
    if mixes and not processors._MLLAMA_MIXES:
        pytest.skip("Mllama's processor takes such batches from transformers 5.23 on")
    monkeypatch.setattr(processors, "_MLLAMA_MIXES", mixes)
    _, processor = build("mllama")
    prompts, images = mllama_rows(processor)
    batch = encode_prompts(processor, prompts, images)
    length = batch["input_ids"].shape[1]
    for row in range(4):
        alone = encode_prompts(processor, [prompts[row]], [images[row]])
        own = alone["input_ids"].shape[1]
        assert batch["attention_mask"][row].tolist() == [0] * (length - own) + [1] * own
        assert batch["input_ids"][row, length - own :].tolist() == alone["input_ids"][0].tolist()
        if images[row]:
            for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
                assert torch.equal(batch[key][row], alone[key][0])
            assert torch.equal(batch["cross_attention_mask"][row, length - own :], alone["cross_attention_mask"][0])
        else:
            assert not batch["cross_attention_mask"][row].any() and not batch["pixel_values"][row].any()


@pytest.mark.skipif(
    not processors._MLLAMA_MIXES, reason="Mllama's processor takes such batches from transformers 5.23 on"
)
def test_what_stands_in_for_mllama_is_what_it_does_now(monkeypatch):
    _, processor = build("mllama")
    rows = mllama_rows(processor)
    now = encode_prompts(processor, *rows)
    monkeypatch.setattr(processors, "_MLLAMA_MIXES", False)
    before = encode_prompts(processor, *rows)
    assert now.keys() == before.keys()
    for key, value in now.items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_more_places_than_images_are_refused_before_the_model_sees_them(name):
    """LLaVA's own processor counts neither; the model would end in an error of shapes."""
    _, processor = build(name)
    row = conversation("What is this?", image=Image.new("RGB", (8, 8)))
    row["prompt"][0]["content"].insert(0, {"type": "image"})
    with pytest.raises(ValueError, match="row 1 of a batch has 2 places for images in its prompt, and 1 images"):
        encode_conversations(processor, [conversation("Why?"), row])


def test_a_processor_may_find_the_place_itself():
    """PaliGemma's: a prompt without a place is no error."""
    _, processor = build("paligemma")
    assert placeholder(processor) == "<image>"
    batch = encode_prompts(processor, ["What is this?"], [[Image.new("RGB", (8, 8))]])
    assert (batch["input_ids"] == processor.image_token_id).any()
