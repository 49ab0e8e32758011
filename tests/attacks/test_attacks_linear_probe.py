"""Linear probes: the closed form, what they find, and what they must not find."""

import pytest
import torch
from architectures import build

from space_peft.attacks import linear_probes
from space_peft.attacks.linear_probe import cross_validate, fit_ridge, hidden_states
from space_peft.demo import DEMO_QUESTIONS
from space_peft.modeling.prompts import build_batch


def planted(n=60, positives=12, d=40, strength=6.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) < positives
    features = torch.randn(n, d, generator=generator)
    direction = torch.randn(d, generator=generator)
    return features + strength * labels[:, None] * direction / direction.norm(), labels


@pytest.mark.parametrize("n, d", [(30, 8), (15, 50)])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_closed_form_against_the_normal_equations(n, d, ridge):
    """Weighted least squares with an unpenalised intercept, solved in the primal."""
    generator = torch.Generator().manual_seed(n + d)
    features = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.rand(d, generator=generator) + 3
    labels = torch.arange(n) < 4
    weight, bias = fit_ridge(features, labels, ridge)

    weights = torch.where(labels, 1 / 8, 1 / (2 * (n - 4))).double()
    scale = features.std(dim=0, correction=0)
    x = torch.cat([features / scale, torch.ones(n, 1, dtype=torch.float64)], dim=1)
    y = torch.where(labels, 1.0, -1.0).double()
    centred = (features - weights @ features) / scale
    penalty = ridge * (weights[:, None] * centred.square()).sum() / n
    # Ridge on all coefficients but the intercept's.
    ridge_matrix = penalty * torch.diag(torch.cat([torch.ones(d), torch.zeros(1)]).double())
    solution = torch.linalg.solve(x.T @ (weights[:, None] * x) + ridge_matrix, x.T @ (weights * y))
    assert torch.allclose(weight, solution[:-1] / scale, atol=1e-9)
    assert torch.allclose(bias, solution[-1], atol=1e-9)


def test_a_planted_direction_is_found_and_a_rotation_does_not_hide_it():
    features, labels = planted()
    score = cross_validate(features, labels, folds=5, ridge=0.1)
    assert score.auc > 0.97 and score.accuracy > 0.9
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1)))[0]
    assert cross_validate(features @ rotation, labels, folds=5, ridge=0.1).auc > 0.97


def test_scale_and_offset_of_features_do_not_matter():
    features, labels = planted(strength=1.5)
    factors = torch.logspace(-3, 3, 40)
    a, b = (cross_validate(x, labels, folds=4, ridge=0.1) for x in (features, features * factors + 7 * factors))
    assert a.auc == pytest.approx(b.auc, abs=1e-3)


def test_random_labels_give_chance():
    features, _ = planted(n=200, strength=0.0)
    generator = torch.Generator().manual_seed(2)
    scores = []
    for _ in range(40):
        labels = torch.randperm(200, generator=generator) < 40
        scores.append(cross_validate(features, labels, folds=5, ridge=0.1))
    assert sum(score.auc for score in scores) / 40 == pytest.approx(0.5, abs=0.04)
    assert sum(score.accuracy for score in scores) / 40 == pytest.approx(0.5, abs=0.04)


def test_what_is_scored_was_not_fitted():
    """More features than rows: a fit to random labels is perfect, and must not be scored on its own rows."""
    features = torch.randn(24, 500, generator=torch.Generator().manual_seed(3)).double()
    labels = torch.arange(24) < 12
    weight, bias = fit_ridge(features, labels, 1e-3)
    assert ((features @ weight + bias > 0) == labels).all()
    assert cross_validate(features, labels, folds=4, ridge=1e-3).accuracy < 0.8


def test_ties_count_half():
    labels = torch.arange(10) < 5
    assert cross_validate(torch.zeros(10, 3), labels, folds=5, ridge=0.1).auc == 0.5


def test_states_are_those_of_the_layers(erasure):
    """Against the model's own hidden states, and its answers' logits from the last one."""
    images = erasure.others[:3]
    states = hidden_states(erasure.model, erasure.processor, images, "what is this?", progress=False)
    base = erasure.model.get_base_model()
    depth = base.config.text_config.num_hidden_layers
    assert [key for key in states if key[1] == "last"] == [(f"language.{i}", "last") for i in range(depth)]
    batch = build_batch(erasure.processor, ["what is this?"] * 3, images=images)
    batch.pop("labels")
    with torch.no_grad():
        output = erasure.model(**batch, output_hidden_states=True)
        features = base.model.get_image_features(batch["pixel_values"]).pooler_output
        shown = batch["input_ids"] == base.config.image_token_id
        for i in range(depth - 1):  # The last of the model's own is normalised.
            expected = output.hidden_states[i + 1]
            assert torch.allclose(states[f"language.{i}", "last"], expected[:, -1], atol=1e-4)
            mean = torch.stack([row[mask].mean(dim=0) for row, mask in zip(expected, shown)])
            assert torch.allclose(states[f"language.{i}", "image"], mean, atol=1e-4)
        final = base.lm_head(base.model.language_model.norm(states[f"language.{depth - 1}", "last"]))
    assert torch.allclose(final, output.logits[:, -1], atol=1e-4)
    assert torch.allclose(states["projector", "image"], torch.stack([f.mean(dim=0) for f in features]), atol=1e-4)
    assert list(states)[0] == ("vision.0", "image") and states["vision.0", "image"].shape[0] == 3


def test_before_and_after_of_an_erasure(erasure, unchanged):
    result = linear_probes(
        erasure.model, erasure.processor, erasure.target, erasure.others[:16], "fox", questions=DEMO_QUESTIONS,
        permutations=8, progress=False,
    )  # fmt: skip
    assert result.n_target == len(erasure.target) and result.settings["folds"] == len(erasure.target)
    by_key = {(layer.layer, layer.tokens): layer for layer in result.layers}
    # An adapter on the language side leaves what the tower and the projector make of an image as it was.
    assert by_key["projector", "image"].after == by_key["projector", "image"].before
    assert by_key["projector", "image"].before.auc > 0.9, "the tower tells a fox from other things"
    assert all(0 <= layer.chance <= layer.chance_high <= 1 for layer in result.layers)
    assert sum(layer.chance for layer in result.layers) / len(result.layers) == pytest.approx(0.5, abs=0.15)
    content = result.to_dict()
    assert content["value"] == result.layers[-1].after.auc and content["n"] == len(erasure.target) + 16


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mllama", "idefics3"])
def test_other_architectures(name):
    from PIL import Image

    model, processor = build(name)
    images = [Image.new("RGB", (20, 16), colour) for colour in ("red", "blue", "green")]
    states = hidden_states(model, processor, images, "What is this?", progress=False)
    assert {key[0].split(".")[0] for key in states} == {"vision", "projector", "language"}
    for value in states.values():
        assert len(value) == 3 and value.isfinite().all()
    last = states[next(key for key in reversed(states) if key[1] == "last")]
    assert not torch.allclose(last[0], last[1]), "the images make a difference"


@pytest.mark.parametrize(
    "target, others, options, message",
    [
        (1, 4, {}, "got 1 images of the target and 4 others"),
        (3, 0, {}, "two of each"),
        (3, 4, {"folds": 1}, "`folds`"),
        (3, 4, {"ridge": 0.0}, "`ridge`"),
        (3, 4, {"permutations": 0}, "`permutations`"),
    ],
)
def test_bad_input(erasure, target, others, options, message):
    with pytest.raises(ValueError, match=message):
        linear_probes(
            erasure.model, erasure.processor, erasure.target[:target], erasure.others[:others], "fox", **options
        )
