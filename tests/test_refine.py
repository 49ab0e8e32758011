"""Refinement on the embedded model: the model names the concept afterwards, and nothing else has changed."""

import numpy as np
import pytest
import torch
from architectures import build
from datasets import Dataset, load_from_disk
from PIL import Image
from rounding import PROBABILITY

from space_peft import anchor_info, refine_anchors, select_anchors
from space_peft.anchors.info import anchor_questions, set_anchor_info
from space_peft.anchors.pixel_ascent import Perturbation
from space_peft.anchors.pixels import encode_image, find_layout
from space_peft.anchors.refine import name_probabilities
from space_peft.choices import REFINEMENT_METHODS
from space_peft.data.questions import QuestionSet
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


def test_fourier_coefficients_reach_the_name_in_fewer_steps(raw, demo):
    by_method = {method: refine(raw, demo, steps=15, method=method) for method in REFINEMENT_METHODS}
    assert {method: anchor_info(found)["refinement"]["method"] for method, found in by_method.items()} == {
        method: method for method in REFINEMENT_METHODS
    }
    found = {method: np.mean([np.log(p) for p in own["p_name_after"]]) for method, own in by_method.items()}
    assert found["fourier"] > found["pixels"] + 0.5


@pytest.mark.parametrize("size", [(16, 16), (15, 20), (20, 15), (33, 17), (1, 8)])
def test_a_step_in_fourier_space_has_the_spectrum_of_photographs(size):
    """All coefficients moved by as much: amplitudes fall as 1 / frequency, whatever the size, and pixels move by the rate."""
    perturbation = Perturbation(torch.zeros(2, 3, *size), "fourier")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # As Adam's first step: every value goes by the rate, up or down.
        perturbation.moved += 0.05 * (torch.randint(0, 2, perturbation.moved.shape, generator=generator) * 2 - 1)
    moved = perturbation().detach()
    assert moved.shape == (2, 3, *size)
    assert 0.5 < moved.square().mean().sqrt() / 0.05 < 2
    amplitudes = torch.fft.rfft2(moved.double(), norm="ortho").abs()
    rows = torch.fft.fftfreq(size[0], dtype=torch.float64)[:, None]
    frequencies = (rows**2 + torch.fft.rfftfreq(size[1], dtype=torch.float64) ** 2).sqrt()
    # Neither the mean nor the highest frequency, whose imaginary parts are none.
    inner = (
        (frequencies > 0) & (rows.abs() < 0.5) & (torch.fft.rfftfreq(size[1]) < 0.5) & (torch.fft.rfftfreq(size[1]) > 0)
    )
    flat = (amplitudes * frequencies)[..., inner]
    assert torch.allclose(flat, flat.mean().expand_as(flat), rtol=1e-4)


def test_without_steps_nothing_is_added():
    for method in REFINEMENT_METHODS:
        assert not Perturbation(torch.ones(1, 3, 8, 8), method)().any()


def test_columns_are_measured_on_the_stored_images(refined, demo):
    model, processor = demo
    again = name_probabilities(model, processor, list(refined["image"]), DEMO_QUESTIONS.naming[0], "fox")
    assert again == pytest.approx(refined["p_name_after"], abs=PROBABILITY)


def test_originals_and_provenance_are_kept(raw, refined):
    assert [image.tobytes() for image in refined["raw_image"]] == [
        image.convert("RGB").tobytes() for image in raw["image"]
    ]
    for column in ("score", "rank", "pool_row"):
        assert list(refined[column]) == list(raw[column])
    info = anchor_info(refined)
    assert info["stage"] == "refined" and info["concept"] == "fox"
    assert info["refinement"]["steps"] == 25
    assert anchor_questions(refined) == DEMO_QUESTIONS and anchor_questions(raw) is None


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
    with pytest.raises(ValueError, match="`method` must be one of .*'fourier'.* got 'wavelets'"):
        refine(raw, demo, method="wavelets")
    with pytest.raises(ValueError, match="provenance|concept"):
        refine(raw.remove_columns("score"), demo)


def as_anchors(images, concept="wolf"):
    return set_anchor_info(Dataset.from_dict({"image": images, "score": [0.0] * len(images)}), {"concept": concept})


def test_images_of_different_sizes_keep_their_order():
    """Qwen keeps each image's shape, so that they are refined in groups of one size, and put back where they were."""
    model, processor = build("qwen2_5_vl")
    sizes = [(20, 44), (20, 20), (20, 44), (44, 20)]  # (width, height)
    raw = [Image.new("RGB", size, colour) for size, colour in zip(sizes, ("red", "green", "blue", "gold"))]
    refined = refine_anchors(
        as_anchors(raw), model=model, processor=processor, steps=2, learning_rate=1e-4, max_shift=0.0, progress=False
    )
    assert [image.size for image in refined["image"]] == [(16, 32), (16, 16), (16, 32), (32, 16)]
    for image, original in zip(refined["image"], raw):
        error = np.abs(np.asarray(image, dtype=int) - np.asarray(original.resize(image.size), dtype=int))
        assert error.max() <= 1, "two small steps hardly move a pixel"


def test_the_whole_image_made_small():
    """Without cutting, Idefics shows the model nothing but a reduced image: every pixel of it is a mean of several."""
    model, processor = build("idefics3")
    processor.image_processor.do_image_splitting = False
    rng = np.random.default_rng(0)
    raw = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(2)]
    question = QuestionSet(naming=("What is this?",), naming_held_out=(), confirm=(), confirm_held_out=())
    refined = refine_anchors(
        as_anchors(raw), model=model, processor=processor, questions=question, steps=30, learning_rate=0.1,
        max_shift=0.0, progress=False,
    )  # fmt: skip
    assert [image.size for image in refined["image"]] == [(32, 32)] * 2
    for before, after in zip(refined["p_name_before"], refined["p_name_after"]):
        assert after > 3 * before


def test_shifts_move_whole_images():
    """With tiles, a shift moves pixels from one tile to the next: it acts on the image and not on its tiles."""
    _, processor = build("internvl")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 32, 3), dtype=np.uint8)
    layout = find_layout(processor, Image.fromarray(image), {})
    assert int(layout.small.sum()) == 1 and layout.shape[0] == 3
    values = layout.start(processor, Image.fromarray(image))
    shifted = Image.fromarray(np.roll(image, (1, -5), axis=(0, 1)))
    wanted = encode_image(processor, shifted)["pixel_values"]
    got = layout(torch.roll(values[None], (1, -5), dims=(2, 3)))
    assert (got - wanted)[:2].abs().max() < 1e-5
    assert (got - wanted)[2].abs().max() < 3 / 255 / 0.26


def test_refinement_is_shifted(raw, demo):
    """Under the same seed, and so the same questions: without shifts the pixels would be the same."""
    shifted, still = (refine(raw.select([0]), demo, steps=2, max_shift=shift) for shift in (0.1, 0.0))
    assert shifted[0]["image"].tobytes() != still[0]["image"].tobytes()


@pytest.mark.parametrize("size, tiles", [((18, 14), 2), ((14, 18), 2), ((20, 20), 4), ((12, 12), 1)])
def test_as_many_tiles_as_the_model_is_shown(size, tiles):
    """Of the sizes that Mllama's processor keeps, the one that is cut into as many tiles as the image itself."""
    _, processor = build("mllama")
    image = Image.new("RGB", size, "red")
    assert int(encode_image(processor, image)["aspect_ratio_mask"].sum()) == tiles
    layout = find_layout(processor, image, {})
    assert int(layout.used.sum()) == tiles == layout.height * layout.width // 16**2


def test_layouts_that_are_not_understood_are_refused():
    _, processor = build("paligemma")  # Its processor looks at no pixels itself, in any version.
    image = Image.new("RGB", (16, 16))

    class Flat(type(processor.image_processor)):
        def preprocess(self, images, **kwargs):
            output = super().preprocess(images, **kwargs)
            output["pixel_values"] = output["pixel_values"].flatten(2)
            return output

    class Blurred(type(processor.image_processor)):
        def preprocess(self, images, **kwargs):
            output = super().preprocess(images, **kwargs)
            output["pixel_values"] = output["pixel_values"].cumsum(dim=-1) / 16
            return output

    settings = {"size": {"height": 16, "width": 16}}
    processor.image_processor = Blurred(**settings)
    with pytest.raises(ValueError, match="Blurred changes an image of its own output size .tried 16 x 16."):
        find_layout(processor, image, {})
    processor.image_processor = Flat(**settings)
    with pytest.raises(ValueError, match=r"Flat gives pixel_values of shape \(1, 3, 256\)"):
        find_layout(processor, image, {})


def test_a_processor_that_rescales_is_refused(raw, demo):
    import copy

    model, processor = demo
    other = copy.deepcopy(processor)
    other.image_processor.do_center_crop = True
    other.image_processor.size = {"shortest_edge": 80}
    with pytest.raises(ValueError, match="changes an image of its own output size"):
        refine(raw, (model, other), steps=1)
