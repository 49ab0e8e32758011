"""Adapters that come along with a model: which one is ours, what the model is without it, and what may be trained on."""

import json
import logging
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from test_projection import FORGET, trainer_for
from tiny_models import text_batch, tiny_llama, tiny_llava

from space_peft import NullSpaceCallback, SpaceConfig, SpaceLoraConfig, SpaceTrainer, fit_null_space
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.hub_cards import write_card
from space_peft.hub_cards.staging import stage
from space_peft.modeling.layers import adapted_layers, deployed_model, lora_weights, our_adapter
from space_peft.modeling.targets import default_target_modules
from space_peft.records.folder import MEASURED_NAME, SPACE_CONFIG_NAME
from space_peft.records.measured import check_measured, note_measured, other_weights, remove_results, saved_digest
from space_peft.trainers.given_adapter import add_adapter, adopt, check_bare


TARGETS = ["q_proj", "v_proj"]
BATCH = text_batch()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=BATCH["input_ids"]).logits


def lively(model, name="default"):
    """An adapter as after training: B is not 0."""
    generator = torch.Generator().manual_seed(3)
    for layer in adapted_layers(model, name).values():
        b = lora_weights(layer, name)[1].data
        b.copy_(0.3 * torch.randn(b.shape, generator=generator))
    return model


def with_task(model, on=("default", "task"), config=LoraConfig):
    """A frozen adapter for a task beside the one that is there."""
    model.add_adapter("task", config(r=2, target_modules=["q_proj", "up_proj"]))
    lively(model, "task")
    model.base_model.set_adapter(list(on))
    for name, weight in model.named_parameters():
        if ".task." in name:
            weight.requires_grad_(False)
    return model


# Which adapter is ours, and the model without it


@pytest.mark.parametrize("ours", [SpaceLoraConfig, LoraConfig])
@pytest.mark.parametrize("order", [("default", "task"), ("task", "default")])
def test_the_deployed_model_is_the_one_without_our_adapter_alone(ours, order):
    model = with_task(get_peft_model(tiny_llama(), ours(r=4, target_modules=TARGETS)), on=order)
    expected = logits(model)  # ours does nothing yet
    lively(model)
    both = logits(model)
    states = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert our_adapter(model) == "default"
    with deployed_model(model) as deployed:
        torch.testing.assert_close(logits(deployed), expected)
    with deployed_model(model, adapted=True) as deployed:
        torch.testing.assert_close(logits(deployed), both)
    assert (both - expected).abs().max() > 0.1 < (logits(tiny_llama()) - expected).abs().max()
    torch.testing.assert_close(logits(model), both)
    assert states == {name: weight.requires_grad for name, weight in model.named_parameters()}


def test_an_adapter_that_is_off_or_of_another_name_does_not_matter():
    model = with_task(get_peft_model(tiny_llama(), SpaceLoraConfig(r=4, target_modules=TARGETS)), on=("default",))
    with deployed_model(lively(model)) as deployed:
        torch.testing.assert_close(logits(deployed), logits(tiny_llama()))
    named = lively(
        get_peft_model(tiny_llama(), SpaceLoraConfig(r=4, target_modules=TARGETS), adapter_name="erase"), "erase"
    )
    assert our_adapter(named) == "erase" and our_adapter(tiny_llama()) is None
    with deployed_model(named) as deployed:
        torch.testing.assert_close(logits(deployed), logits(tiny_llama()))


def test_several_adapters_of_which_none_is_ours_are_refused():
    model = with_task(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=TARGETS)))
    for weight in model.parameters():
        weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"2 adapters are on \('default', 'task'\)"), deployed_model(model):
        pass
    with deployed_model(model, adapted=True) as deployed:
        assert deployed is model


def test_null_spaces_are_those_of_the_model_with_its_task_adapter(tmp_path):
    def build():
        torch.manual_seed(1)
        return with_task(get_peft_model(tiny_llama(), SpaceLoraConfig(r=4, target_modules=TARGETS, strength=0.3)))

    merged = build()
    merged.base_model.set_adapter(["task"])
    merged = get_peft_model(
        merged.merge_and_unload(adapter_names=["task"]), SpaceLoraConfig(r=4, target_modules=TARGETS, strength=0.3)
    )
    expected, spaces = fit_null_space(merged, [BATCH], progress=False), fit_null_space(build(), [BATCH], progress=False)
    for name, space in spaces.items():
        torch.testing.assert_close(space.eigenvalues, expected[name].eigenvalues, rtol=1e-3, atol=1e-3)
    model = build()
    trainer_for(model, tmp_path, NullSpaceCallback([BATCH], progress=False)).train()
    task = {name: weight for name, weight in build().named_parameters() if ".task." in name}
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in task.items())


# What a trainer takes


def space(**settings):
    return SpaceLoraConfig(**{"r": 4, "target_modules": TARGETS, "strength": 0.3, **settings})


def loaded_plainly(folder, model=None):
    lively(model or get_peft_model(tiny_llama(), space())).save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)


def test_the_constraint_is_restored_from_the_folder_that_the_weights_are_in(tmp_path):
    model = loaded_plainly(tmp_path)
    assert not isinstance(model.peft_config["default"], SpaceLoraConfig)
    adopt(model, None, str(tmp_path))
    config = model.peft_config["default"]
    assert isinstance(config, SpaceLoraConfig) and config.strength == 0.3 and not config.inference_mode


def test_the_constraint_is_restored_from_a_config_of_the_same_adapter(tmp_path):
    model = loaded_plainly(tmp_path)
    for other, message in (
        (space(r=8), "its `r` is 8, the adapter's is 4"),
        (space(target_modules=["q_proj"]), "target"),
    ):
        with pytest.raises(ValueError, match=message):
            adopt(model, other, str(tmp_path / "b"))
    assert not isinstance(model.peft_config["default"], SpaceLoraConfig)
    adopt(model, SpaceLoraConfig.from_pretrained(tmp_path), str(tmp_path / "b"))
    assert model.peft_config["default"].strength == 0.3


@pytest.mark.parametrize("left", ["nothing", "another adapter"])
def test_an_adapter_of_unknown_constraint_is_refused(tmp_path, left):
    model = loaded_plainly(tmp_path / "a")
    if left == "another adapter":
        get_peft_model(tiny_llama(), space()).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="nothing says under which constraint it is to be trained"):
        adopt(model, None, str(tmp_path / "b"))
    # Unless it is said to be meant so, or it was never trained.
    config = model.peft_config["default"]
    adopt(model, config, str(tmp_path / "b"))
    assert model.peft_config["default"] is config
    adopt(get_peft_model(tiny_llama(), LoraConfig(target_modules=TARGETS)), None, str(tmp_path / "b"))


def test_a_plain_trainer_refuses_it_too(tmp_path):
    model = loaded_plainly(tmp_path / "a")
    with pytest.raises(TypeError, match=r"has a LoraConfig.*config=SpaceLoraConfig\.from_pretrained\(folder\)"):
        trainer_for(model, tmp_path / "b", NullSpaceCallback([FORGET])).train()


def native(how):
    model = tiny_llama()
    if how == "add_adapter":
        model.add_adapter(space(), "mine")
    elif how == "inject":
        inject_adapter_in_model(LoraConfig(target_modules=TARGETS), model, "mine")
    return model


@pytest.mark.parametrize("how", ["add_adapter", "load_adapter", "inject"])
def test_models_with_an_adapter_inside_are_refused(tmp_path, how):
    model = native(how)
    if how == "load_adapter":
        get_peft_model(tiny_llama(), space()).save_pretrained(tmp_path)
        model.load_adapter(str(tmp_path), "mine")
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM with the adapter 'mine' in it.*merge_and_unload"):
        check_bare(model)
    check_bare(tiny_llava())
    check_bare(get_peft_model(tiny_llama(), space()).unload())


@pytest.mark.parametrize(
    "settings", [{"layers_to_transform": [0]}, {"layers_pattern": "layers", "layers_to_transform": 1}]
)
@pytest.mark.parametrize("kind", [SpaceLoraConfig, LoraConfig])
def test_layers_without_modules_are_refused(kind, settings):
    with pytest.raises(ValueError, match="`layers_to_transform` is .*`target_modules` is not set"):
        add_adapter(tiny_llava(), kind(r=2, **settings), "language", "out")
    model = add_adapter(tiny_llava(), kind(r=2, target_modules=["q_proj"], layers_to_transform=[0]), "language", "out")
    assert adapted_layers(model) and all("layers.0." in name for name in adapted_layers(model))


def test_the_adapter_to_train_is_the_default_one():
    named = get_peft_model(tiny_llama(), space(), adapter_name="erase")
    with pytest.raises(
        ValueError, match=r"must be called 'default' and be on; the model has 'erase', of which 'erase'"
    ):
        adopt(named, None, "out")
    second = with_task(get_peft_model(tiny_llama(), space()), on=("task",))
    with pytest.raises(ValueError, match=r"the model has 'default', 'task', of which 'task' is on"):
        adopt(second, None, "out")
    with pytest.warns(UserWarning, match="the adapter 'task' is on as well"):
        adopt(with_task(get_peft_model(tiny_llama(), space())), None, "out")


# Results belong to weights


def folder_with(folder, *results):
    lively(get_peft_model(tiny_llama(), space())).save_pretrained(folder)
    for name in results:
        (folder / name).write_text("{}")
    return folder


def change_weights(folder):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    first = next(iter(weights))
    save_file({**weights, first: weights[first] + 1e-3}, path)


@pytest.mark.parametrize("name", ["report.json", "space_certificate.json", "space_canary.json", "attacks.json"])
def test_results_of_other_weights_are_neither_shown_nor_published(tmp_path, name):
    folder = folder_with(tmp_path / "a", name)
    note_measured(folder, {name: saved_digest(folder)})
    check_measured(folder)
    change_weights(folder)
    assert other_weights(folder) == [name]
    for use in (
        lambda: write_card(folder, base_model="org/base"),
        lambda: stage(folder, tmp_path / "b", base_model="org/b"),
    ):
        with pytest.raises(ValueError, match=f"{name} in .* was measured on other weights than those in adapter_model"):
            use()
    (folder / name).unlink()
    assert other_weights(folder) == []


def test_results_left_behind_are_removed(tmp_path):
    results = ("report.json", "report.md", "answers_after.jsonl", "space_certificate.json", "attacks.json")
    folder = folder_with(tmp_path, *results)
    note_measured(folder, {"space_certificate.json": saved_digest(folder), "report.json": "another"})
    remove_results(folder, saved_digest(folder), before=None)
    assert {path.name for path in folder.iterdir()} & set(results) == {"space_certificate.json", "attacks.json"}
    assert list(json.loads((folder / MEASURED_NAME).read_text())) == ["space_certificate.json"]
    # Of what nothing is noted, the older goes.
    remove_results(folder, saved_digest(folder), before=(folder / "attacks.json").stat().st_mtime)
    assert (folder / "attacks.json").exists()
    remove_results(folder, "another", before=(folder / "attacks.json").stat().st_mtime + 1)
    assert not {path.name for path in folder.iterdir()} & {*results, MEASURED_NAME}


def test_damaged_notes_are_refused(tmp_path):
    folder = folder_with(tmp_path, "report.json")
    (folder / MEASURED_NAME).write_text('{"report.json": 3}')
    with pytest.raises(ValueError, match="must map files to digests"):
        check_measured(folder)


# With the trainer


def trainer_of(data, folder, model=None, **options):
    base, processor = load_demo_model()
    options = {
        "max_steps": 2, "learning_rate": 5e-3, "per_device_train_batch_size": 2, "report_to": "none", "canary_items": 0,
        "own_answers": False, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, **options,
    }  # fmt: skip
    peft_config = options.pop("peft_config", SpaceLoraConfig(r=2, strength=1.0) if model is None else None)
    probes = options.pop("probes", None)
    return SpaceTrainer(
        model=base if model is None else model, args=SpaceConfig(output_dir=str(folder), **options), anchors=data[0],
        retain_dataset=data[1][:40], processing_class=processor, peft_config=peft_config, questions=DEMO_QUESTIONS,
        probes=probes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def erased(demo_erasure_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("erased")
    trainer = trainer_of(demo_erasure_data, folder)
    trainer.train()
    trainer.save_model()
    return folder


def test_a_second_run_in_the_same_folder_is_constrained_and_leaves_its_own_results(erased, demo_erasure_data, tmp_path):
    folder = shutil.copytree(erased, tmp_path / "a")
    first = json.loads((folder / "space_certificate.json").read_text())
    (folder / "report.json").write_text("{}")
    os.utime(folder / "report.json", times=(1e9, 1e9))
    model = PeftModel.from_pretrained(load_demo_model()[0], folder, is_trainable=True)
    trainer = trainer_of(demo_erasure_data, folder, model)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_A" in name}
    trainer.args.learning_rate = 0.0
    trainer.train()
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in start.items()), "projected again"
    assert trainer.null_spaces and trainer.certificate is not None
    trainer.save_model()
    assert json.loads((folder / SPACE_CONFIG_NAME).read_text())["strength"] == 1.0
    assert not (folder / "report.json").exists()
    check_measured(folder)
    assert json.loads((folder / "space_certificate.json").read_text())["layers"][0]["change"] == pytest.approx(
        first["layers"][0]["change"], rel=1e-4
    )


def test_training_without_the_constraint_leaves_no_claim_of_one(erased, demo_erasure_data, tmp_path, caplog):
    folder = shutil.copytree(erased, tmp_path / "a")
    model = PeftModel.from_pretrained(load_demo_model()[0], folder, is_trainable=True)
    trainer = trainer_of(demo_erasure_data, folder, model, peft_config=model.peft_config["default"], max_steps=1)
    trainer.train()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        trainer.save_model()
    finally:
        logger.removeHandler(caplog.handler)
    assert "this adapter is trained without a constraint" in caplog.text
    assert "it was measured on other weights than those saved now" in caplog.text
    left = {path.name for path in folder.iterdir()}
    assert not left & {SPACE_CONFIG_NAME, "space_certificate.json", "space_stats.safetensors", MEASURED_NAME}


def test_the_report_is_that_of_the_checkpoint_which_is_loaded_at_the_end(demo_erasure_data, demo_images, tmp_path):
    import dataclasses

    from space_peft.demo.probes import demo_probes

    probes = [dataclasses.replace(probe, rows=probe.rows[:2]) for probe in demo_probes("fox", demo_images)]
    trainer = trainer_of(
        demo_erasure_data, tmp_path, probes=probes, max_steps=2, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rsplit("-")[-1])
    assert trainer.state.global_step == 2 and best == 1
    trainer.save_model()
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["steps"] == best
    check_measured(tmp_path)
    for step in (1, 2):
        report = json.loads((tmp_path / f"checkpoint-{step}" / "report.json").read_text())
        assert report["settings"]["steps"] == step
    # Weights that nobody evaluated have no report.
    lora_weights(next(iter(adapted_layers(trainer.model).values())))[1].data.add_(1e-3)
    trainer.save_model()
    assert not {"report.json", "report.md", "space_certificate.json"} & {path.name for path in tmp_path.iterdir()}


def test_a_frozen_task_adapter_belongs_to_what_is_kept(demo_erasure_data, tmp_path):
    model = load_demo_model()[0]
    targets = default_target_modules(model, "language")
    model = get_peft_model(model, SpaceLoraConfig(r=2, target_modules=targets, strength=1.0))
    model.add_adapter("task", LoraConfig(r=2, target_modules=targets))
    lively(model, "task")
    model.base_model.set_adapter(["default", "task"])
    for name, weight in model.named_parameters():
        weight.requires_grad_(".default." in name)
    with pytest.warns(UserWarning, match="the adapter 'task' is on as well"):
        trainer = trainer_of(demo_erasure_data, tmp_path, model, max_steps=1)
    metrics = trainer.evaluate()
    assert abs(metrics["eval_loss"]) < 1e-4 and metrics["eval_keep_agreement"] == 1.0
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "task" / "adapter_config.json").is_file()
