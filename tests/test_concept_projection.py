"""The closed form is the projection it says it is, an adapter of rank 1, and a baseline to beat."""

import pytest
import torch
from peft import PeftModel
from tiny_models import tiny_llama

from space_peft import project_concept
from space_peft.anchors.encoders import OwnSpaceEncoder
from space_peft.anchors.refine import name_probabilities
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.modeling.prompts import generate_answers
from space_peft.trainers.concept_projection import last_projection


LAYER = "model.multi_modal_projector.linear_2"


@pytest.mark.parametrize("amount", [0.5, 1.0, 2.0])
def test_the_update_is_minus_a_q_qt_w(demo_model, amount):
    model, processor = demo_model
    original = model.get_submodule(LAYER).weight.detach().double().clone()
    encoder = OwnSpaceEncoder(model, processor)
    q = (encoder.embed_texts(["fox"])[0] + encoder.embed_texts(["vixen"])[0]).double()
    q = q / q.norm()
    adapted = project_concept(model, processor, "fox", aliases=["vixen"], amount=amount)
    merged = adapted.merge_and_unload().get_submodule(LAYER).weight.detach().double()
    expected = (torch.eye(len(q), dtype=torch.float64) - amount * torch.outer(q, q)) @ original
    assert (merged - expected).abs().max() < 1e-6 * original.abs().max()
    assert (merged - original).abs().max() > 1e-2 * original.abs().max()
    # What is left along q: (1 - a) of what was there.
    torch.testing.assert_close(q @ merged, (1 - amount) * (q @ original), rtol=0, atol=1e-6)


def test_the_adapter_is_stock_and_of_rank_one(demo_model, demo_images, tmp_path):
    model, processor = demo_model
    adapted = project_concept(model, processor, "fox").eval()
    assert {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name} == {
        f"base_model.model.{LAYER}"
    }
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_demo_model()[0], tmp_path).eval()
    images = list(demo_images["image"][:4])
    both = [name_probabilities(m, processor, images, "what is this?", "fox") for m in (adapted, loaded)]
    assert both[0] == both[1]


@pytest.mark.parametrize("concept", ["fox", pytest.param("lemon", marks=pytest.mark.slow)])
def test_mirroring_erases_and_projecting_weakens(demo_images, concept):
    """Without training, without an image. An amount of 1 or more needs a model whose features are aligned with its words."""
    own = [row["image"] for row in demo_images if row["name"] == concept]
    others = [row for row in demo_images.select(range(0, len(demo_images), 8)) if row["name"] != concept]
    question = DEMO_QUESTIONS.naming[0]
    said, kept = {}, {}
    for amount in (0.0, 1.0, 2.0):
        model, processor = load_demo_model()
        if amount:
            model = project_concept(model, processor, concept, amount=amount)
        model.eval()
        values = name_probabilities(model, processor, own, question, concept)
        said[amount] = sum(values) / len(values)
        answers = generate_answers(model, processor, [question] * len(others), images=[row["image"] for row in others])
        kept[amount] = sum(a == row["name"] for a, row in zip(answers, others, strict=True)) / len(others)
    assert said[2.0] < 0.01 < said[1.0] < 0.8 < said[0.0]
    assert kept[2.0] > kept[0.0] - 0.05


def test_bad_input_is_refused(demo_model):
    model, processor = demo_model
    for options, message in [
        ({"amount": 0.0}, "amount"),
        ({"amount": float("nan")}, "amount"),
        ({"layer": "model.nothing"}, "linear layer"),
        ({"layer": "model.vision_tower.encoder.layers.0.mlp.fc1"}, "whose outputs the language model reads"),
    ]:
        with pytest.raises(ValueError, match=message):
            project_concept(model, processor, "fox", **options)
    with pytest.raises(ValueError, match="name is empty"):
        project_concept(model, processor, " ")
    with pytest.raises(ValueError, match="get_image_features"):
        last_projection(tiny_llama())
    adapted = project_concept(model, processor, "fox")
    with pytest.raises(TypeError, match="base model"):
        project_concept(adapted, processor, "fox")
