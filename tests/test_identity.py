"""Null spaces know what they were fitted for: other models, settings and data are noticed, and projecting is done once."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_projection import FORGET, rows_of, trainer_for
from tiny_models import image_batch, text_batch, tiny_llama, tiny_llava, train, trainable
from transformers import Trainer, TrainingArguments

from space_peft import NullSpaceCallback, SpaceLoraConfig, fit_null_space
from space_peft.modeling.checksum import base_checksum, same_base, weights_at_rest
from space_peft.modeling.layers import adapted_layers, deployed_weights, lora_weights
from space_peft.null_space import NullSpaceFitter, load_null_spaces, save_null_spaces
from space_peft.null_space.certificate import measure_certificate
from space_peft.null_space.differences import fit_differences
from space_peft.null_space.identity import adapter_digest, data_digest
from space_peft.null_space.projection import attach_null_space
from space_peft.records.digests import file_digest
from space_peft.records.folder import NULL_SPACES_NAME, SPACE_CONFIG_NAME
from space_peft.records.measured import check_projected


RETAINED = [text_batch(rows=4, seed=seed, pad=2) for seed in range(2)]
OTHER = [text_batch(rows=4, seed=seed, pad=2) for seed in range(7, 9)]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(seed=0, adapter_name="default", **settings):
    torch.manual_seed(1)
    config = SpaceLoraConfig(**{"r": 4, "target_modules": TARGETS, "strength": 0.3, **settings})
    return get_peft_model(tiny_llama(seed), config, adapter_name=adapter_name)


def spaces_of(model, batches=RETAINED, **options):
    return fit_null_space(model, batches, progress=False, **options)


def weights(model, kind="lora_A"):
    return {name: value.detach().clone() for name, value in model.named_parameters() if kind in name}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def same_spaces(one, other):
    return all(torch.equal(one[name].filters, other[name].filters) for name in one)


# What differs, and what does not


def change_embedding(model):
    model.get_input_embeddings().weight.data[5, 3] += 1e-3


def change_norm(model):
    model.get_base_model().model.layers[0].input_layernorm.weight.data[7] += 1e-3


def change_layer_below(model):
    model.get_base_model().model.layers[0].self_attn.o_proj.weight.data[2, 2] += 1e-3


def change_adapted_layer(model):
    model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.data[0, 1] += 1e-3


@pytest.mark.parametrize("change", [change_embedding, change_norm, change_layer_below, change_adapted_layer])
def test_one_value_of_one_weight_anywhere_is_noticed(change):
    model = adapted()
    spaces = spaces_of(model)
    assert fit_differences(model, spaces) == []
    change(model)
    with pytest.raises(ValueError, match="the base model's weights differ from those they were fitted on"):
        attach_null_space(model, torch.optim.SGD(trainable(model), lr=0.1), spaces)


@pytest.mark.parametrize(
    ("fitted", "asked", "message"),
    [
        ({"constraint": "none"}, {"constraint": "hard"}, "`constraint` is 'none' in the null spaces, but 'hard'"),
        ({"strength": 1.0}, {"strength": 0.1}, "`strength` is 1.0 in the null spaces, but 0.1"),
        (
            {"constraint": "hard", "energy": 0.5},
            {"constraint": "hard"},
            "`energy` is 0.5 in the null spaces, but 0.999",
        ),
        ({"max_rank": 4}, {"max_rank": None}, "`max_rank` is 4 in the null spaces, but None"),
        ({"statistics": "pooled"}, {}, "`statistics` is 'pooled' in the null spaces, but 'token'"),
        ({"tokens_per_row": 3}, {"tokens_per_row": None}, "`tokens_per_row` is 3 in the null spaces, but None"),
    ],
)
def test_null_spaces_of_other_settings_are_refused(fitted, asked, message, tmp_path):
    save_null_spaces(tmp_path / "spaces.safetensors", spaces_of(adapted(**fitted)))
    model = adapted(**asked)
    before = weights(model)
    callback = NullSpaceCallback(null_spaces=load_null_spaces(tmp_path / "spaces.safetensors"))
    with pytest.raises(ValueError, match=message):
        trainer_for(model, tmp_path / "run", callback).train()
    assert same(before, weights(model)), "refused, yet changed"


def as_saved_by_the_version_before(model, folder):
    """The folder of an adapter that was saved when "auto" meant d / 32."""
    model.save_pretrained(folder)
    path = folder / SPACE_CONFIG_NAME
    content = json.loads(path.read_text())
    del content["auto_rank"]
    path.write_text(json.dumps(content))


@pytest.mark.filterwarnings("ignore:the adapter saved to")
def test_an_adapter_of_the_version_before_goes_on_under_its_own_null_spaces(tmp_path):
    """Of `down_proj`'s 96 inputs "auto" was 16 eigenvectors, and is 24."""
    as_saved_by_the_version_before(adapted(), tmp_path)

    def loaded():
        config = SpaceLoraConfig.from_pretrained(tmp_path)
        return PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config, is_trainable=True)

    model = loaded()
    spaces = spaces_of(model)
    assert {space.max_rank for space in spaces.values()} == {16}
    attach(model, spaces).remove()
    as_saved_by_the_version_before(model, tmp_path)
    again = loaded()
    once = weights(again)
    attach(again, spaces_of(again)).remove()
    assert same(once, weights(again)), "projected a second time, by other null spaces"
    # One that is new asks for more, and is told whose null spaces these are.
    with pytest.raises(
        ValueError, match=r"`max_rank` is 16 in the null spaces, but 24 is asked for \('auto' meant that"
    ):
        attach(adapted(), spaces)
    with pytest.raises(ValueError) as error:
        attach(adapted(max_rank=20), spaces)
    assert "auto" not in str(error.value)


def test_settings_that_play_no_part_are_not_compared():
    model = adapted(constraint="hard", energy=0.9, strength=0.5)
    spaces = spaces_of(model)
    assert fit_differences(adapted(constraint="hard", energy=0.9, strength=0.1), spaces) == []
    # An adapter on fewer layers, and another rank: the inputs are the same.
    assert fit_differences(adapted(constraint="hard", energy=0.9, target_modules=["q_proj"], r=2), spaces) == []


def test_the_base_is_the_same_however_the_adapter_is_put_there_and_trained():
    model = adapted()
    expected = base_checksum(model)
    native = tiny_llama()
    native.add_adapter(SpaceLoraConfig(r=4, target_modules="all-linear"), "mine")
    assert base_checksum(native, "mine") == expected == base_checksum(adapted(adapter_name="other"), "other")
    train(model, torch.optim.SGD(trainable(model), lr=0.1), FORGET, steps=1)
    assert base_checksum(model) == expected != base_checksum(adapted(seed=1))


def test_a_frozen_adapter_that_is_on_belongs_to_the_base():
    def with_task(on):
        model = adapted()
        torch.manual_seed(2)
        model.add_adapter("task", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
        model.base_model.set_adapter(["default", "task"] if on else ["default"])
        return model

    assert base_checksum(with_task(False)) == base_checksum(adapted()) != base_checksum(with_task(True))
    other = with_task(True)
    for layer in adapted_layers(other, "task").values():
        layer.set_scale("task", 0.5)
    assert base_checksum(other) != base_checksum(with_task(True))


def test_another_dtype_of_the_same_values_is_the_same_base():
    model = adapted().to(torch.bfloat16).float()
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert base_checksum(low) != base_checksum(model) and same_base(base_checksum(low), base_checksum(model))
    assert not same_base(base_checksum(low), base_checksum(adapted(seed=1)))
    assert fit_differences(low, spaces_of(model)) == []


def test_data_are_told_apart_but_not_by_order_padding_or_batches():
    model = adapted()
    rows = rows_of(text_batch(rows=8, seed=5))
    digest = data_digest(model, torch.utils.data.DataLoader(rows, batch_size=4))
    assert (
        spaces_of(model, torch.utils.data.DataLoader(rows, batch_size=4))["model.layers.0.mlp.down_proj"].identity.data
        == digest
    )
    shuffled = torch.utils.data.DataLoader(rows, batch_size=3, shuffle=True)
    assert data_digest(model, shuffled) == digest
    short = text_batch(rows=1, length=8, seed=3)
    padded = {key: torch.nn.functional.pad(short[key], (2, 0)) for key in ("input_ids", "attention_mask")}
    assert data_digest(model, [short]) == data_digest(model, [padded])
    fewer = data_digest(model, [text_batch(rows=8, seed=5)][:1] * 2)
    assert len({digest, fewer, data_digest(model, [text_batch(rows=8, seed=6)])}) == 3
    assert data_digest(model, []) is None


def test_pictures_count_and_so_do_their_places():
    model = get_peft_model(tiny_llava(), SpaceLoraConfig(r=2, target_modules=["q_proj"]))
    batch = image_batch()
    mirrored = {**batch, "pixel_values": batch["pixel_values"].flip(-1)}
    brighter = {**batch, "pixel_values": batch["pixel_values"].clone()}
    brighter["pixel_values"][1, 0, 0, 0] += 0.1
    assert len({data_digest(model, [b]) for b in (batch, mirrored, brighter)}) == 3
    parts = [{key: value[i : i + 1] for key, value in batch.items()} for i in (2, 0, 1)]
    assert data_digest(model, parts) == data_digest(model, [batch])


# One callback, several runs


def test_one_callback_over_a_sweep_of_strengths_equals_fresh_ones(tmp_path):
    callback, leaks = NullSpaceCallback(RETAINED, progress=False), []
    for strength in (1.0, 0.001, 1.0):
        model = adapted(strength=strength)
        trainer_for(model, tmp_path, callback).train()
        assert {space.strength for space in callback.null_spaces.values()} == {strength}
        fresh = adapted(strength=strength)
        trainer_for(fresh, tmp_path, NullSpaceCallback(RETAINED, progress=False)).train()
        assert same(weights(model), weights(fresh))
        leaks.append(sum(layer.change for layer in measure_certificate(model, callback.null_spaces, RETAINED).layers))
    assert leaks[1] < leaks[0] / 3 and leaks[2] == leaks[0]


def test_model_init_gets_null_spaces_of_each_model(tmp_path):
    now = {}
    callback = NullSpaceCallback(RETAINED, progress=False)
    arguments = trainer_for(adapted(), tmp_path, callback).args
    trainer = Trainer(
        model_init=lambda: adapted(**now), args=arguments, train_dataset=rows_of(FORGET), callbacks=[callback]
    )
    for now in ({"seed": 0}, {"seed": 1}, {"seed": 1, "target_modules": "all-linear"}):
        trainer.train()
        assert callback.null_spaces.keys() == adapted_layers(trainer.model).keys()
        assert same_spaces(callback.null_spaces, spaces_of(adapted(**now)))


def test_the_same_model_settings_and_data_are_not_fitted_again(tmp_path):
    callback = NullSpaceCallback(RETAINED, progress=False)
    trainer_for(adapted(), tmp_path, callback).train()
    first = callback.null_spaces
    passes = []
    model = adapted()
    model.get_base_model().lm_head.register_forward_hook(lambda *_: passes.append(model.training))
    trainer_for(model, tmp_path, callback).train()
    assert callback.null_spaces is first and all(passes), "retained rows went through the model"


def test_the_weights_are_read_once_when_training_begins_and_again_the_next_time(tmp_path, monkeypatch):
    model, callback, read = adapted(), NullSpaceCallback(RETAINED, progress=False), []

    def weights_of(*args):
        read.append(args)
        return deployed_weights(*args)

    monkeypatch.setattr("space_peft.modeling.checksum.deployed_weights", weights_of)
    trainer_for(model, tmp_path, callback).train()
    assert len(read) == 1
    held = callback.null_spaces
    trainer_for(model, tmp_path, callback).train()
    assert len(read) == 2 and callback.null_spaces is held
    change_norm(model)
    trainer_for(model, tmp_path, callback).train()
    assert len(read) == 3 and callback.null_spaces is not held
    before = base_checksum(model)
    change_embedding(model)
    assert base_checksum(model) != before  # Outside of a start nothing is kept.
    with pytest.raises(RuntimeError, match="stop"), weights_at_rest():
        base_checksum(model)
        raise RuntimeError("stop")
    before = base_checksum(model)
    change_embedding(model)
    assert base_checksum(model) != before


def test_other_data_in_the_same_callback_are_fitted(tmp_path):
    rows = list(RETAINED)
    callback = NullSpaceCallback(rows, progress=False)
    trainer_for(adapted(), tmp_path, callback).train()
    rows[:] = OTHER  # in place, behind the callback's back
    trainer_for(adapted(), tmp_path, callback).train()
    assert same_spaces(callback.null_spaces, spaces_of(adapted(), OTHER))
    callback.protect = [spaces_of(adapted())]
    trainer_for(adapted(), tmp_path, callback).train()
    assert same_spaces(callback.null_spaces, spaces_of(adapted(), OTHER, protect=callback.protect))


# Resuming


def first_half(folder, batches=RETAINED, **settings):
    callback = NullSpaceCallback(batches, progress=False)
    trainer_for(adapted(**settings), folder, callback, save_strategy="steps", save_steps=4, max_steps=4).train()
    return callback.null_spaces


@pytest.mark.parametrize(
    ("settings", "batches", "message"),
    [
        ({"strength": 0.001}, RETAINED, "`strength` is 0.3 in the null spaces, but 0.001"),
        ({"constraint": "hard", "energy": 0.5}, RETAINED, "`constraint` is 'soft' in the null spaces, but 'hard'"),
        ({"seed": 1}, RETAINED, "the base model's weights differ"),
        ({}, OTHER, "the retained data differ"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, settings, batches, message):
    first_half(tmp_path)
    trainer = trainer_for(adapted(**settings), tmp_path, NullSpaceCallback(batches, progress=False))
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    # Without the file it is fitted anew, and found to be another run all the same.
    (tmp_path / "checkpoint-4" / NULL_SPACES_NAME).unlink()
    trainer = trainer_for(adapted(**settings), tmp_path, NullSpaceCallback(batches, progress=False))
    with pytest.raises(ValueError, match="was trained under null spaces that were fitted for something else"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_folder_is_resumed_under_its_own_null_spaces(tmp_path):
    first_half(tmp_path / "a")
    theirs = first_half(tmp_path / "b", OTHER)
    callback = NullSpaceCallback(OTHER, progress=False)
    trainer_for(adapted(), tmp_path / "a", callback).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert same_spaces(callback.null_spaces, theirs)
    assert not same_spaces(callback.null_spaces, load_null_spaces(tmp_path / "a" / "checkpoint-4" / NULL_SPACES_NAME))
    # Also by a callback that holds those of a run before.
    held = NullSpaceCallback(RETAINED, progress=False)
    trainer_for(adapted(), tmp_path / "c", held).train()
    held.retain_dataloader = OTHER
    trainer_for(adapted(), tmp_path / "a", held).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert same_spaces(held.null_spaces, theirs)


# Files


def test_the_identity_survives_the_file_and_old_files_are_taken_with_a_warning(tmp_path):
    path, model = tmp_path / "spaces.safetensors", adapted()
    spaces = spaces_of(model)
    save_null_spaces(path, spaces)
    loaded = load_null_spaces(path)
    assert {space.identity for space in loaded.values()} == {next(iter(spaces.values())).identity}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("identities")
    save_file(load_file(path), path, metadata=metadata)
    old = load_null_spaces(path)
    assert {space.identity for space in old.values()} == {None}
    with pytest.warns(UserWarning, match=r"6 null spaces do not say what they were fitted on.*space-peft 0\.1\.0"):
        attach_null_space(model, torch.optim.SGD(trainable(model), lr=0.1), old)
    with pytest.raises(ValueError, match="`strength` is 0.3 in the null spaces, but 0.01"):
        model = adapted(strength=0.01)
        attach_null_space(model, torch.optim.SGD(trainable(model), lr=0.1), old)


@pytest.mark.parametrize("content", [[{"base": "x"}], [{"base": 3}], [7], {}, []])
def test_a_damaged_identity_is_refused(tmp_path, content):
    path = tmp_path / "spaces.safetensors"
    save_null_spaces(path, spaces_of(adapted()))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, "identities": json.dumps(content)})
    with pytest.raises(ValueError, match="Fit the null spaces again"):
        load_null_spaces(path)


def test_null_spaces_made_by_hand_are_taken_with_a_warning():
    model = adapted(target_modules=["q_proj"], strength=1.0, max_rank=None)
    space = NullSpaceFitter(48).update(torch.randn(200, 48)).fit("soft", strength=1.0)
    with pytest.warns(UserWarning, match="made by hand"):
        attach_null_space(model, torch.optim.SGD(trainable(model), lr=0.1), dict.fromkeys(adapted_layers(model), space))


# Once


def attach(model, spaces, **options):
    return attach_null_space(model, torch.optim.SGD(trainable(model), lr=0.1), spaces, **options)


def test_attaching_again_projects_nothing_again():
    model = adapted()
    spaces = spaces_of(model)
    start = weights(model)
    attach(model, spaces).remove()
    once = weights(model)
    assert not same(start, once)
    attach(model, spaces).remove()
    assert same(once, weights(model))
    # Under other null spaces they were not trained, nor are these still what was projected.
    attach(model, spaces_of(model, OTHER)).remove()
    assert not same(once, weights(model))
    free = adapted()
    attach(free, spaces).remove()
    for a in weights(free):
        free.get_parameter(a).data.normal_()
    loaded = weights(free)
    attach(free, spaces)
    assert not same(loaded, weights(free))


def test_a_config_that_serves_two_models_says_nothing_of_the_second():
    config = SpaceLoraConfig(r=4, target_modules=TARGETS, strength=0.3)
    models = [get_peft_model(tiny_llama(), config) for _ in range(2)]
    spaces = spaces_of(models[0])
    for model in models:
        start = weights(model)
        attach(model, spaces).remove()
        assert not same(start, weights(model))
    once = [weights(model) for model in models]
    for model, before in zip(models, once):
        attach(model, spaces)
        assert same(before, weights(model))
    assert config.projected is None


@pytest.mark.parametrize("adapter_name", ["default", "erase"])
@pytest.mark.parametrize("place", ["saved", "checkpoint"])
def test_training_goes_on_from_a_saved_folder_where_it_ended(tmp_path, place, adapter_name):
    model = adapted(adapter_name=adapter_name)
    callback = NullSpaceCallback(RETAINED, adapter_name=adapter_name, progress=False)
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4, "lr_scheduler_type": "constant"}
    trainer_for(model, tmp_path, callback, **options).train()
    model.save_pretrained(tmp_path / "saved")
    folder = tmp_path / ("saved" if place == "saved" else "checkpoint-4")
    folder = folder if adapter_name == "default" else folder / adapter_name
    config = SpaceLoraConfig.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny_llama(), folder, config=config, is_trainable=True)
    start = weights(loaded)
    trainer_for(loaded, tmp_path / "b", NullSpaceCallback(RETAINED, progress=False), learning_rate=0.0).train()
    assert same(start, weights(loaded))
    assert any(bool(b.any()) for b in weights(loaded, "lora_B").values())


def test_training_twice_projects_once(tmp_path):
    model, callback = adapted(), NullSpaceCallback(RETAINED, progress=False)
    trainer = trainer_for(model, tmp_path, callback)
    trainer.train()
    once = weights(model)
    trainer.args.learning_rate, trainer.optimizer, trainer.lr_scheduler = 0.0, None, None
    trainer.train()
    assert same(once, weights(model))


def test_the_best_checkpoint_is_not_projected_again(tmp_path):
    model, callback = adapted(), NullSpaceCallback(RETAINED, progress=False)
    arguments = trainer_for(model, tmp_path, callback).args.to_dict() | {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip
    rows = rows_of(FORGET)
    trainer = Trainer(
        model, TrainingArguments(**arguments), train_dataset=rows, eval_dataset=rows, callbacks=[callback]
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = weights(model)
    trainer.args.learning_rate, trainer.optimizer, trainer.lr_scheduler = 0.0, None, None
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert same(best, weights(model))


def test_a_damaged_note_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    content = json.loads((tmp_path / SPACE_CONFIG_NAME).read_text())
    assert content["projected"] is None
    (tmp_path / SPACE_CONFIG_NAME).write_text(json.dumps({**content, "projected": [1]}))
    with pytest.raises(ValueError, match="expected an object of digests"):
        SpaceLoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_the_digest_of_a_file_is_that_of_the_adapter(tmp_path, how):
    model = adapted()
    if how == "add_adapter":
        model = tiny_llama()
        model.add_adapter(SpaceLoraConfig(r=4, target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    digest = file_digest(tmp_path / "adapter_model.safetensors")
    assert digest == adapter_digest(model)
    lora_weights(next(iter(adapted_layers(model).values())))[1].data[0, 0] += 1e-3
    assert digest != adapter_digest(model)


def test_weights_that_left_the_null_space_are_not_published_as_constrained(tmp_path):
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with attach_null_space(model, optimizer, spaces_of(model)):
        train(model, optimizer, FORGET, steps=2)
    model.save_pretrained(tmp_path)
    check_projected(tmp_path)
    train(model, optimizer, FORGET, steps=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lora_A in adapter_model.safetensors is not the one that was"):
        check_projected(tmp_path)
    (tmp_path / SPACE_CONFIG_NAME).write_text('{"projected": 3}')
    with pytest.raises(ValueError, match="is not the one that was"):
        check_projected(tmp_path)


def test_layers_of_tied_weights_are_refused():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model = get_peft_model(model, SpaceLoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    message = "layer 'lm_head' shares its weight with 'model.embed_tokens'"
    with pytest.raises(ValueError, match=message):
        spaces_of(model)
    spaces = fit_null_space(
        untied := get_peft_model(tiny_llama(), model.peft_config["default"]), RETAINED, progress=False
    )
    assert fit_differences(untied, spaces) == []
    with pytest.raises(ValueError, match=message):
        attach_null_space(model, torch.optim.SGD(trainable(model), lr=0.1), spaces)


# Optimisers that keep two versions of the weights


class Averaging(torch.optim.SGD):
    """As a schedule-free optimiser: `eval` puts the average of all steps in place of the weights."""

    def eval(self):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.mul_(0.5)

    def train(self):
        pass


class Flagged(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.param_groups[0]["train_mode"] = True


@pytest.mark.parametrize("kind", [Averaging, Flagged])
@pytest.mark.parametrize("wrapped", [False, True])
def test_optimisers_with_two_versions_of_the_weights_are_refused(kind, wrapped):
    from accelerate import Accelerator

    model = adapted()
    spaces, before = spaces_of(model), weights(model)
    optimizer = kind(trainable(model), lr=0.1)
    if wrapped:
        optimizer = Accelerator(cpu=True).prepare(optimizer)
    with pytest.raises(ValueError, match=f"{kind.__name__} keeps two versions of the weights"):
        attach_null_space(model, optimizer, spaces)
    assert same(before, weights(model))
