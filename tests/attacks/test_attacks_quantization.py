"""Rounded weights: on the grid, close to what they were, and evaluated as what they are."""

import copy

import pytest
import torch
from torch import nn

from space_peft.attacks import quantization_attack, quantize_weights, round_to_nearest
from space_peft.attacks.models import deployed_copy, merged_copy
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.evaluation import build_probes, evaluate_probes
from space_peft.modeling.prompts import build_batch


def logits(model, erasure):
    batch = build_batch(erasure.processor, ["what is this?"] * 3, images=erasure.others[:3])
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16, 50])
def test_nearest_point_of_the_grid(bits, group_size):
    """Against a search over all points of every group's grid, in float64."""
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(bits))
    rounded = round_to_nearest(weight, bits, group_size=group_size)
    size = group_size or 70
    top = 2 ** (bits - 1) - 1
    for start in range(0, 70, size):
        part = weight[:, start : start + size].double()
        grid = part.abs().amax(dim=1, keepdim=True) / top * torch.arange(-top, top + 1)  # (5, points)
        distance = (part[..., None] - grid[:, None]).abs()
        expected = grid.gather(1, distance.argmin(dim=-1))
        assert torch.allclose(rounded[:, start : start + size].double(), expected, atol=1e-5)


def test_error_halves_with_every_bit():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [(round_to_nearest(weight, bits) - weight).square().mean().sqrt() for bits in (4, 5, 6, 7, 8)]
    assert all(1.8 < a / b < 2.4 for a, b in zip(errors, errors[1:]))
    assert round_to_nearest(torch.zeros(2, 8), 4).eq(0).all()
    assert round_to_nearest(weight.bfloat16(), 8).dtype == torch.bfloat16


def test_smaller_groups_follow_more_closely():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 128)
    errors = [(round_to_nearest(weight, 4, group_size=size) - weight).norm() for size in (8, 32, None)]
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    "options, message", [({"bits": 1}, "from 2 to 16"), ({"bits": 4, "group_size": 0}, "at least 1")]
)
def test_grids_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        round_to_nearest(torch.ones(2, 4), **options)


def test_int8_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    values, scale, _ = functional.int8_vectorwise_quant(weight.half())
    theirs = values.float() * scale[:, None].float() / 127
    ours = round_to_nearest(weight.half().float(), 8)
    # Theirs rounds the scale to half precision on some machines: a value may end up on the next point.
    assert (theirs - ours).abs().max() < 1.01 * weight.abs().amax() / 127
    assert (theirs - ours).abs().mean() < 1e-3


def test_nf4_is_what_a_4_bit_layer_computes():
    functional = pytest.importorskip("bitsandbytes.functional")
    model = nn.Sequential(nn.Linear(128, 16, bias=False))
    model.get_output_embeddings = lambda: None
    original = model[0].weight.detach().clone()
    quantize_weights(model, "nf4", group_size=64)
    packed, state = functional.quantize_4bit(original, blocksize=64, quant_type="nf4")
    assert torch.equal(model[0].weight, functional.dequantize_4bit(packed, state))
    assert len((model[0].weight[0, :64] / original[0, :64].abs().max()).unique()) <= 16


def test_sixteen_bits_change_nothing(erasure):
    model, _ = load_demo_model()
    rounded = quantize_weights(copy.deepcopy(model), "int16")
    assert (logits(rounded, erasure) - logits(model, erasure)).abs().max() < 0.02
    coarse = quantize_weights(copy.deepcopy(model), "int3", group_size=64)
    assert (logits(coarse, erasure) - logits(model, erasure)).abs().max() > 0.5


def test_all_linear_layers_but_the_head(erasure):
    model, _ = load_demo_model()
    rounded = quantize_weights(copy.deepcopy(model), "int4")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    changed = {
        name.removesuffix(".weight")
        for (name, old), new in zip(model.named_parameters(), rounded.parameters())
        if not torch.equal(old, new)
    }
    assert changed == linear - {"lm_head"}


def test_copies_are_what_they_say(erasure, unchanged):
    """The merged copy answers as the erased model, the deployed one as the model without the adapter."""
    erased = logits(erasure.model, erasure)
    with erasure.model.disable_adapter():
        original = logits(erasure.model, erasure)
    assert (erased - original).abs().max() > 0.1
    assert torch.allclose(logits(merged_copy(erasure.model), erasure), erased, atol=1e-3)
    assert torch.equal(logits(deployed_copy(erasure.model), erasure), original)
    assert deployed_copy(merged_copy(erasure.model)) is None


def test_a_merged_adapter_has_no_deployed_copy(erasure):
    merged = copy.deepcopy(erasure.model)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        deployed_copy(merged)
    assert torch.allclose(logits(merged_copy(merged), erasure), logits(erasure.model, erasure), atol=1e-3)


def test_the_attack(erasure, unchanged):
    rows = [{"question": "what is this?", "answer": "wolf", "image": image} for image in erasure.others[:6]]
    for row, image in zip(rows, erasure.others):
        row["answer"] = said(erasure, image)
    probes = build_probes("fox", questions=DEMO_QUESTIONS, target_images=erasure.target, retain_rows=rows)
    probes = [probe for probe in probes if probe.name in ("forget", "retain")]
    result = quantization_attack(erasure.model, erasure.processor, probes, schemes=("int8", "int4"), progress=False)
    assert list(result.after) == list(result.before) == ["full", "int8", "int4"]
    # The same by hand, for one scheme.
    by_hand = evaluate_probes(
        quantize_weights(merged_copy(erasure.model), "int4"), erasure.processor, probes, progress=False,
        baseline=evaluate_probes(deployed_copy(erasure.model), erasure.processor, probes, progress=False),
    ).scores  # fmt: skip
    assert result.after["int4"] == by_hand
    assert result.before["full"]["forget"]["value"] == 1.0 and result.before["full"]["retain"]["value"] == 1.0
    assert result.before["int8"]["forget"]["value"] == 1.0, "8 bits do not make a model forget"
    content = result.to_dict()
    assert content["value"] == max(result.after[s]["forget"]["value"] for s in ("int8", "int4"))
    assert content["control"] == result.after["full"]["forget"]["value"] and content["n"] == len(erasure.target)
    assert result.worst in content["meaning"] and result.concept == "fox"


def said(erasure, image):
    from space_peft.modeling.prompts import generate_answers

    with erasure.model.disable_adapter():
        return generate_answers(erasure.model, erasure.processor, ["what is this?"], images=[image])[0]


def test_bad_input(erasure):
    probes = build_probes("fox", questions=DEMO_QUESTIONS, target_images=erasure.target)
    with pytest.raises(ValueError, match=r"among \('int8', 'int4', 'nf4'\), got \['int5'\]"):
        quantization_attack(erasure.model, erasure.processor, probes, schemes=["int5"])
    with pytest.raises(ValueError, match="no probe called 'forget' has rows"):
        quantization_attack(erasure.model, erasure.processor, build_probes("fox", questions=DEMO_QUESTIONS))
