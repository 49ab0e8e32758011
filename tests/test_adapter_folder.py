"""The table of an adapter folder's files: complete, in one place, and what is published comes from it."""

import ast
import re
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import trainer

from space_peft.hub_cards.file_checks import readers
from space_peft.hub_cards.source import AdapterSource
from space_peft.records import folder
from space_peft.records.base_model import base_model_id, is_hub_id
from space_peft.records.card_data import ErasureCardData
from space_peft.records.folder import (
    FILES,
    RESULTS,
    VOCABULARIES,
    beside,
    contents,
    contents_table,
    known,
    matches,
    to_publish,
)
from space_peft.records.measured import note_measured, remove_results
from space_peft.records.repository_ids import validate_repo_id


ROOT = Path(__file__).parents[1]


def test_names_are_those_of_peft_and_trainer():
    assert (folder.ADAPTER_CONFIG_NAME, folder.ADAPTER_NAME) == (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    assert folder.TRAINER_STATE_NAME == trainer.TRAINER_STATE_NAME
    assert folder.TRAINING_ARGUMENTS_NAME == trainer.TRAINING_ARGS_NAME
    written = {trainer.OPTIMIZER_NAME, trainer.OPTIMIZER_NAME_BIN, trainer.SCHEDULER_NAME, trainer.SCALER_NAME}
    assert written <= set(folder.TRAINER_STATE)


def test_no_name_stands_twice_in_the_table_or_anywhere_else_in_the_library():
    names = [file.name for file in FILES]
    assert len(set(names)) == len(names)
    # Which of the processor's files goes before which is the processor's business.
    own = set(names) - {*folder.PROCESSOR_CONFIGS, *VOCABULARIES}
    again = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for part in ("space_peft", "trainers", "hub_cards")
        for path in (ROOT / part).rglob("*.py")
        if path != ROOT / "space_peft/records/folder.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in own
    ]
    assert not again


def test_every_file_of_ours_is_in_the_table():
    """All but the file of published statistics, which lie in a folder of their own."""
    used = {
        node.value
        for part in ("space_peft", "trainers", "hub_cards")
        for path in (ROOT / part).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and re.fullmatch(r"space_\w+\.(json|jsonl|safetensors)", str(node.value))
    }
    assert used - {file.name for file in FILES} == {"space_statistics.json"}


def test_what_is_published():
    always = set(to_publish(redact=True, images=True, answers=True))
    assert always == {
        "adapter_model.safetensors", "adapter_config.json", "space_config.json", "space_certificate.json",
        "space_ledger.json", "space_anchors.json", "space_card.json", "space_canary.json", "report.json", "attacks.json",
    }  # fmt: skip
    shown = set(to_publish()) - always
    assert {"report.md", "pictures/*.png", "tokenizer.json", "chat_template.jinja", "processor_config.json"} <= shown
    more = set(to_publish(images=True, answers=True, null_spaces=True)) - always - shown
    assert more == {"canary/*.png", "answers_before.jsonl", "answers_after.jsonl", "space_stats.safetensors"}
    never = {file.name for file in FILES} - always - shown - more
    assert never >= {"space_measured.json", "space_redaction.json", "space_fit.safetensors", "training_args.bin"}


def test_every_published_file_that_says_something_is_read_before_it_is_trusted(tmp_path):
    published = to_publish(images=True, answers=True, null_spaces=True)
    says = {name for name in published if name.endswith((".json", ".safetensors")) and name not in VOCABULARIES}
    assert says <= set(readers(AdapterSource(tmp_path, None, None, ())))


@pytest.mark.parametrize(
    "name, what",
    [
        ("rng_state_1.pth", "the state of the training"),
        ("canary/3.png", "the canary's images"),
        ("pictures/attacks.png", "the same, drawn"),
        ("pictures/anchors.png", "pictures of the erasure"),
        ("pictures/more/anchors.png", None),
        ("3.png", None),
        ("model.safetensors", None),
    ],
)
def test_what_a_file_is(name, what):
    file = known(name)
    assert (file and file.what) == what
    assert matches(name, ["*.png"]) == (name == "3.png")


@pytest.mark.parametrize("result", RESULTS)
def test_all_that_was_made_with_a_result_goes_with_it(result, tmp_path):
    names = [name.replace("*", "0") for name in beside(result)]
    others = ["README.md", "pictures/spectrum.png", *({*RESULTS} - {result})]
    for name in [*names, *others]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    note_measured(tmp_path, dict.fromkeys(RESULTS, "of this adapter") | {result: "of another"})
    remove_results(tmp_path, "of this adapter", None)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*others, "space_measured.json"}
    assert not (tmp_path / "canary").exists()


# The base model's id


def test_the_first_that_is_told_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, adapter = ErasureCardData(base_model="org/card"), {"base_model_name_or_path": "org/config"}
    assert base_model_id("org/given", data, adapter) == "org/given"
    assert base_model_id(None, data, adapter) == "org/card"
    assert base_model_id(None, ErasureCardData(), adapter) == base_model_id(None, None, adapter) == "org/config"
    # A folder that looks like an id: what was loaded from it is not on the Hub; what a person says is.
    (tmp_path / "org" / "config").mkdir(parents=True)
    (tmp_path / "org" / "given").mkdir()
    assert is_hub_id("org/given", loaded=False) and not is_hub_id("org/given")
    assert base_model_id("org/given", data, adapter) == "org/given"
    with pytest.raises(ValueError, match="'org/config', which is not an id on the Hub.*as `base_model`"):
        base_model_id(None, None, adapter)
    assert base_model_id(None, None, adapter, local=True) is None  # For a card that stays here.
    with pytest.raises(ValueError, match="not an id on the Hub"):
        base_model_id(str(tmp_path), None, adapter, local=True)


@pytest.mark.parametrize("name", ["/home/someone/model", "~/model", "a/b/c", "org/my model", "", None, 3])
def test_a_path_is_no_id(name):
    assert not is_hub_id(name) and not is_hub_id(name, loaded=False)


def test_ids_are_checked_as_by_todays_huggingface_hub():
    validate_repo_id(None)
    validate_repo_id("org/given")
    for name in ("org/given\n", "org/given/more", "org/--"):
        with pytest.raises(HFValidationError):
            validate_repo_id(name)
    with pytest.raises(ValueError, match="which is not an id on the Hub"):
        base_model_id(None, None, {"base_model_name_or_path": name})


# What lies in a folder


def test_the_table_says_what_each_file_is(tmp_path):
    assert contents(tmp_path) == [] and contents_table(tmp_path) == ""
    for name in (
        "README.md",
        "adapter_model.safetensors",
        "canary/0.png",
        "canary/1.png",
        "vocab.json",
        "merges.txt",
        "my.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("anchors", "checkpoint-20", "checkpoint-40", "other"):
        (tmp_path / name).mkdir()
    found = {tuple(names): what for names, what in contents(tmp_path)}
    assert (
        found[("adapter_model.safetensors",)] == "the adapter's weights"
        and found[("canary/*.png",)] == "the canary's images"
    )
    assert found[("vocab.json", "merges.txt")] == "the tokenizer's vocabulary"
    assert {("anchors/",), ("checkpoint-*/",)} < set(found) and "my.txt" not in str(found) and "other" not in str(found)
    lines = contents_table(tmp_path).splitlines()
    assert len(lines) == 7 and len({line.index(what) for line in lines for what in found.values() if what in line}) == 1
    # What is drawn of one result is not put beside what is drawn of another.
    (tmp_path / "pictures").mkdir()
    for name in ("answers", "probes", "attacks"):
        (tmp_path / "pictures" / f"{name}.png").touch()
    drawn = [names for names, what in contents(tmp_path) if what == "the same, drawn"]
    assert drawn == [["pictures/answers.png", "pictures/probes.png"], ["pictures/attacks.png"]]
