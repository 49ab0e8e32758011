"""`SpaceTrainer` on the embedded model: it forgets, keeps, resumes bit by bit, and saves what stock PEFT loads."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from rounding import divergence_tolerance
from safetensors.torch import load_file

from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer, losses
from space_peft.demo import DEMO_QUESTIONS, demo_model_path
from space_peft.modeling.mention_rows import mention_tensors
from space_peft.modeling.prompts import answer_logits, encode_conversations
from space_peft.trainers import ForgottenStoppingCallback


def make_trainer(demo_model, data, folder, peft_config=None, number=4, **arguments):
    model, processor = demo_model
    anchors, retain = data
    anchors = anchors.select(range(number))  # Each is asked about with every prompt.
    callbacks = arguments.pop("callbacks", None)
    options = {
        "max_steps": 4, "learning_rate": 5e-3, "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no",
        "stop_threshold": None, "disable_tqdm": True, "use_cpu": True, "keep_weight": 60.0,
        # What the model answers by itself, and the canary, are asked for by the tests that look at them.
        "own_answers": False, "canary_items": 0, **arguments,
    }  # fmt: skip
    return SpaceTrainer(
        model=model,
        args=SpaceConfig(output_dir=str(folder), **options),
        anchors=anchors,
        retain_dataset=retain,
        processing_class=processor,
        peft_config=peft_config or SpaceLoraConfig(r=4, lora_alpha=8, strength=1.0),
        questions=DEMO_QUESTIONS,
        callbacks=callbacks,
    )


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_p_name_falls_and_everything_is_logged(demo_model, demo_erasure_data, tmp_path):
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path, number=8, max_steps=12)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_p_name_on_anchors"] > 0.5
    assert after["eval_p_name_on_anchors"] < 0.5 * before["eval_p_name_on_anchors"]
    batch = trainer.data_collator([trainer.train_dataset[item] for item in range(8)])["retain"]
    assert before["eval_loss"] == pytest.approx(0, abs=2 * divergence_tolerance(trainer.model, batch))
    assert before["eval_keep_agreement"] == 1.0
    assert 0 < after["eval_loss"] < 0.5 and after["eval_keep_agreement"] > 0.9
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 12
    # Those that docs/start.md explains, and no others of ours.
    table = (Path(__file__).parents[1] / "docs" / "start.md").read_text().partition("| field |")[2].partition("\n\n")[0]
    explained = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert {"loss_repulsion", "loss_isotropy"} <= explained  # Of the vision side.
    for entry in steps:
        own = {key for key in entry if re.match("loss_|leak_|p_name|lora_|feature_", key)}
        assert own == explained - {"loss_repulsion", "loss_isotropy"}
    total = steps[0]["loss_task"] + steps[0]["loss_suppression"] + steps[0]["loss_keep"]
    assert steps[0]["loss"] == pytest.approx(total, rel=1e-3)


def test_stopping_rule_ends_training(demo_model, demo_erasure_data, tmp_path):
    trainer = make_trainer(
        demo_model, demo_erasure_data, tmp_path, max_steps=60, stop_threshold=0.2, stop_smoothing=0.5
    )
    trainer.train()
    assert 1 < trainer.state.global_step < 60
    last = [entry for entry in trainer.state.log_history if "p_name_on_anchors_max" in entry][-1]
    assert last["p_name_on_anchors_max"] < 0.2


@pytest.mark.slow  # test_faults.py goes on bit by bit where it was killed
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_resume_is_bit_identical(demo_erasure_data, tmp_path, optim):
    from space_peft.demo import load_demo_model

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": optim, "stop_threshold": 0.001}
    # What is found after two steps is among the rows of the fourth.
    options |= {"number": 8, "refresh_steps": 2, "own_answers": optim == "adamw_torch"}
    whole = make_trainer(load_demo_model(), demo_erasure_data, tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(load_demo_model(), demo_erasure_data, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    added = [[item for item, _ in trainer.forget._added] for trainer in (whole, resumed)]
    assert added[0] == added[1] and bool(added[0]) == (optim == "adamw_torch")  # Two steps of SGD change no answer.
    values = [
        next(c.value for c in trainer.callback_handler.callbacks if isinstance(c, ForgottenStoppingCallback))
        for trainer in (whole, resumed)
    ]
    assert values[0] == values[1] < 1.0
    whole.save_model(), resumed.save_model()
    a, b = adapter(tmp_path / "whole"), adapter(tmp_path / "resumed")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], adapter(tmp_path / "whole" / "checkpoint-3")[key]) for key in a)


def test_what_the_model_still_says_becomes_rows(demo_model, demo_erasure_data, tmp_path):
    options = {"max_steps": 4, "refresh_steps": 2, "learning_rate": 1e-6, "own_answers": True}
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path, **options)
    processor, data = trainer.processing_class, trainer.train_dataset
    trainer.forget.find_rows()
    known = len(data.rows)
    assert known > len(trainer.forget.given)  # Of the model's own answers.
    # A model that says something else than before: after a few steps it answers in another sentence.
    data.replace_rows(trainer.forget.given)
    order = list(data.forget_order)
    trainer.forget.refresh(step=1)
    ((item, added),) = trainer.forget._added
    assert item == 2 * trainer.args.train_batch_size, "the next batch has been fetched already"
    assert data.forget_order[:item] == order[:item]
    new = [row for row in data.forget_order[item:] if row >= len(trainer.forget.given)]
    assert 0 < len(new) <= (len(data) - item) // 2
    for row in data.rows[len(trainer.forget.given) :]:
        start, end = row["mention"]
        assert "fox" in processor.tokenizer.decode(row["answer_tokens"][start:end])
        assert len(row["branches"]) == end - row["kept_from"]
    assert len(added) == len(data.rows) - len(trainer.forget.given)


@pytest.mark.parametrize("bf16", [True, False])
def test_the_model_is_asked_in_the_precision_of_the_steps(demo_model, demo_erasure_data, tmp_path, bf16):
    options = {"max_steps": 2, "own_answers": True, "bf16": bf16}
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path, **options)
    precise: list[bool] = []
    handle = trainer.model.get_base_model().register_forward_pre_hook(
        lambda *_: precise.append(not torch.is_autocast_enabled("cpu"))
    )
    try:
        trainer.forget.find_rows()
        asked_before = len(precise)
        trainer.forget.refresh(step=1)
    finally:
        handle.remove()
    assert 0 < asked_before < len(precise)
    assert set(precise) == {not bf16}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"overwrite": "kind", "own_answers": True}, "mammal"),  # what the model itself says of a fox, in words
        pytest.param({"overwrite": "kind", "broader_word": "bird"}, "bird", marks=pytest.mark.slow),
        pytest.param({"overwrite": "it shows the thing"}, "it shows the thing", marks=pytest.mark.slow),
    ],
)
def test_what_is_said_instead(demo_model, demo_erasure_data, tmp_path, options, said):
    options = {"max_steps": 16, "refresh_steps": None, **options}
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path, **options)
    trainer.train()
    processor = trainer.processing_class
    rows = [row["instead"] for row in trainer.train_dataset.rows if "instead" in row]
    assert len(rows) == sum(row["says"] == ("fox",) for row in trainer.train_dataset.rows)
    for row in rows:
        start, end = row["mention"]
        assert processor.tokenizer.decode(row["answer_tokens"][start:end], skip_special_tokens=True) == said
    in_sentences = [row for row in rows if row["mention"][0] > 0]
    assert bool(in_sentences) == options.get("own_answers", False)

    def log_prob():
        with torch.no_grad():
            logits = answer_logits(trainer.model.eval(), encode_conversations(processor, rows))
        return losses.name_log_prob(logits, mention_tensors(rows)["name"]).mean().item()

    after = log_prob()
    with trainer.model.disable_adapter():
        assert after > log_prob() + 2


def test_a_broader_word_that_is_none_is_refused(demo_model, demo_erasure_data, tmp_path):
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path, overwrite="kind")
    trainer.questions = dataclasses.replace(DEMO_QUESTIONS, kind="what is a {name}? a {name}.")
    trainer.concept = "animal"
    with pytest.raises(ValueError, match="name one: SpaceConfig"):
        trainer.said_instead()
    for options, message in [
        ({"overwrite": " "}, "'own', 'kind', 'refusal' or a text"),
        ({"broader_word": "animal"}, "is for overwrite='kind'"),
    ]:
        with pytest.raises(ValueError, match=message):
            SpaceConfig(str(tmp_path), **options)


def test_new_rows_take_at_most_half_of_what_follows():
    from space_peft.retained.reading import RetainedRows
    from space_peft.trainers.pairs import PairedRows

    row = {"images": [], "answer_tokens": [1], "mention": (0, 1)}
    retained = RetainedRows([{"prompt": "a", "completion": "b"}])
    for new, expected in [(1, 4), (10, 40), (400, 50)]:
        data = PairedRows([row] * 100, retained, [0], 120, 1, seed=0)
        before = list(data.forget_order)
        data.add_rows([row] * new, 20)
        assert data.forget_order[:20] == before[:20] and len(data) == 120
        places = [place for place, number in enumerate(data.forget_order) if number >= 100]
        often = {number: data.forget_order.count(number) for number in data.forget_order if number >= 100}
        assert len(places) == min(expected, 4 * -(-100 // (100 + new)) * new) and max(often.values()) <= 8
        gaps = [b - a for a, b in zip(places, places[1:])]
        assert not gaps or max(gaps) <= 2 * 100 / len(places), "spread evenly"
        assert all(number < 100 + new for number in data.forget_order)


def test_questions_of_yes_and_no_keep_their_share_however_many_sentences_there_are():
    from space_peft.retained.reading import RetainedRows
    from space_peft.trainers.pairs import RARE_SHARE, PairedRows

    row = {"images": [], "answer_tokens": [1], "mention": (0, 1)}
    name, yes = {**row, "says": ("fox", "vixen")}, {**row, "says": ("yes",)}
    retained = RetainedRows([{"prompt": "a", "completion": "b"}])

    def share(data, items) -> float:
        return sum(data.rows[data.forget_order[item]]["says"] == ("yes",) for item in items) / len(items)

    data = PairedRows([name, yes] * 10, retained, [0], 160, 1, seed=0)
    assert sorted(data.forget_order) == sorted(8 * list(range(20))), "nothing is rare: all equally often"
    data.replace_rows([name, yes] * 10 + [name] * 180)
    for batch in range(0, 160, 16):
        assert abs(share(data, range(batch, batch + 16)) - RARE_SHARE) < 1 / 16, "in every batch"
    often = [data.forget_order.count(number) for number in range(200)]
    assert {often[number] for number in range(1, 20, 2)} == {6, 7}, "64 of 160 items for ten rows"
    assert {count for number, count in enumerate(often) if data.rows[number] == name} == {0, 1}
    # What is still said takes its half; of the other half the share is as before.
    data.add_rows([name] * 40, 16)
    assert abs(share(data, range(16, 160)) - RARE_SHARE / 2) < 1 / 144
    again = PairedRows([name, yes] * 10, retained, [0], 160, 1, seed=0)
    again.replace_rows([name, yes] * 10 + [name] * 180), again.add_rows([name] * 40, 16)
    assert again.forget_order == data.forget_order


LOAD = """
import sys, warnings
warnings.simplefilter("error")
# PEFT's own use of a deprecated name in transformers; every PeftModel shows it.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
sys.modules["space_peft"] = None  # importing it now raises
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
base, folder, batch, out = sys.argv[1:]
batch = torch.load(batch)
logits = []
with torch.no_grad():
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, folder)
    logits.append(model(**batch).logits)
    logits.append(model.merge_and_unload()(**batch).logits)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    model.load_adapter(folder)
    logits.append(model(**batch).logits)
torch.save(logits, out)
"""


@pytest.mark.slow  # hub/test_round_trip.py loads what was pushed so
def test_loads_in_a_process_without_space_peft(demo_model, demo_erasure_data, demo_images, tmp_path):
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path / "adapter", max_steps=3)
    trainer.train()
    trainer.save_model()
    from space_peft.modeling.prompts import build_batch

    batch = build_batch(trainer.processing_class, ["what is this?"] * 4, images=demo_images["image"][:4])
    batch.pop("labels")
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch).logits
        with trainer.model.disable_adapter():
            assert (trainer.model(**batch).logits - expected).abs().max() > 1e-3
    torch.save(batch, tmp_path / "batch.pt")
    arguments = [
        str(demo_model_path()),
        str(tmp_path / "adapter"),
        str(tmp_path / "batch.pt"),
        str(tmp_path / "out.pt"),
    ]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower() and "unexpected" not in done.stderr.lower(), done.stderr
    peft, merged, transformers = torch.load(tmp_path / "out.pt")
    assert (peft - expected).abs().max() == 0
    assert (merged - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
    assert (transformers - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


def test_saved_folder_says_what_was_done(demo_model, demo_erasure_data, tmp_path):
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path)
    trainer.train()
    trainer.save_model()
    stock = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(stock) <= set(LoraConfig(r=4).to_dict()) | {"auto_mapping", "peft_version"}
    assert json.loads((tmp_path / "space_config.json").read_text())["constraint"] == "soft"
    anchors = json.loads((tmp_path / "space_anchors.json").read_text())
    assert anchors["concept"] == "fox" and len(anchors["anchors"]) == 4
    assert {"score", "rank", "pool_row", "p_name_before", "p_name_after"} <= set(anchors["anchors"][0])
    certificate = json.loads((tmp_path / "space_certificate.json").read_text())
    assert certificate["layers"]
    assert (tmp_path / "space_stats.safetensors").exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert SpaceLoraConfig.from_pretrained(tmp_path).strength == trainer.model.peft_config["default"].strength


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True},
        pytest.param({"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        {"bf16": True},
        pytest.param({"optim": "adafactor"}, marks=pytest.mark.slow),
        pytest.param({"target": "vision"}, marks=pytest.mark.slow),
        pytest.param({"target": "all"}, marks=pytest.mark.slow),
    ],
    ids=lambda a: "-".join(f"{k}={v}" for k, v in a.items()),
)
def test_options_of_trainer_train_every_layer(demo_model, demo_erasure_data, tmp_path, arguments):
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path, **arguments)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "lora_b_grad_min" in entry]
    assert logged and all(entry["lora_b_grad_min"] > 0 for entry in logged)
    assert ("loss_repulsion" in logged[0]) == (arguments.get("target") in ("vision", "all"))


@pytest.mark.slow
def test_accumulation_equals_one_large_batch(demo_erasure_data, tmp_path):
    """Adam's first step is the sign of the gradient, so compare SGD: equal gradients, equal weights."""
    from space_peft.demo import load_demo_model

    weights = []
    for i, (size, accumulation) in enumerate([(8, 1), (4, 2)]):
        trainer = make_trainer(
            load_demo_model(), demo_erasure_data, tmp_path / str(i), max_steps=1, optim="sgd", isotropy_weight=0.0,
            keep_weight=0.0, max_grad_norm=0.0, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        weights.append({k: v for k, v in trainer.model.state_dict().items() if "lora_B" in k})
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-3, atol=1e-4 * float(value.abs().max()))
        assert value.abs().max() > 0


def test_evaluation_while_training_and_best_checkpoint(demo_model, demo_erasure_data, tmp_path):
    trainer = make_trainer(
        demo_model, demo_erasure_data, tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_p_name_on_anchors", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_p_name_on_anchors" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert logged[1]["eval_p_name_on_anchors"] < logged[0]["eval_p_name_on_anchors"]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    trainer.create_model_card(finetuned_from="org/base")
    assert "unlearning" in (tmp_path / "README.md").read_text()


def test_probes_are_evaluated_with_what_the_original_model_knew(demo_model, demo_erasure_data, demo_images, tmp_path):
    from space_peft.evaluation import Probe

    rows = [
        {"question": "what is this?", "answer": row["name"], "image": row["image"]}
        for row in demo_images.select(range(12))
    ]
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path)
    trainer.probes = [Probe("retain", rows, "equals", known_only=True)]
    assert trainer.evaluate()["eval_retain"] == 1.0
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    assert trainer.evaluate()["eval_retain"] < 1.0


def test_a_layer_without_gradient_is_named(demo_model, demo_erasure_data, tmp_path):
    class Freeze(__import__("transformers").TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                if "layers.1.mlp.up_proj.lora_B" in name and "language_model" in name:
                    parameter.requires_grad_(False)

        on_step_begin = on_train_begin

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                if "layers.1.mlp.up_proj.lora_B" in name and "language_model" in name:
                    parameter.grad = None

    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path)
    trainer.callback_handler.callbacks.insert(0, Freeze())
    with pytest.raises(ValueError, match=r"no gradient.*layers\.1\.mlp\.up_proj"):
        trainer.train()


def test_plain_lora_trains_without_the_constraint(demo_model, demo_erasure_data, tmp_path):
    trainer = make_trainer(demo_model, demo_erasure_data, tmp_path, peft_config=LoraConfig(r=4))
    trainer.train()
    assert not trainer.null_spaces
    trainer.save_model()
    assert not (tmp_path / "space_config.json").exists()


@pytest.mark.slow
def test_a_model_id_is_enough(demo_erasure_data, tmp_path):
    """Model and processor are loaded from the id, here a folder as `from_pretrained` takes it; a default config serves."""
    args = SpaceConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"},
    )  # fmt: skip
    anchors, retain = demo_erasure_data
    trainer = SpaceTrainer(
        str(demo_model_path()), args, anchors=anchors, retain_dataset=retain[:40], questions=DEMO_QUESTIONS
    )
    assert trainer.model.get_base_model().config._attn_implementation == "eager"
    assert trainer.processing_class.image_token == "<image>"
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.null_spaces


@pytest.mark.slow
def test_an_adapter_that_is_there_is_trained(demo_model, demo_erasure_data, tmp_path):
    first = make_trainer(demo_model, demo_erasure_data, tmp_path / "a")
    model = first.model
    trainer = SpaceTrainer(
        model=model,
        args=SpaceConfig(output_dir=str(tmp_path / "b"), max_steps=2, per_device_train_batch_size=4, report_to="none"),
        anchors=demo_erasure_data[0],
        retain_dataset=demo_erasure_data[1],
        processing_class=demo_model[1],
        questions=DEMO_QUESTIONS,
    )
    assert trainer.model is model and isinstance(model, PeftModel)
    trainer.train()


# Bad input


def test_bad_input_is_refused(demo_model, demo_erasure_data, tmp_path):
    model, processor = demo_model
    anchors, retain = demo_erasure_data
    good = {"model": model, "anchors": anchors, "retain_dataset": retain, "processing_class": processor}
    args = SpaceConfig(output_dir=str(tmp_path / "none"), report_to="none")
    for change, message in [
        ({"anchors": None}, "anchors"),
        ({"anchors": anchors.select([])}, "anchors"),
        ({"retain_dataset": []}, "retained dataset is empty"),
        ({"concept": "   "}, "name is empty"),
        ({"concept": "x" * 10_000}, "10000 characters"),
        ({"processing_class": processor.tokenizer}, "image processor"),
    ]:
        with pytest.raises(ValueError, match=message):
            SpaceTrainer(**{**good, **change}, args=args)
    # What is always needed is asked for by Python itself.
    with pytest.raises(TypeError, match="required keyword-only argument: 'anchors'"):
        SpaceTrainer(model, args, retain_dataset=retain)
    assert not (tmp_path / "none").exists()


def test_a_model_without_vision_is_refused(demo_model, demo_erasure_data, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    text_only = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="get_image_features"):
        make_trainer((text_only, demo_model[1]), demo_erasure_data, tmp_path)


def test_target_in_the_retained_set_is_a_warning_with_a_count(demo_model, demo_erasure_data, demo_images, tmp_path):
    anchors, retain = demo_erasure_data
    image = demo_images.filter(lambda name: name == "fox", input_columns="name")[0]["image"]
    rows = list(retain) + [{"images": [image], "prompt": "what is this?", "completion": "fox"}] * 3
    with pytest.warns(UserWarning, match="3 of .* retained rows"):
        make_trainer(demo_model, (anchors, rows), tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"target": "projector"}, "target"),
        ({"task_weight": 0.0, "suppression_weight": 0.0}, "nothing would be forgotten"),
        ({"keep_weight": -1.0}, "keep_weight"),
        ({"suppression_margin": -1.0}, "suppression_margin"),
        ({"stop_threshold": 0.0}, "stop_threshold"),
        ({"stop_smoothing": 1.0}, "stop_smoothing"),
        ({"certificate_share": 1.0}, "certificate_share"),
        ({"retain_per_forget": 0}, "retain_per_forget"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpaceConfig(output_dir="unused", **arguments)


def test_the_papers_configuration_has_the_papers_losses_alone(demo_model, demo_erasure_data, tmp_path):
    model, processor = demo_model
    args = SpaceConfig.paper(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, canary_items=0,
    )  # fmt: skip
    assert (args.target, args.keep_weight, args.suppression_weight, args.own_answers) == ("all", 0.0, 0.0, False)
    assert SpaceConfig.paper(str(tmp_path), target="vision").target == "vision"
    trainer = SpaceTrainer(
        model, args, anchors=demo_erasure_data[0].select(range(4)), retain_dataset=demo_erasure_data[1], processing_class=processor,
        questions=DEMO_QUESTIONS, peft_config=SpaceLoraConfig(r=4, constraint="hard", energy=0.99),
    )  # fmt: skip
    trainer.train()
    assert any("vision" in name for name in trainer.null_spaces) and any(
        "language" in name for name in trainer.null_spaces
    )
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        terms = {key: value for key, value in entry.items() if key.startswith("loss_")}
        assert set(terms) == {"loss_task", "loss_suppression", "loss_repulsion", "loss_isotropy"}
        assert terms.pop("loss_suppression") == 0.0
        assert entry["loss"] == pytest.approx(sum(terms.values()), rel=1e-4)
        assert terms["loss_task"] > 0 and terms["loss_isotropy"] > 0
