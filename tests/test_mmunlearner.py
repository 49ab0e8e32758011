"""MMUnlearner's mask under LoRA: it is not inert, it is the published ratio, and nothing outside of it moves."""

import pytest
import torch
from peft import LoraConfig
from test_forget_trainers import concept_images, make, retain, shake  # noqa: F401

from space_peft import SpaceLoraConfig
from space_peft.losses import name_log_odds
from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.modeling.prompts import answer_logits, encode_conversations
from space_peft.trainers import MMUnlearnerConfig, MMUnlearnerTrainer


def lora_b(trainer):
    return {name: lora_weights(layer)[1].detach().clone() for name, layer in adapted_layers(trainer.model).items()}


def ascent(make, **options):  # noqa: F811
    """Ascent steps alone, so that whatever moves was moved by one."""
    options = {"retain_loss": "none", "forget_every": 1, "max_steps": 4, **options}
    return make(MMUnlearnerTrainer, MMUnlearnerConfig, **options)


@pytest.mark.parametrize("kind", [pytest.param(LoraConfig, marks=pytest.mark.slow), SpaceLoraConfig])
def test_entries_outside_of_the_mask_never_move_and_those_inside_do(make, kind):  # noqa: F811
    # A threshold at which the mask lets some entries of every layer pass, and not all.
    trainer = ascent(make, peft_config=kind(r=4, lora_alpha=8), saliency_threshold=8.0)
    trainer.train()
    moved = lora_b(trainer)
    assert set(moved) == set(trainer.masks)
    for name, mask in trainer.masks.items():
        assert mask.shape == moved[name].shape and mask.dtype == torch.bool
        assert not moved[name][~mask].any(), name
        assert moved[name][mask].all(), name
    shares = [mask.double().mean().item() for mask in trainer.masks.values()]
    # Neither of all entries nor of none, in any layer of either side.
    assert 0.02 < min(shares) and max(shares) < 0.98
    assert {"vision_tower", "language_model", "multi_modal_projector"} <= {n.split(".")[1] for n in trainer.masks}


@pytest.mark.slow
def test_everything_else_is_frozen(make):  # noqa: F811
    """The trap of the published loop: modules that the mask does not cover were trained unmasked."""
    trainer = ascent(make)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_B" not in name}
    trainer.train()
    after = trainer.model.state_dict()
    assert sum("lora_A" in name for name in before) == len(trainer.masks)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_mask_that_lets_nothing_pass_is_refused(make):  # noqa: F811
    with pytest.raises(ValueError, match="lower `saliency_threshold`"):
        ascent(make, saliency_threshold=1e30).train()


def test_masks_compare_gradients_of_forget_rows_and_of_what_is_preserved(make):  # noqa: F811
    """From the gradient of the whole weight, dL/dB = s (dL/dW) A^T, in float64; measured at B = 0 wherever B is."""
    trainer = make(MMUnlearnerTrainer, MMUnlearnerConfig, per_device_train_batch_size=16)
    shake(trainer)
    masks = trainer.measure_saliency()
    assert all(b.any() for b in lora_b(trainer).values())  # B is put back
    data, size = trainer.train_dataset, 16
    shown = [row for row in data.indices if data.retained.has_image()[row]]
    words = [row for row in data.indices if row not in shown]
    from space_peft.retained.reading import retained_loader

    def batches(rows):
        return list(retained_loader(trainer.processing_class, data.retained, rows, size))

    images, texts = batches(shown), batches(words)
    answers = [{key: row[key] for key in ("prompt", "completion", "images")} for row in trainer.forget.given]
    parts = range(0, len(answers), size)
    forget = [encode_conversations(trainer.processing_class, answers[i : i + size]) for i in parts]
    model = trainer.model.get_base_model()
    for name, own in (
        ("model.vision_tower.encoder.layers.1.mlp.fc1", images),
        ("model.language_model.layers.1.mlp.down_proj", images + texts),
    ):
        layer = adapted_layers(trainer.model)[name]
        a, _, scaling = lora_weights(layer)
        weight = layer.get_base_layer().weight
        weight.requires_grad_(True)

        def fisher(batches):
            total = 0
            for batch in batches:
                with trainer.model.disable_adapter():
                    (gradient,) = torch.autograd.grad(model(**batch).loss, weight)  # noqa: B023
                total = total + (scaling * gradient.double() @ a.double().T) ** 2 / len(batches)  # noqa: B023
            return total

        ratio = ((fisher(forget) + 1e-15) / (fisher(own) + 1e-15)).detach()
        weight.requires_grad_(False)
        clear = (ratio - 1).abs() > 1e-2  # away from the threshold, where rounding decides
        assert clear.double().mean() > 0.9
        assert torch.equal(masks[name][clear], (ratio >= 1)[clear])


@pytest.mark.slow
def test_ascent_is_taken_every_so_many_steps(make):  # noqa: F811
    trainer = make(MMUnlearnerTrainer, MMUnlearnerConfig, forget_every=3, max_steps=7)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["loss_forget" in entry for entry in logs] == [True, False, False, True, False, False, True]
    assert all("loss_retain" in entry for entry in logs)
    default = make(MMUnlearnerTrainer, MMUnlearnerConfig)
    assert default.forget_every == len(default.train_dataset.indices) // len(default.train_dataset.rows) == 5


def test_one_step_is_the_masked_ascent_plus_the_unmasked_descent(make):  # noqa: F811
    trainer = make(
        MMUnlearnerTrainer, MMUnlearnerConfig, forget_every=1, optim="sgd", max_grad_norm=0.0, max_steps=1,
        gradient_accumulation_steps=2, per_device_train_batch_size=4, learning_rate=1.0, own_answers=False,
    )  # fmt: skip
    trainer.forget.find_rows()  # As training begins: what other forms branch off.
    batches = [
        trainer.data_collator([trainer.train_dataset[4 * part + item] for item in range(4)]) for part in range(2)
    ]
    masks = trainer.measure_saliency()
    weights = [lora_weights(layer)[1] for layer in adapted_layers(trainer.model).values()]
    expected = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        mention = batch["forget_mentions"]
        logits = answer_logits(trainer.model, batch["forget"])
        odds = name_log_odds(logits, mention["name"], mention["branches"], mention["shares"])
        ascend = torch.autograd.grad(-torch.nn.functional.logsigmoid(odds).mean(), weights)
        descend = torch.autograd.grad(trainer.model(**batch["retain"]).loss, weights)
        for total, mask, up, down in zip(expected, masks.values(), ascend, descend, strict=True):
            total += (mask * up - down) / 2
    trainer.train()
    for weight, change in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), change, rtol=1e-3, atol=1e-6)
