"""The certificate: what it says is what dense float64 matrices say, and the bound holds."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import image_batch, text_batch, tiny_llama, tiny_llava, train, trainable

from space_peft.config import SpaceLoraConfig
from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.null_space.certificate import RetentionCertificate, measure_certificate, recompute_bounds
from space_peft.null_space.constraints import FITTED
from space_peft.null_space.fitting import collect_moments, fit_null_space
from space_peft.null_space.projection import attach_null_space
from space_peft.records.folder import CERTIFICATE_NAME


RETAINED = [image_batch(rows=4, text=6, seed=1), text_batch(rows=4, length=9, seed=2, pad=3)]
HELD_OUT = [image_batch(rows=4, text=6, seed=3), text_batch(rows=4, length=9, seed=4)]


def erased(constraint="soft", steps=15, attach=True, **settings):
    model = get_peft_model(
        tiny_llava(), SpaceLoraConfig(r=3, target_modules="all-linear", constraint=constraint, **settings)
    )
    spaces = fit_null_space(model, RETAINED, progress=False)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    if attach:
        attach_null_space(model, optimizer, spaces)
    train(model, optimizer, image_batch(rows=3, seed=9), steps)
    return model, spaces


@pytest.mark.parametrize(
    ("constraint", "settings"),
    [
        ("soft", {}),
        ("soft", {"strength": 0.01, "use_rslora": True, "lora_alpha": 4}),
        ("soft", {"max_rank": 3}),
        ("hard", {"energy": 0.9}),
        ("hard", {"energy": 0.9, "max_rank": 2}),
        ("none", {}),
    ],
)
def test_measured_change_is_exact_and_below_the_bound_on_the_fitted_data(constraint, settings):
    model, spaces = erased(constraint, **settings)
    certificate = measure_certificate(model, spaces, RETAINED, progress=False)
    moments = collect_moments(model, RETAINED, progress=False)
    assert len(certificate.layers) == len(adapted_layers(model))
    moved = 0
    for layer in certificate.layers:
        module = adapted_layers(model)[layer.name]
        a, b, scaling = lora_weights(module)
        update = scaling * b.detach().double() @ a.detach().double()
        c = moments[layer.name].second_moment()
        change = float(torch.trace(update @ c @ update.T))
        weight = module.get_base_layer().weight.detach().double()
        output = float(torch.trace(weight @ c @ weight.T))
        assert layer.change == pytest.approx(change**0.5, rel=1e-3, abs=1e-7)
        assert layer.relative_change == pytest.approx(change / output, rel=2e-3, abs=1e-10)
        assert layer.change <= layer.bound * (1 + 1e-4) + 1e-7
        assert layer.change <= layer.fitted_change * (1 + 1e-3) + 1e-7
        if FITTED[constraint].worst_case is not None:
            free = spaces[layer.name].unproject(a.detach())
            worst = float((scaling * b.detach().double() @ free).norm()) * FITTED[constraint].worst_case(
                spaces[layer.name]
            )
            assert layer.bound <= worst * (1 + 1e-9)
        moved += layer.change > 1e-4
    assert moved > len(certificate.layers) / 2, "nothing was learnt, so nothing is shown"


def test_constraint_keeps_held_out_inputs_better_than_none():
    """At the same norm of the update: what matters is where it points."""

    def leak(constraint, **settings):
        model, spaces = erased(constraint, **settings)
        certificate = measure_certificate(model, spaces, HELD_OUT, progress=False)
        return sum(layer.change / layer.update_norm for layer in certificate.layers if layer.update_norm > 0)

    none, soft, hard = leak("none"), leak("soft", strength=0.03), leak("hard", energy=0.99)
    assert soft < 0.7 * none and hard < 0.7 * none


def test_an_adapter_outside_of_its_hard_null_space_is_refused():
    model, spaces = erased("hard", energy=0.9, attach=False)
    with pytest.raises(ValueError, match=r"not trained under this hard null space: \d+\.\d% of lora_A"):
        measure_certificate(model, spaces, RETAINED, progress=False)


def test_rounding_to_bfloat16_is_accepted_and_counts_in_the_bound():
    """Nothing but rounding touches the retained inputs here, so a bound without it would be zero."""
    retained = [text_batch(rows=1, length=12, seed=5)]  # at most 12 of the 48 input directions
    config = SpaceLoraConfig(r=3, target_modules="all-linear", constraint="hard", energy=1.0)
    model = get_peft_model(tiny_llama(), config)
    spaces = fit_null_space(model, retained, progress=False)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    attach_null_space(model, optimizer, spaces)
    train(model, optimizer, text_batch(rows=4, seed=6), steps=10)
    exact = measure_certificate(model, spaces, retained, progress=False)
    for layer in adapted_layers(model).values():
        a = lora_weights(layer)[0].data
        a.copy_(a.to(torch.bfloat16))
    rounded = measure_certificate(model, spaces, retained, progress=False)
    for before, after in zip(exact.layers, rounded.layers, strict=True):
        assert after.change > 100 * before.change
        assert after.change <= after.fitted_change * (1 + 1e-3) <= after.bound * (1 + 2e-3)


def test_fitted_change_is_never_said_to_be_above_the_bound():
    """What lies outside of few eigenvectors counts with the largest eigenvalue there: for many rows more than can be."""
    model = get_peft_model(tiny_llama(), SpaceLoraConfig(r=40, target_modules=["q_proj"], max_rank=1))
    spaces = fit_null_space(model, [text_batch(rows=2, length=6)], progress=False)
    for name, layer in adapted_layers(model).items():
        a, b, _ = lora_weights(layer)
        a.data.copy_(spaces[name].project(torch.linalg.qr(torch.randn(48, 40)).Q.T))
        b.data.copy_(torch.linalg.qr(torch.randn(48, 40)).Q)
    capped = 0
    for name, (bound, fitted_change) in recompute_bounds(model, spaces).items():
        a, b, scaling = lora_weights(adapted_layers(model)[name])
        alone = spaces[name].change(scaling * b.double() @ a.double())
        assert fitted_change == pytest.approx(min(alone, bound), rel=1e-6)
        capped += alone > 1.05 * bound
    assert capped, "else the test shows nothing"


def test_measured_again_after_loading_with_stock_peft(tmp_path):
    model, spaces = erased()
    certificate = measure_certificate(model, spaces, HELD_OUT, progress=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    again = measure_certificate(loaded, spaces, HELD_OUT, progress=False)
    assert again == certificate


def test_certificate_survives_the_file(tmp_path):
    model, spaces = erased(steps=3)
    certificate = measure_certificate(model, spaces, HELD_OUT, progress=False)
    certificate.save(tmp_path)
    path = tmp_path / CERTIFICATE_NAME
    assert RetentionCertificate.load(tmp_path) == RetentionCertificate.load(path) == certificate
    content = json.loads(path.read_text())
    assert content["max_relative_change"] == max(layer["relative_change"] for layer in content["layers"])
    assert certificate.measured_counts == {"image": 20, "text": 24 + 36}
    worst = certificate.worst(3)
    assert len(worst) == 3 and worst[0].relative_change == certificate.max_relative_change
    assert [layer.relative_change for layer in worst] == sorted((x.relative_change for x in worst), reverse=True)

    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="is not valid JSON"):
        RetentionCertificate.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a retention certificate"):
        RetentionCertificate.load(path)
    del content["layers"][0]["bound"]
    with pytest.raises(ValueError, match="incomplete"):
        RetentionCertificate.from_dict(content)


def test_untrained_adapter_changes_nothing():
    model, spaces = erased(steps=0)
    certificate = measure_certificate(model, spaces, HELD_OUT, progress=False)
    assert all((x.change, x.bound, x.relative_change, x.update_norm) == (0, 0, 0, 0) for x in certificate.layers)
    assert all(0 < layer.kept < 1 and 0 < layer.free_dimensions < layer.dim for layer in certificate.layers)


def test_missing_null_spaces_and_data_are_named():
    model = get_peft_model(tiny_llama(), SpaceLoraConfig(r=2, target_modules=["q_proj"]))
    batch = text_batch()
    spaces = fit_null_space(model, [batch], progress=False)
    with pytest.raises(ValueError, match=r"no null space, the first is 'model\.layers\.1\.self_attn\.q_proj'"):
        measure_certificate(model, {"model.layers.0.self_attn.q_proj": spaces["model.layers.0.self_attn.q_proj"]}, [])
    with pytest.raises(ValueError, match="no batch"):
        measure_certificate(model, spaces, [], progress=False)
    model, spaces = erased(steps=0)
    with pytest.raises(ValueError, match="saw no retained data, the first is 'model.vision_tower"):
        measure_certificate(model, spaces, [text_batch()], progress=False)


def test_layer_fields_are_documented():
    from space_peft.null_space.certificate import LayerCertificate

    for kind in (LayerCertificate, RetentionCertificate):
        for field in dataclasses.fields(kind):
            assert f"{field.name} (`" in kind.__doc__
