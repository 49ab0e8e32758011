"""The end-to-end statement: what it counts is what stock transformers answers, and what it promises holds."""

import json
import math
import random
from dataclasses import replace

import architectures
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_architectures import pictures

from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.modeling.prompts import encode_conversations
from space_peft.null_space.certificate import LayerCertificate, RetentionCertificate
from space_peft.retained.end_to_end import CLIP, AnswerComparison, EndToEnd, measure_end_to_end, one_row_each
from space_peft.retained.held_out import HeldOut, content_keys
from space_peft.retained.reading import RetainedRows


TOKENS = 5


def retained(images=5, texts=4):
    rows = [
        {"images": [image], "prompt": question, "completion": "wolf"}
        for image in pictures(images)
        for question in ("What is this?", "What colour is the leaf?")
    ]
    kinds = ("wolf", "owl", "apple", "leaf")[:texts]
    return RetainedRows(rows + [{"images": [], "prompt": f"What kind is the {k}?", "completion": "x"} for k in kinds])


@pytest.fixture(scope="module")
def adapted():
    """A tiny LLaVA whose adapter changes some answers."""
    model, processor = architectures.build("llava")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(3)
    for layer in adapted_layers(model).values():
        b = lora_weights(layer)[1].data
        b.copy_(0.02 * torch.randn(b.shape, generator=generator))
    return model.eval(), processor


def answer(model, processor, row):
    """By transformers alone: the greedy answer, with its tokens."""
    batch = encode_conversations(processor, [{**row, "completion": []}])
    batch.pop("labels")
    tokens = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)[0, batch["input_ids"].shape[1] :].tolist()
    ends = {processor.tokenizer.eos_token_id, model.generation_config.eos_token_id}
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


@torch.no_grad()
def log_prob(model, processor, row, tokens):
    batch = encode_conversations(processor, [{**row, "completion": []}])
    batch.pop("labels")
    ids = torch.cat([batch["input_ids"], torch.tensor([tokens])], dim=1)
    logits = model(**{**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0].double()
    start = batch["input_ids"].shape[1]
    return sum(logits[start + i - 1].log_softmax(-1)[token].item() for i, token in enumerate(tokens))


def test_it_counts_what_stock_transformers_answers(adapted):
    model, processor = adapted
    data = retained()
    rows = one_row_each(data, range(len(data)), 0)
    comparison = AnswerComparison(model, processor, data, rows, TOKENS)
    changed, values = [], []
    for row in comparison.rows:
        with model.disable_adapter():
            before = answer(model, processor, data[row])
            special = processor.tokenizer.all_special_ids
            scored = before[: next((i for i, token in enumerate(before) if token in special), len(before))]
            base = log_prob(model, processor, data[row], scored)
        after = answer(model, processor, data[row])
        texts = [processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in (before, after)]
        changed.append(texts[0] != texts[1])
        change = abs(log_prob(model, processor, data[row], scored) - base) / max(len(scored), 1)
        values.append(min(change, CLIP))
    assert comparison.changed() == changed and 0 < sum(changed) < len(changed), "shows nothing if all are alike"
    assert comparison.log_prob_changes() == pytest.approx(values, abs=1e-4) and max(values) > 0.01
    found = measure_end_to_end(model, processor, data, max_new_tokens=TOKENS)
    assert (found.images, found.texts, found.changed) == (5, 4, sum(changed))
    mean = sum(values) / 9
    assert found.log_prob_change == pytest.approx(mean, abs=1e-4)
    assert found.log_prob_variance == pytest.approx(sum((v - mean) ** 2 for v in values) / 8, abs=1e-4)


def test_an_adapter_that_does_nothing_changes_nothing(adapted):
    model, processor = adapted
    weights = [lora_weights(layer)[1] for layer in adapted_layers(model).values()]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    try:
        found = measure_end_to_end(model, processor, retained(), max_new_tokens=TOKENS)
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before):
                weight.copy_(old)
    assert found == EndToEnd(5, 4, 0, 0.0, 0.0, TOKENS)
    assert found.share_bound == pytest.approx(1 - 0.05 ** (1 / 9), abs=1e-9)
    assert found.log_prob_bound == min(1.0, 7 * math.log(2 / 0.05) / (3 * 8))
    assert measure_end_to_end(model, processor, retained(), []) is None


def test_images_that_the_model_calls_by_the_name_are_not_counted(adapted):
    model, processor = adapted
    data = retained()
    comparison = AnswerComparison(model, processor, data, one_row_each(data, range(len(data)), 0), TOKENS)
    said = dict(zip(comparison.rows, comparison._texts(comparison._answers)))
    shown = data.has_image()
    name = next(word for row, text in said.items() if shown[row] for word in text.split() if word.isalpha())
    kept = [row for row, text in said.items() if not shown[row] or name not in text.split()]
    again = AnswerComparison(model, processor, data, comparison.rows, TOKENS, names=[name])
    assert again.rows == kept and again.left_out == len(comparison.rows) - len(kept) > 0
    assert (again.images, len(again.changed())) == (sum(shown[row] for row in kept), len(kept))
    changed = dict(zip(comparison.rows, comparison.changed()))
    assert again.changed() == [changed[row] for row in kept]
    values = dict(zip(comparison.rows, comparison.log_prob_changes()))
    assert again.log_prob_changes() == pytest.approx([values[row] for row in kept], abs=1e-5)
    found = measure_end_to_end(model, processor, data, max_new_tokens=TOKENS, names=[name])
    assert found.left_out == again.left_out and found.n == len(kept)


def test_one_question_about_each_image_and_text():
    data = retained()
    keys = content_keys(data)
    drawn = [one_row_each(data, range(len(data)), seed) for seed in range(40)]
    assert all(len({keys[row] for row in rows}) == len(rows) == 9 for rows in drawn)
    assert {row for rows in drawn for row in rows} == set(range(len(data)))  # No question is left out by design.
    assert one_row_each(data, range(len(data)), 5) == drawn[5]
    few = [one_row_each(data, range(len(data)), seed, most=3) for seed in range(60)]
    assert {len(rows) for rows in few} == {3} and {keys[row] for rows in few for row in rows} == set(keys)
    # Images with two questions are drawn no more often than texts with one.
    images = sum(keys[row][0] == "image" for rows in few for row in rows)
    assert abs(images - 60 * 3 * 5 / 9) < 5 * math.sqrt(60 * 3 * 20 / 81)
    assert set(one_row_each(data, [0, 1, 10], 0)) in ({0, 10}, {1, 10})


@pytest.mark.parametrize("share", [0.01, 0.03, 0.2, 0.7])
def test_both_bounds_hold_as_often_as_promised(share):
    """Fresh draws of a population whose share and mean are known."""
    draw, n, times = random.Random(0), 80, 600
    held_share = held_mean = 0
    for _ in range(times):
        values = [draw.random() if draw.random() < share else 0.0 for _ in range(n)]
        mean = sum(values) / n
        variance = sum((value - mean) ** 2 for value in values) / (n - 1)
        found = EndToEnd(n - 30, 30, sum(value > 0 for value in values), mean, variance, 9)
        held_share += share <= found.share_bound
        held_mean += share / 2 <= found.log_prob_bound
    # Three standard deviations of the simulation below 95 %.
    assert min(held_share, held_mean) >= times * 0.95 - 3 * math.sqrt(times * 0.95 * 0.05)
    assert share < 0.5 or held_share < times  # It is no bound that is always 1.


def test_the_share_bound_holds_where_numbers_of_images_and_texts_are_fixed():
    """Images and texts change at different rates: the mixture's rate is what is bounded. Exactly, by enumeration."""
    n_images, n_texts = 12, 28
    for rate_images, rate_texts in ((0.5, 0.0), (0.9, 0.02), (0.2, 0.2), (0.05, 0.3)):
        mixture = (n_images * rate_images + n_texts * rate_texts) / (n_images + n_texts)
        held = 0.0
        for i in range(n_images + 1):
            for j in range(n_texts + 1):
                chance = math.comb(n_images, i) * rate_images**i * (1 - rate_images) ** (n_images - i)
                chance *= math.comb(n_texts, j) * rate_texts**j * (1 - rate_texts) ** (n_texts - j)
                held += chance * (mixture <= EndToEnd(n_images, n_texts, i + j, 0.0, 0.0, 1).share_bound)
        assert held >= 0.95 - 1e-12


# In the certificate


def certificate(end_to_end):
    layer = LayerCertificate("layer", 8, 4, 6.0, 0.9, 0.4, 0.5, 0.3, 0.1, 0.001)
    counts = {"text": 9}
    return RetentionCertificate(
        "soft", 0.3, 0.9, "token", counts, counts, (layer,), HeldOut(9, 0.5, 0, 4), "d", end_to_end
    )


def test_it_survives_the_certificates_file(tmp_path):
    for statement in (EndToEnd(30, 70, 2, 0.012, 0.0009, 24), EndToEnd(1, 0, 1, 1.0, 0.0, 24), None):
        whole = certificate(statement)
        whole.save(tmp_path / "space_certificate.json")
        assert RetentionCertificate.load(tmp_path) == whole
    content = json.loads(json.dumps(certificate(EndToEnd(30, 70, 2, 0.012, 0.0009, 24)).to_dict()))["end_to_end"]
    assert content["share_bound"] == pytest.approx(0.0616, abs=1e-4) and content["log_prob_bound"] < 0.12


@pytest.mark.parametrize(
    "change",
    [
        {"share_bound": 0.01}, {"share_bound": None}, {"share_bound": "0.06"}, {"share_bound": math.nan},
        {"log_prob_bound": 0.05}, {"changed": 0}, {"images": 3000}, {"changed": -1}, {"changed": 101},
        {"log_prob_change": 0.001}, {"log_prob_variance": 0.0}, {"log_prob_variance": 0.9}, {"log_prob_change": 1.5},
        {"images": 10**300}, {"images": 30.0}, {"images": True}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_bounds_that_do_not_follow_from_the_counts_are_refused(change):
    content = certificate(EndToEnd(30, 70, 2, 0.012, 0.0009, 24)).to_dict()
    RetentionCertificate.from_dict(content)
    with pytest.raises(ValueError):
        RetentionCertificate.from_dict({**content, "end_to_end": {**content["end_to_end"], **change}})
    for key in set(content["end_to_end"]) - {"left_out"}:
        missing = {name: value for name, value in content["end_to_end"].items() if name != key}
        with pytest.raises(ValueError, match="incomplete"):
            RetentionCertificate.from_dict({**content, "end_to_end": missing})
    with pytest.raises(ValueError, match="incomplete"):
        RetentionCertificate.from_dict({**content, "end_to_end": [1]})


def test_a_certificate_of_version_0_1_0_is_read():
    content = replace(certificate(None), held_out=HeldOut(9, 0.5, 0)).to_dict()
    for key in ("end_to_end", "calibration"):
        del content[key]
    del content["held_out"]["groups"]
    read = RetentionCertificate.from_dict(content)
    assert read.end_to_end is None and read.calibration is None and read.held_out.groups == 0
