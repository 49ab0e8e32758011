"""The model card, from real folders and from hostile names."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from space_peft.hub_cards import erasure_card, write_card


def probe(value):
    return {"value": value, "n": 40}


@pytest.fixture
def folder(tmp_path):
    keys = ("forget", "generality", "retain", "retain_unseen_style", "siblings", "text", "text_target", "fluency")
    files = {
        "adapter_config.json": {"base_model_name_or_path": "org/base", "r": 8},
        "space_config.json": {"constraint": "soft", "strength": 0.3, "energy": 0.999},
        "space_certificate.json": {"layers": []},
        "space_anchors.json": {"concept": "fox", "anchors": [{"p_name_before": 0.01, "p_name_after": 0.9}]},
        "report.json": {
            "concept": "fox",
            "before": {k: probe(0.9 if k in ("forget", "generality") else 1.0) for k in keys},
            "after": {k: probe(0.01 if k in ("forget", "generality") else 0.99) for k in keys},
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_card_states_concept_results_and_limits(folder):
    write_card(folder, license="apache-2.0")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "org/base" and card.data.library_name == "peft"
    assert card.data.license == "apache-2.0" and "unlearning" in card.data.tags
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results["forget"] == 0.01 and len(results) == 8
    assert "| forget | 0.900 | 0.010 | 40 |" in card.text
    for phrase in (
        "**fox**",
        "Reversible unless merged",
        "merge_and_unload",
        "0.010 before refinement and 0.900 after",
    ):
        assert phrase in card.text


def test_an_adapter_alone_has_a_card(folder):
    for name in ("report.json", "space_anchors.json", "space_certificate.json", "space_config.json"):
        (folder / name).unlink()
    text = str(erasure_card(folder))
    assert "No evaluation is stored" in text and "without a null-space constraint" in text


def test_a_local_base_model_is_not_published(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    with pytest.raises(ValueError, match="Hub id"):
        erasure_card(folder)
    assert str(folder) not in str(erasure_card(folder, base_model="org/base"))


def test_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        erasure_card(tmp_path)


@pytest.mark.parametrize(
    "name", ["a\n---\nlicense: mit", "<script>x</script>", "](http://x) [y", '"quote: {{ jinja }}', "# title", "# {x}"]
)
def test_hostile_names_stay_text(folder, name):
    anchors = json.loads((folder / "space_anchors.json").read_text())
    (folder / "space_anchors.json").write_text(json.dumps({**anchors, "concept": name}))
    text = str(erasure_card(folder))
    header, body = text.split("\n---\n", 1)
    assert yaml.safe_load(header.removeprefix("---\n"))["base_model"] == "org/base"
    assert "<script>" not in body and "](http://x)" not in body and "\n# title" not in body.replace("\n# base", "")
