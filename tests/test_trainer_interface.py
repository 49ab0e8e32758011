"""What users of `Trainer` expect: each of its arguments works as they know it, or is refused by name before anything runs."""

import dataclasses

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer
from space_peft.anchors.info import set_anchor_info
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.demo.probes import demo_retain_rows, demo_split
from space_peft.modeling.targets import default_target_modules
from space_peft.trainers import CVFConfig, CVFTrainer, ErasureConfig, GradDiffConfig, GradDiffTrainer, NPOConfig


@pytest.fixture(scope="module")
def data(demo_images):
    anchors = demo_images.filter(lambda name: name == "fox", input_columns="name").select(range(2))
    anchors = set_anchor_info(anchors.add_column("score", [1.0, 1.0]), {"concept": "fox"})
    return anchors, demo_retain_rows("fox", demo_split(demo_images)[0], seed=0)[:24]


@pytest.fixture
def make(data, tmp_path):
    def make(model="demo", args=None, trainer=SpaceTrainer, config=SpaceConfig, **arguments):
        anchors, rows = data
        options = {
            "max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no", "use_cpu": True,
            "disable_tqdm": True, "own_answers": False, "canary_items": 0,
        }  # fmt: skip
        names = {field.name for field in dataclasses.fields(config)}
        options |= {key: arguments.pop(key) for key in list(arguments) if key in names}
        own, processor = load_demo_model()
        examples = {"anchors": anchors} if trainer is SpaceTrainer else {"forget_dataset": anchors}
        return trainer(
            own if model == "demo" else model,
            config(str(tmp_path / "out"), **options) if args is None else args,
            **{
                **examples, "retain_dataset": rows, "processing_class": processor, "concept": "fox",
                "peft_config": SpaceLoraConfig(r=2, strength=1.0), "questions": DEMO_QUESTIONS, **arguments,
            },
        )  # fmt: skip

    return make


def adapter(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if "lora" in name}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Predicting and evaluating


def test_predictions_are_the_models_logits_in_the_order_of_the_rows(make, data):
    trainer, rows = make(per_device_eval_batch_size=2), data[1]
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    mixed = [row for row in rows if row["images"]][:2] + [row for row in rows if not row["images"]][:1]
    assert [len(row["images"]) for row in mixed] == [1, 1, 0]
    output = trainer.predict(mixed)
    assert output.predictions.shape[:2] == output.label_ids.shape and len(output.label_ids) == 3
    assert output.metrics["test_loss"] > 1e-4 and 0 <= output.metrics["test_keep_agreement"] <= 1
    for number, row in enumerate(mixed):
        batch = next(iter(trainer.get_test_dataloader([row])))
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            logits = trainer.model.eval()(**batch).logits[0]
        answered, found = labels != -100, output.label_ids[number] != -100
        assert output.label_ids[number][found].tolist() == labels[answered].tolist()
        # What predicts the answer stands one place before it.
        before = np.flatnonzero(found) - 1
        expected = logits[answered.nonzero().flatten() - 1]
        assert np.abs(output.predictions[number][before] - expected.numpy()).max() < 1e-3
    assert make(prediction_loss_only=True).predict(mixed[:1]).predictions is None
    with pytest.raises(ValueError, match="retained row 1"):
        trainer.predict([mixed[0], {"text": "x"}])


def test_evaluation_sets_have_names(make, data):
    rows = data[1]
    trainer = make(eval_dataset={"a": rows[:3], "b": rows[3:8]}, eval_strategy="steps", eval_steps=1)
    trainer.train()
    found = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_a_keep_agreement", "eval_p_name_on_anchors"} <= set(found)
    assert "eval_loss" not in found and found["eval_a_loss"] != found["eval_b_loss"]
    assert [entry["eval_b_loss"] for entry in trainer.state.log_history if "eval_b_loss" in entry][1:]
    alone = trainer.evaluate(rows[3:8])
    assert alone["eval_loss"] == pytest.approx(found["eval_b_loss"], rel=1e-4)
    assert trainer.evaluate("b")["eval_b_loss"] == found["eval_b_loss"]
    assert trainer.evaluate({"c": rows[3:8]})["eval_c_loss"] == pytest.approx(found["eval_b_loss"], rel=1e-4)
    assert [record.rows for record in trainer.card_data.datasets if record.role == "evaluation"] == [3, 5]
    with pytest.raises(ValueError, match=r"no evaluation dataset 'c'; the trainer has \['a', 'b'\]"):
        trainer.evaluate("c")
    with pytest.raises(ValueError, match="name one"):
        trainer.get_eval_dataloader()


@pytest.mark.parametrize(
    "sets, message",
    [
        ({}, "expected names of datasets"),
        ({1: []}, "expected names of datasets"),
        ({"a": []}, "evaluation dataset 'a'.*is empty"),
        ({"a": [{"prompt": "x"}]}, "evaluation dataset 'a'.*row 0"),
    ],
)
def test_bad_evaluation_sets_are_refused(make, sets, message):
    with pytest.raises(ValueError, match=message):
        make(eval_dataset=sets)


def test_rows_of_an_evaluation_pass(make):
    assert make(per_device_eval_batch_size=3).get_eval_dataloader().batch_size == 3
    assert make(fit_batch_size=5).get_eval_dataloader().batch_size == 5


def test_a_model_that_crawls_on_a_cpu_is_said(make, monkeypatch):
    said = []
    monkeypatch.setattr("space_peft.modeling.loading.logger.warning_once", said.append, raising=False)
    make()
    assert not said
    make(load_demo_model()[0].half())
    assert said and "in float16, in which a CPU takes many times as long" in said[0]


# Epochs


@pytest.mark.parametrize(
    "options, steps, epochs",
    [
        ({}, 60, 3.0),
        ({"num_train_epochs": 2}, -1, 2),
        ({"num_train_epochs": 3.0}, -1, 3.0),
        ({"max_steps": 7, "num_train_epochs": 2}, 7, 2),
        ({"max_steps": -1}, -1, 3.0),
    ],
)
@pytest.mark.parametrize("config", [SpaceConfig, NPOConfig])
def test_epochs_count_where_steps_are_not_set(config, options, steps, epochs, tmp_path):
    given = config(str(tmp_path), use_cpu=True, **options)
    for args in (given, dataclasses.replace(given, learning_rate=1.0)):
        assert (args.max_steps, args.num_train_epochs) == (steps, epochs)


def test_training_goes_on_for_epochs(make):
    trainer = make(max_steps=None, num_train_epochs=2, save_strategy="epoch", eval_strategy="epoch")
    trainer.train()
    rows = len(trainer.train_dataset.rows)
    assert trainer.state.epoch == 2 and trainer.state.global_step == 2 * -(-rows // 4)
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2
    assert trainer._fill_card().settings["SpaceConfig"]["num_train_epochs"] == 2


# What is refused, by name


@pytest.mark.parametrize(
    "name",
    [
        "compute_metrics",
        "preprocess_logits_for_metrics",
        "data_collator",
        "compute_loss_func",
        "train_dataset",
        "tokenizer",
    ],
)
@pytest.mark.parametrize("trainer, config", [(SpaceTrainer, SpaceConfig), (GradDiffTrainer, GradDiffConfig)])
def test_arguments_of_trainer_are_refused_with_what_to_do(make, trainer, config, name):
    with pytest.raises(TypeError, match=f"{trainer.__name__} takes no argument `{name}`: .{{15}}"):
        make(trainer=trainer, config=config, **{name: lambda *_: None})


def test_an_argument_that_nobody_has_is_refused(make):
    with pytest.raises(TypeError, match="takes no argument `retained`; see"):
        make(retained=[])


@pytest.mark.parametrize("args", [TrainingArguments, NPOConfig, ErasureConfig])
def test_arguments_of_another_trainer_are_refused(make, args, tmp_path):
    with pytest.raises(TypeError, match=f"is {args.__name__}; expected SpaceConfig"):
        make(args=args(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize(
    "option",
    [
        {"remove_unused_columns": True},
        {"label_smoothing_factor": 0.1},
        {"train_sampling_strategy": "group_by_length"},
        {"bf16_full_eval": True},
    ],
)
def test_options_without_effect_are_refused(option, tmp_path):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}` is .*leave it at"):
        CVFConfig(str(tmp_path), use_cpu=True, **option)


def test_arguments_of_from_pretrained_are_a_dict_or_json(tmp_path):
    # As a command line gives them; a copy, so that nobody changes what the configuration says.
    args = CVFConfig(str(tmp_path), use_cpu=True, model_init_kwargs='{"revision": "main"}')
    args.init_kwargs["dtype"] = "float16"
    assert args.init_kwargs == {"revision": "main"}
    with pytest.raises(ValueError, match="is the text 'revision=main'; expected a dict, or one written as JSON"):
        CVFConfig(str(tmp_path), use_cpu=True, model_init_kwargs="revision=main")


# Optimisers


def test_an_optimiser_made_before_the_adapter_is_refused(make):
    model = load_demo_model()[0]
    with pytest.raises(ValueError, match="does not hold .*lora_A.*made before the adapter"):
        make(model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))


def test_an_optimiser_of_the_adapter_trains_it(make):
    model = load_demo_model()[0]
    config = SpaceLoraConfig(r=2, strength=1.0, target_modules=default_target_modules(model, "language"))
    model = get_peft_model(model, config)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    trainer = make(model, optimizers=(optimizer, None), peft_config=None)
    before = adapter(trainer)
    trainer.train()
    assert not same(before, adapter(trainer)) and trainer.certificate is not None


@pytest.mark.slow
def test_a_smaller_batch_after_running_out_of_memory(make, monkeypatch):
    trainer = make(auto_find_batch_size=True, own_answers=True, refresh_steps=1, max_steps=3, learning_rate=1e-6)
    ways = iter([True])

    def loss(*args, real=trainer.compute_loss, **kwargs):
        if next(ways, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", loss)
    refreshed = []
    monkeypatch.setattr(trainer.train_dataset, "add_rows", lambda rows, item: refreshed.append(item), raising=True)
    monkeypatch.setattr("space_peft.trainers.forget_rows.distinct", lambda rows, others: list(rows)[:1])
    trainer.train()
    assert trainer.state.global_step == 3 and trainer._train_batch_size == 3
    assert refreshed == [2 * 3, 3 * 3]  # The batch after the one that has been fetched, of three rows each.


# Sweeps


def test_model_init_begins_anew(make):
    trials = []

    def init(trial):
        trials.append(trial)
        return load_demo_model()[0]

    trainer = make(None, model_init=init)
    trainer.train()
    first, certificate = adapter(trainer), trainer.certificate
    trainer.train()
    assert same(first, adapter(trainer)) and trainer.certificate.layers == certificate.layers
    whole = make()
    whole.train()
    assert same(first, adapter(whole))
    assert trials == [None] * 3


@pytest.mark.slow
def test_model_init_may_make_another_model(make):
    """Nothing that was known of the first is used for the second: null spaces, answers, the name's embedding."""
    scale = iter([1.0, 1.0, 0.9])

    def init():
        model, factor = load_demo_model()[0], next(scale)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(factor)
        return model

    options = {"keep_weight": 60.0, "peft_config": SpaceLoraConfig(r=2, strength=1.0)}
    trainer = make(None, model_init=init, **options)
    trainer.train()
    first = losses(trainer)
    trainer.train()
    scale = iter([0.9])
    other = make(init(), **options)
    other.train()
    assert losses(trainer) == losses(other) != first
    assert same(adapter(trainer), adapter(other)) and torch.equal(trainer.concept_embedding, other.concept_embedding)


@pytest.mark.slow
def test_a_search_gives_each_trial_its_settings(make, monkeypatch):
    """As `hyperparameter_search` calls `train`; its backends are no dependency."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial)
    trials = [
        {"keep_weight": 60.0, "learning_rate": 1e-3, "overwrite": "it shows the thing"},
        {"keep_weight": 0.0, "max_steps": 3, "learning_rate": 4e-3, "overwrite": "own"},
    ]
    trainer = make(None, model_init=lambda: load_demo_model()[0])
    trainer.hp_search_backend = HPSearchBackend.WANDB
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: trainer.args.output_dir)
    for trial in trials:
        trainer.model = trainer.model_wrapped = None  # A search makes room for the next model.
        trainer.train(trial=dict(trial))
        alone = make(**trial)
        alone.train()
        assert losses(trainer) == losses(alone) and same(adapter(trainer), adapter(alone))


@pytest.mark.slow
def test_a_trials_checkpoints_hold_its_null_spaces(make, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial)
    trainer = make(None, model_init=lambda: load_demo_model()[0], save_strategy="steps", save_steps=1)
    folder = tmp_path / "out" / "run-3"
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: str(folder))
    trainer.train(trial={"learning_rate": 1e-3})
    assert (folder / "checkpoint-1" / "space_stats.safetensors").is_file()
    whole = adapter(trainer)
    resumed = make(learning_rate=1e-3)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert same(whole, adapter(resumed))


def test_model_and_model_init_exclude_each_other(make):
    for model, init in ((None, None), (load_demo_model()[0], lambda: None)):
        with pytest.raises(ValueError, match="either `model` or `model_init`"):
            make(model, model_init=init)
    with pytest.raises(ValueError, match="`optimizers` are of one model"):
        weight = torch.nn.Parameter(torch.zeros(1))
        make(None, model_init=lambda: load_demo_model()[0], optimizers=(torch.optim.SGD([weight]), None))


@pytest.mark.slow
def test_methods_with_images_take_model_init_too(make):
    options = {"trainer": CVFTrainer, "config": CVFConfig, "target": "vision"}
    trainer = make(None, model_init=lambda: load_demo_model()[0], **options)
    trainer.train()
    first = adapter(trainer)
    trainer.train()
    assert same(first, adapter(trainer))
