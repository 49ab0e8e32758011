"""`push_to_hub` and `hub_strategy` of the trainers, over HTTP with a real training."""

import dataclasses
import datetime
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForImageTextToText

from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.demo.probes import demo_probes
from space_peft.records.card_data import ErasureCardData


REPO = "user/demo-erasure"
BASE = "space-peft/demo-llava"


@pytest.fixture(autouse=True)
def fresh_client(hub, monkeypatch):
    # Trainer makes its repository with an `HfApi` that transformers keeps, with the endpoint of its first use.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)


@pytest.fixture
def make_trainer(demo_erasure_data, tmp_path):
    anchors, retained = demo_erasure_data

    def make(card_data=None, probes=None, folder="run", base=None, **options):
        options = {
            "max_steps": 4,
            "stop_threshold": None,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "canary_items": 0,
            "own_answers": False,
            "hub_model_id": REPO,
            **options,
        }
        model, processor = load_demo_model()
        return SpaceTrainer(
            base or model,
            SpaceConfig(str(tmp_path / folder), report_to="none", disable_tqdm=True, use_cpu=True, **options),
            anchors=anchors,
            retain_dataset=retained[:48],
            processing_class=processor,
            questions=DEMO_QUESTIONS,
            peft_config=SpaceLoraConfig(r=2, lora_alpha=4, target_modules=r".*language_model.*q_proj"),
            card_data=card_data or ErasureCardData(base_model=BASE, license="apache-2.0"),
            probes=probes,
        )

    return make


def few_rows(probes):
    """All probes of a report, with a row or two each."""
    return [dataclasses.replace(probe, rows=list(probe.rows)[:2]) for probe in probes]


def titles(hub, revision="main"):
    return [commit.title for commit in hub.repository(REPO).history(revision)][:-1][::-1]


def pickles(files):
    return {name for name in files if name.endswith((".bin", ".pt", ".pth"))}


def push_everything(trainer):
    trainer.train()
    trainer._finish_current_push()


def check_public(hub, tmp_path, revision="main"):
    for name, content in hub.files(REPO, revision).items():
        for local in (str(tmp_path), str(Path(__file__).parents[2]), hub.token):
            assert local.encode() not in content, name


def test_train_evaluate_push_yields_a_card_with_results(hub, make_trainer, demo_images, tmp_path):
    trainer = make_trainer(probes=few_rows(demo_probes("fox", demo_images)), max_steps=2)
    trainer.train()
    metrics = trainer.evaluate()
    info = trainer.push_to_hub(tags="extra-tag", language="en")
    files = hub.files(REPO)
    assert titles(hub) == ["End of training"] and info.oid == hub.head(REPO)
    assert {"adapter_model.safetensors", "adapter_config.json", "space_card.json", "space_certificate.json"} <= set(
        files
    )
    assert not pickles(files)
    check_public(hub, tmp_path)
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == BASE and card.data.language == "en" and "extra-tag" in card.data.tags
    measured = {(result.dataset_config, result.metric_name): result.metric_value for result in card.data.eval_results}
    assert measured["forget", "forget (after erasure)"] == round(metrics["eval_forget"], 4)
    report = json.loads(files["report.json"])
    assert report["after"]["forget"]["value"] == metrics["eval_forget"] and report["settings"] == {"steps": 2}
    # Further training makes the results those of another adapter.
    trainer.args.max_steps = 3
    trainer.train()
    trainer.push_to_hub()
    assert "report.json" not in hub.files(REPO) and "answers_after.jsonl" not in hub.files(REPO)
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize("loaded_by", ["user", "trainer"])
def test_the_base_models_commit_is_recorded(hub, demo_base, make_trainer, loaded_by):
    base = demo_base if loaded_by == "trainer" else AutoModelForImageTextToText.from_pretrained(demo_base)
    trained_on = hub.head(demo_base)
    trainer = make_trainer(ErasureCardData(license="apache-2.0"), base=base, max_steps=1)
    trainer.train()
    # What happens to the base later is not what the adapter was trained on.
    hub.commit(demo_base, {"note.txt": b"later"})
    trainer.push_to_hub()
    files = hub.files(REPO)
    assert json.loads(files["space_card.json"])["base_revision"] == trained_on != hub.head(demo_base)
    assert json.loads(files["adapter_config.json"])["revision"] == trained_on
    assert trained_on in files["README.md"].decode()


def test_card_data_is_filled_while_training(hub, make_trainer, demo_erasure_data):
    given = ErasureCardData(base_model=BASE, license="apache-2.0", reason="A test.")
    trainer = make_trainer(given)
    trainer.train()
    trainer.save_model()
    assert given == ErasureCardData(base_model=BASE, license="apache-2.0", reason="A test.")
    data = ErasureCardData.load(trainer.args.output_dir)
    assert (data.concept, data.aliases, data.method, data.reason) == ("fox", [], "SPACE", "A test.")
    assert data.uses_concept_images is False and data.paper["id"] == "2606.09868"
    assert (
        data.steps == 4
        and data.seed == 42
        and data.created == datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    )
    assert data.settings["SpaceConfig"] == {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "canary_items": 0,
        "own_answers": False,
    }
    assert data.settings["SpaceLoraConfig"] == {"r": 2, "lora_alpha": 4, "target_modules": r".*language_model.*q_proj"}
    assert data.hardware["processes"] == 1 and list(data.hardware["devices"].values()) == [1]
    assert data.versions["torch"].startswith(torch.__version__.split("+")[0]) and data.seconds["erase"] > 0
    pool, retained = data.datasets
    assert pool.role == "pool" and pool.rows == 297 and len(pool.fingerprint) == 16
    assert retained.role == "retained" and retained.rows == 48


def test_card_data_of_a_wrong_type(make_trainer):
    with pytest.raises(TypeError, match="ErasureCardData, got dict"):
        make_trainer({"license": "mit"})


def test_a_base_model_from_a_folder_is_asked_for_before_training(hub, make_trainer):
    with pytest.raises(ValueError, match="card_data=ErasureCardData\\(base_model="):
        make_trainer(ErasureCardData(license="mit"), push_to_hub=True)
    assert not hub.exists(REPO)


def test_end_pushes_when_the_model_is_saved(hub, make_trainer, tmp_path):
    trainer = make_trainer(push_to_hub=True, hub_strategy="end", save_strategy="steps", save_steps=2)
    push_everything(trainer)
    assert titles(hub) == []
    trainer.save_model()
    assert titles(hub) == ["Model save"] and not pickles(hub.files(REPO))
    check_public(hub, tmp_path)


def test_every_save_pushes_the_adapter_of_each_checkpoint(hub, make_trainer, tmp_path):
    trainer = make_trainer(
        push_to_hub=True, hub_strategy="every_save", hub_always_push=True, save_strategy="steps", save_steps=2,
        save_total_limit=1,
    )  # fmt: skip
    push_everything(trainer)
    assert titles(hub) == ["Training in progress, step 2", "Training in progress, step 4"]
    files = hub.files(REPO)
    assert not pickles(files) and not any("checkpoint" in name for name in files)
    saved = tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"] == saved.read_bytes()
    assert json.loads(files["space_card.json"])["steps"] == 4
    first = hub.repository(REPO).history()[1].files  # Its checkpoint was deleted before training ended.
    assert json.loads(first["space_card.json"].content)["steps"] == 2
    check_public(hub, tmp_path)


def test_a_run_goes_on_from_last_checkpoint_on_the_hub(hub, make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(push_to_hub=True, hub_strategy="checkpoint", hub_always_push=True, **options)
    push_everything(trainer)
    assert titles(hub) == [
        "Training in progress, step 2", "Training in progress, step 2, checkpoint",
        "Training in progress, step 4", "Training in progress, step 4, checkpoint",
    ]  # fmt: skip
    files = hub.files(REPO)
    local = {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()} - {"training_args.bin", "README.md"}
    assert {name for name in files if name.startswith("last-checkpoint/")} == {
        f"last-checkpoint/{name}" for name in local
    }
    assert pickles(files) == {f"last-checkpoint/{name}" for name in pickles(local)} and "optimizer.pt" in local
    assert "adapter_model.safetensors" in files  # A checkpoint's push deletes nothing of the adapter's.
    check_public(hub, tmp_path)

    # Somebody else's machine: step 2 from the Hub, to the end.
    middle = hub.repository(REPO).history()[2].oid
    folder = snapshot_download(REPO, revision=middle, allow_patterns="last-checkpoint/*")
    resumed = make_trainer(folder="elsewhere", **options)
    resumed.train(resume_from_checkpoint=str(Path(folder) / "last-checkpoint"))
    assert resumed.state.global_step == 4
    ours, theirs = (
        {name: value for name, value in trainer_.model.state_dict().items() if "lora_" in name} for trainer_ in (trainer, resumed)
    )  # fmt: skip
    assert ours and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_all_checkpoints(hub, make_trainer, tmp_path):
    trainer = make_trainer(
        push_to_hub=True, hub_strategy="all_checkpoints", hub_always_push=True, save_strategy="steps", save_steps=2
    )
    push_everything(trainer)
    places = {name.split("/")[0] for name in hub.files(REPO) if "/" in name}
    assert places == {"checkpoint-2", "checkpoint-4"}
    check_public(hub, tmp_path)


def test_not_blocking_returns_a_future_and_later_changes_do_not_reach_it(hub, make_trainer):
    trainer = make_trainer()
    trainer.train()
    hub.faults.add("commit", delay=1.0)
    future = trainer.push_to_hub(blocking=False, commit_message="Later")
    weights = Path(trainer.args.output_dir, "adapter_model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(b"changed meanwhile")
    assert future.result(timeout=60).oid == hub.head(REPO)
    assert titles(hub) == ["Later"] and hub.files(REPO)["adapter_model.safetensors"] == content


def test_revision_token_and_private(hub, make_trainer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.push_to_hub(token=hub.token, revision="v2", private=True)
    assert hub.repository(REPO).private and hub.files(REPO) == {}
    assert "adapter_model.safetensors" in hub.files(REPO, "v2")


def test_a_persons_card_in_the_output_folder_stays(hub, make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    readme = Path(trainer.args.output_dir, "README.md")
    readme.parent.mkdir(exist_ok=True)
    readme.write_text("# My own words\n")
    trainer.push_to_hub()
    assert "# My own words" in readme.read_text()
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert "# My own words" in card.text and card.data.get("base_model") in (None, BASE)


def test_redacted(hub, make_trainer, tmp_path):
    options = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 2, "hub_always_push": True}
    data = ErasureCardData(base_model=BASE, license="apache-2.0", redact=True)
    with pytest.raises(ValueError, match="pushes checkpoints as they are"):
        make_trainer(data, hub_strategy="checkpoint", **options)
    with pytest.raises(ValueError, match="mentions the concept"):
        make_trainer(data, **{**options, "hub_model_id": "user/without-fox"})
    assert not hub.repositories
    trainer = make_trainer(data, hub_strategy="every_save", **options)
    push_everything(trainer)
    trainer.push_to_hub()
    hashes = set()
    for commit in hub.repository(REPO).history()[:-1]:
        for name, blob in commit.files.items():
            assert b"fox" not in blob.content[:4096].lower() and b"fox" not in name.encode(), name
        hashes.add(json.loads(commit.files["space_card.json"].content)["redaction"]["hash"])
    assert len(hub.repository(REPO).history()) == 4 and len(hashes) == 1
