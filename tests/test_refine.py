"""Refinement on the embedded model: the model names the concept afterwards, and nothing else has changed."""

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from space_peft import anchor_info, refine_anchors, select_anchors
from space_peft.anchors.refine import name_probabilities
from space_peft.demo import DEMO_QUESTIONS
from space_peft.demo.probes import demo_split


@pytest.fixture(scope="module")
def demo():
    from space_peft.demo import load_demo_model

    return load_demo_model()


@pytest.fixture(scope="module")
def raw(demo, demo_images):
    public, _ = demo_split(demo_images, "fox")
    model, processor = demo
    return select_anchors("fox", public, model=model, processor=processor, k=4, cache_dir=False, progress=False)


def refine(raw, demo, **options):
    model, processor = demo
    options = {"questions": DEMO_QUESTIONS, "steps": 25, "progress": False, **options}
    return refine_anchors(raw, model=model, processor=processor, **options)


@pytest.fixture(scope="module")
def refined(raw, demo):
    return refine(raw, demo)


def test_probability_of_the_name_rises(refined):
    assert max(refined["p_name_before"]) < 0.5
    assert sum(refined["p_name_after"]) / 4 > 5 * sum(refined["p_name_before"]) / 4
    assert sum(refined["p_name_after"]) / 4 > 0.3


def test_columns_are_measured_on_the_stored_images(refined, demo):
    model, processor = demo
    again = name_probabilities(model, processor, list(refined["image"]), DEMO_QUESTIONS.naming[0], "fox")
    assert again == pytest.approx(refined["p_name_after"], abs=1e-5)


def test_originals_and_provenance_are_kept(raw, refined):
    assert [image.tobytes() for image in refined["raw_image"]] == [
        image.convert("RGB").tobytes() for image in raw["image"]
    ]
    for column in ("score", "rank", "pool_row"):
        assert list(refined[column]) == list(raw[column])
    info = anchor_info(refined)
    assert info["stage"] == "refined" and info["concept"] == "fox"
    assert info["refinement"]["steps"] == 25
    assert not set(info["refinement"]["questions"]) & set(DEMO_QUESTIONS.naming_held_out)


def test_reload(refined, tmp_path):
    refined.save_to_disk(tmp_path / "anchors")
    again = load_from_disk(tmp_path / "anchors")
    assert anchor_info(again) == anchor_info(refined)
    assert list(again["p_name_after"]) == list(refined["p_name_after"])


def test_same_seed_same_images_other_seed_other_images(raw, demo):
    a, b, c = (refine(raw, demo, steps=3, seed=seed) for seed in (0, 0, 1))
    pixels = [[image.tobytes() for image in r["image"]] for r in (a, b, c)]
    assert pixels[0] == pixels[1] != pixels[2]


def test_an_image_does_not_depend_on_the_others(raw, demo):
    """Each image has its own objective: refining it alone gives the same up to rounding of the arithmetic."""
    together = refine(raw, demo, steps=3, batch_size=4, total_variation=0.0)
    alone = refine(raw.select([2]), demo, steps=3, batch_size=4, total_variation=0.0)
    a, b = (torch.tensor(np.asarray(r[i]["image"])).float() for r, i in ((together, 2), (alone, 0)))
    assert (a - b).abs().mean() < 1.0


def test_the_model_is_left_as_it_was(raw, demo):
    model, _ = demo
    model.train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    refine(raw, demo, steps=2)
    assert model.training and flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()


def test_bad_input(raw, demo):
    model, processor = demo
    with pytest.raises(ValueError, match="no anchors"):
        refine(raw.select([]), demo)
    with pytest.raises(ValueError, match="steps"):
        refine(raw, demo, steps=0)
    with pytest.raises(ValueError, match="provenance|concept"):
        refine(raw.remove_columns("score"), demo)


def test_a_processor_that_rescales_is_refused(raw, demo):
    import copy

    model, processor = demo
    other = copy.deepcopy(processor)
    other.image_processor.do_center_crop = True
    other.image_processor.size = {"shortest_edge": 80}
    with pytest.raises(ValueError, match="changes an image of its own output size"):
        refine(raw, (model, other), steps=1)
