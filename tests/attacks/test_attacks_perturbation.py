"""Perturbed images: each does what it says, and all are asked about."""

import numpy as np
import pytest
from PIL import Image

from space_peft.attacks import PERTURBATIONS, perturbation_attack
from space_peft.data.names import mentions
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.modeling.prompts import generate_answers


@pytest.fixture
def image():
    values = np.random.default_rng(0).integers(60, 196, (40, 30, 3), dtype=np.uint8)
    return Image.fromarray(values)


def perturb(kind, image, seed=0):
    return PERTURBATIONS[kind](image, np.random.default_rng(seed))


def test_noise_has_the_spread_it_says(image):
    difference = np.asarray(perturb("noise", image), dtype=float) - np.asarray(image, dtype=float)
    assert 24 < difference.std() < 27 and abs(difference.mean()) < 1.5


def test_crop_is_a_window(image):
    cropped, values = np.asarray(perturb("crop", image)), np.asarray(image)
    assert cropped.shape == (32, 24, 3)
    windows = np.lib.stride_tricks.sliding_window_view(values, (32, 24, 3))[:, :, 0]
    assert (windows == cropped).all(axis=(2, 3, 4)).sum() == 1
    assert perturb("crop", Image.new("RGB", (1, 1))).size == (1, 1)


def test_flip_turn_and_grey(image):
    values = np.asarray(image)
    assert (np.asarray(perturb("flip", image)) == values[:, ::-1]).all()
    turned = perturb("turn", image)
    assert turned.size == image.size and (np.asarray(turned)[0, 0] == 255).all()
    grey = np.asarray(perturb("grey", image))
    assert (grey == grey[..., :1]).all() and grey.std() > 1


@pytest.mark.parametrize("kind", ["noise", "crop", "turn"])
def test_the_seed_decides(image, kind):
    a, b, c = (np.asarray(perturb(kind, image, seed)).tobytes() for seed in (0, 0, 1))
    assert a == b != c


def attack(erasure, **options):
    images = options.pop("images", erasure.target)
    return perturbation_attack(
        erasure.model, erasure.processor, images, "fox", **{"questions": DEMO_QUESTIONS, **options}
    )


def test_shares_are_those_of_the_answers(erasure, unchanged):
    result = attack(erasure, repeats=2, perturbations={"flip": PERTURBATIONS["flip"], "grey": PERTURBATIONS["grey"]})
    assert list(result.named) == ["none", "flip", "grey"] and result.n == 2 * len(erasure.target)
    with erasure.model.disable_adapter():
        for kind in ("flip", "grey"):
            images = [perturb(kind, image) for image in erasure.target]
            answers = generate_answers(erasure.model, erasure.processor, ["what is this?"] * len(images), images=images)
            hits = [mentions(answer, ["fox"]) for answer in answers]
            assert result.named_before[kind] == sum(hits) / len(hits)
    assert result.named_before["none"] == 1.0 and result.named_before["flip"] == 1.0
    content = result.to_dict()
    assert content["value"] == max(result.named["flip"], result.named["grey"])
    assert content["control"] == result.named["none"] and result.worst in content["meaning"]


def test_perturbations_of_ones_own(erasure):
    """On a model that still knows the target: one that does nothing, and one that leaves nothing to see."""
    model, processor = load_demo_model()
    own = {"blank": lambda image, rng: Image.new("RGB", image.size, "white"), "same": lambda image, rng: image}
    result = perturbation_attack(model, processor, erasure.target, "fox", questions=DEMO_QUESTIONS, perturbations=own)
    assert result.named == {"none": 1.0, "blank": 0.0, "same": 1.0} and result.worst == "same"
    assert result.named_before is None


@pytest.mark.parametrize("options", [{"images": []}, {"perturbations": {}}, {"repeats": 0}])
def test_bad_input(erasure, options):
    with pytest.raises(ValueError, match="at least one of each"):
        attack(erasure, **options)
