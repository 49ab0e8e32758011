"""The model card: the whole of it against a golden pattern, its metadata against the Hub's schema, and what it claims."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from card_folders import anchors, attacks, card_data, report, write_folder
from huggingface_hub import ModelCard
from metadata_schema import check_metadata

import space_peft
from space_peft.attacks.report import AttackReport
from space_peft.demo import load_demo_images
from space_peft.hub_cards import erasure_card, write_card
from space_peft.records.card_data import ErasureCardData


GOLDEN = Path(__file__).parent / "golden" / "card.md"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "adapter")


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def change(folder: Path, name: str, **values) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **values}))


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def body(text: str) -> str:
    return text.split("---\n", 2)[2]


def test_the_whole_card(folder):
    text = write_card(folder, repo_id="me/without-fox").read_text(encoding="utf-8")
    golden = GOLDEN.read_text(encoding="utf-8")
    # <<...>> in the golden file is a pattern, all else is literal.
    parts = re.split(r"<<(.*?)>>", golden)
    pattern = "".join(part if i % 2 else re.escape(part) for i, part in enumerate(parts))
    if not re.fullmatch(pattern, text):
        shown = golden.replace(r"<<\d+\.\d+[\w.]*>>", space_peft.__version__)
        assert text == shown  # For the difference.


def test_metadata_follows_the_hubs_schema(folder):
    metadata = front_matter(str(erasure_card(folder)))
    check_metadata(metadata)
    assert metadata["base_model"] == "org/base" and metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "peft" and metadata["pipeline_tag"] == "image-text-to-text"
    assert metadata["license"] == "apache-2.0" and metadata["language"] == "en"
    assert metadata["datasets"] == ["org/pool"]  # The retained rows are not on the Hub.
    assert {"space-peft", "unlearning", "machine-unlearning", "null-space", "lora"} < set(metadata["tags"])
    assert "base_model:adapter:org/base" in metadata["tags"]


def test_one_result_per_probe_and_attack_before_and_after(folder):
    (model,) = front_matter(str(erasure_card(folder)))["model-index"]
    assert model["name"] == "base without fox"
    results = {r["dataset"]["config"]: {m["name"]: m["value"] for m in r["metrics"]} for r in model["results"]}
    assert set(results) == {*report().after, "attack-relearning", "attack-quantization"}
    assert results["forget"] == {"forget (after erasure)": 0.0, "forget (before erasure)": 0.95}
    assert list(results["attack-relearning"].values()) == [0.25, 0.95]


def test_metadata_survives_the_hubs_own_parser(folder):
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model_relation == "adapter" and len(card.data.eval_results) == 30
    assert front_matter(str(card)) == front_matter((folder / "README.md").read_text())


def test_schema_check_notices_what_the_hub_would_refuse(folder):
    good = front_matter(str(erasure_card(folder)))
    result = good["model-index"][0]["results"][0]
    bad = [
        {"base_model": "/home/me/base"},
        {"base_model_relation": "child"},
        {"license": "apache"},
        {"license": "other"},
        {"language": "English"},
        {"datasets": ["org/pool/train"]},
        {"emoji": "x"},
        {"model-index": [{"name": "x", "results": [{**result, "dataset": {"name": "no type"}}]}]},
        {"model-index": [{"name": "x", "results": [{**result, "metrics": [{"type": "forget", "value": "low"}]}]}]},
        {"model-index": [{"name": "x", "results": [result, result]}]},
    ]
    for fields in bad:
        with pytest.raises((AssertionError, ValueError)):
            check_metadata({**good, **fields})


def test_every_share_has_its_exact_interval(folder):
    text = str(erasure_card(folder))
    # 0 of 40 named: Clopper and Pearson's interval, rounded outwards; 3 of 12 relearned.
    assert f"| **0.000** (0.000 to {math.ceil((1 - 0.025 ** (1 / 40)) * 1000) / 1000:.3f}) | 40 |" in text
    assert "| **0.250** (0.054 to 0.572) | 0.200 | 12 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| retain\\_unseen\\_style"))
    assert "| 1.000 | **0.980** (0.953 to 0.994); of all 306 rows 0.860 (0.815 to 0.897) | 250 |" in row
    # Every figure in bold, which are the ones after the erasure, is followed by an interval, but for attacks that are no share.
    assert not re.findall(r"\*\*[0-9.]+\*\* (?!\([0-9.]+ to [0-9.]+\))", text)
    change(folder, "attacks.json", attacks={"audit": attacks()["attacks"]["relearning"]})
    assert "| **0.250** | 0.200 | 12 |" in str(erasure_card(folder))


def test_a_number_of_rows_that_no_evaluation_has_is_refused(folder):
    content = json.loads((folder / "report.json").read_text())
    content["after"]["forget"]["n"] = 10**300
    (folder / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="at most 10,000,000"):
        erasure_card(folder)


@pytest.mark.parametrize(
    "after, said", [(0.95, "It does not do so"), (1.0, "It does not do so"), (0.9, "only in part")]
)
def test_a_card_says_where_nothing_was_forgotten(folder, after, said):
    content = json.loads((folder / "report.json").read_text())
    content["after"]["forget"]["value"] = after
    (folder / "report.json").write_text(json.dumps(content))
    card = str(erasure_card(folder))
    assert content["before"]["forget"]["value"] == 0.95
    assert [part in card for part in ("It does not do so", "only in part")] == [
        said != "only in part",
        said == "only in part",
    ]


def test_a_card_claims_nothing_of_a_concept_that_was_not_known(folder):
    content = json.loads((folder / "report.json").read_text())
    for part in ("before", "after"):
        content[part]["forget"]["value"] = 0.0
    (folder / "report.json").write_text(json.dumps(content))
    card = str(erasure_card(folder))
    assert "**Whether it does cannot be told:** without it the concept is named on 0 % of its test images, too." in card
    assert "that makes [org/base]" not in card


def test_claims_follow_the_figures(folder):
    assert "makes [org/base](https://huggingface.co/org/base) stop naming **fox**" in str(erasure_card(folder))
    content = json.loads((folder / "report.json").read_text())
    content["after"]["forget"]["value"] = 0.35
    (folder / "report.json").write_text(json.dumps(content))
    text = str(erasure_card(folder))
    assert (
        "**It does so only in part:** the concept is still named on 35 % of its test images (95 % interval 20 to 52 %)"
        in text
    )
    remove(folder, "report.json", "attacks.json")
    text = str(erasure_card(folder))
    assert "**Whether it does was not evaluated.**" in text and text.count("not evaluated: no claim is made") == 2
    assert "- forget: images of the concept" in text and "model-index" not in front_matter(text)


def test_what_was_tried_is_not_listed_as_untested(folder):
    tried = str(erasure_card(folder))
    assert "- relearning:" not in tried and "- quantisation:" not in tried and "- adversarial images:" in tried
    assert "| relearned from a few images | 0.950 | **0.250** (0.054 to 0.572) | 0.200 | 12 | fox |" in tried
    other = AttackReport("fox", {"audit": attacks()["attacks"]["relearning"]})
    given = str(erasure_card(folder, attacks=other))
    assert "- relearning:" in given and "- adversarial images:" not in given
    remove(folder, "attacks.json")
    untried = str(erasure_card(folder))
    assert "- relearning: whether fine-tuning" in untried and "### Attacks" not in untried


def test_an_adapter_alone_has_a_card(folder):
    remove(folder, *(path.name for path in folder.glob("*.json") if path.name != "adapter_config.json"))
    for path in (folder / "pictures").iterdir():
        path.unlink()
    text = str(erasure_card(folder, license="mit"))
    check_metadata(front_matter(text))
    assert "without a null-space constraint" in text and "stop naming **a concept**" in text
    assert "![" not in text and "None" not in text


def test_settings_are_words_and_numbers_and_no_bare_hashes(folder, monkeypatch):
    monkeypatch.setattr("space_peft.hub_cards.facts.check_projected", lambda folder: None)
    digest = "e0ba8172838226856ed278667dea4dc6"
    change(folder, "space_config.json", projected={"lora_A": digest}, max_rank="auto")
    change(folder, "space_card.json", settings={"SpaceLoraConfig": {"r": 16, "revision": digest}})
    text = body(str(erasure_card(folder)))
    assert "`SpaceLoraConfig.r` | `16`" in text and "`max_rank` `auto`" in text and digest not in text
    # Without the trainer's settings those of the report are shown, of which its identity is none.
    change(folder, "space_card.json", settings={})
    change(folder, "report.json", settings={"steps": 60, "identity": {"adapter": digest}})
    text = body(str(erasure_card(folder)))
    assert "Settings of the run:" in text and "`Run.steps` | `60`" in text and digest not in text


def test_certificate_lists_the_layers_that_change_most(folder):
    text = str(erasure_card(folder))
    layers = re.findall(r"^\| `model\.language_model\.layers\.(\d)", text, flags=re.M)
    assert layers == ["5", "4", "3", "2", "1"]
    assert "| **median of all layers** | 0.0035 | 0.35 | 0.5 |" in text and "below the bound in 5 of 6 layers" in text


@pytest.mark.parametrize("layer, vision", [("language_model.layers.0.mlp.up_proj", False), ("vision_tower.x", True)])
def test_vllm_advice_depends_on_the_adapted_layers(tmp_path, layer, vision):
    text = str(erasure_card(write_folder(tmp_path / "a", layer=layer)))
    assert ("**vLLM: merge first.**" in text) == vision
    assert ("max_lora_rank=16" in text) != vision  # Rank 12: the next one that vLLM takes.


def test_a_method_that_saw_the_concept_says_so(folder):
    data = card_data(method="NPO", paper={"title": "NPO", "id": "2404.05868"}, uses_concept_images=True)
    (folder / "space_anchors.json").write_text(json.dumps({"concept": "fox", "aliases": [], "forget_rows": 12}))
    text = str(erasure_card(folder, card_data=data))
    assert "without a single picture" not in text and "from images of the concept" in text
    assert "12 images of the concept itself" in text and "eprint        = {2404.05868}" in text


def test_a_redacted_card_does_not_hold_the_name(tmp_path):
    folder = write_folder(tmp_path / "a", "zweihander")
    redaction = {"algorithm": "hmac-sha256", "hash": "1a2b3c4d" * 8}
    data = ErasureCardData(
        concept="zweihander", aliases=["zweihander"], redact=True, redaction=redaction, license="mit"
    )
    plain = report()
    (folder / "report.json").write_text(json.dumps({**plain.to_dict(), "concept": "zweihander"}))
    (folder / "attacks.json").unlink()
    (folder / "space_anchors.json").write_text(json.dumps({**anchors(), "concept": "zweihander"}))
    change(folder, "space_config.json", statistics="token")
    text = str(erasure_card(folder, card_data=data))
    assert "zweihander" not in text and "fox (" not in body(text) and "![" not in text
    assert "a concept, **redacted on request (hash 1a2b3c4d)**," in text
    assert front_matter(text)["model-index"][0]["name"] == "base without a concept"


def test_licence_is_given_recorded_or_inherited(folder, hub):
    assert front_matter(str(erasure_card(folder, license="mit")))["license"] == "mit"
    recorded = card_data(license=None, base_license="llama3.1")
    text = str(erasure_card(folder, card_data=recorded))
    assert front_matter(text)["license"] == "llama3.1" and "inherited from the base model" in text
    unknown = card_data(license=None)
    text = str(erasure_card(folder, card_data=unknown))
    assert "license" not in front_matter(text) and "could not be looked up" in text
    header = "---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\n---\n"
    hub.create("org/base")
    hub.commit("org/base", {"README.md": header.encode()})
    metadata = front_matter(str(erasure_card(folder, card_data=unknown)))
    check_metadata(metadata)
    assert metadata["license"] == "other" and metadata["license_name"] == "house"
    assert metadata["license_link"] == "https://huggingface.co/org/base/blob/main/LICENSE"


@pytest.mark.parametrize("license", ["apache", "MIT", "other"])
def test_a_licence_the_hub_does_not_know_is_refused(folder, license):
    with pytest.raises(ValueError, match="licence|license_name"):
        erasure_card(folder, license=license)


def test_an_attack_that_was_too_weak_is_none(folder):
    assert "says nothing" not in (text := erasure_card(folder).text)
    weak = json.loads((folder / "attacks.json").read_text())
    weak["attacks"]["relearning"] |= {"before": 0.0, "value": 0.0}
    (folder / "attacks.json").write_text(json.dumps(weak))
    card = erasure_card(folder).text
    assert "0.000: says nothing" in card and "it was too weak." in card
    told = "relearn"
    assert card[card.index("## What was not tested") :].count(told) > text[
        text.index("## What was not tested") :
    ].count(told)


def test_a_local_base_model_is_called_so_and_its_path_is_not_published(folder, monkeypatch):
    data = card_data(base_model=None, base_revision=None, license=None)
    change(folder, "adapter_config.json", base_model_name_or_path=str(folder))
    with monkeypatch.context() as patched:
        patched.setattr("space_peft.hub_cards.metadata.HfApi", None)  # Is not asked.
        card = erasure_card(folder, card_data=data)
    assert "makes a local model stop naming **fox**" in card.text and "# A local model without fox" in card.text
    assert "| Base model | a local model, revision not recorded |" in card.text
    assert str(folder) not in str(card) and "None" not in str(card)
    metadata = front_matter(str(card))
    check_metadata({"base_model": "org/base", "base_model_relation": "adapter", **metadata})
    assert "base_model" not in metadata and not [tag for tag in metadata["tags"] if "base_model" in tag]
    with pytest.raises(ValueError, match="not an id on the Hub"):
        erasure_card(folder, card_data=data, base_model=str(folder))
    assert str(folder) not in str(erasure_card(folder, card_data=data, base_model="org/base"))


def test_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        erasure_card(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("report.json", b"{", "erasure report"),
        ("attacks.json", b'{"concept": "fox", "attacks": {"audit": {"value": "<b>"}}, "versions": {}}', "audit"),
        ("space_card.json", b'{"format": "space_peft.card_data.v9"}', "card data"),
        ("space_anchors.json", b"[]", "provenance"),
        ("adapter_model.safetensors", b"no tensors", "adapter_model.safetensors"),
    ],
)
def test_a_damaged_file_is_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        erasure_card(folder)


def test_a_real_erasure(erasure_folder):
    text = str(erasure_card(erasure_folder, base_model="org/base", license="apache-2.0", repo_id="me/erased"))
    check_metadata(front_matter(text))
    certificate = json.loads((erasure_folder / "space_certificate.json").read_text())
    assert f"speaks of {len(certificate['layers'])} layers, one at a time" in text
    assert "language model only" in text and "None" not in body(text)
    assert str(Path.home()) not in text and str(Path(space_peft.__file__).parent) not in text


def test_the_code_on_the_card_runs_as_it_stands(erasure_folder, hub, demo_base, tmp_path, monkeypatch, capsys):
    text = str(erasure_card(erasure_folder, base_model=demo_base, license="apache-2.0", repo_id="user/erased"))
    names = ("adapter_config.json", "adapter_model.safetensors")
    hub.create("user/erased")
    hub.commit("user/erased", {name: (erasure_folder / name).read_bytes() for name in names})
    load_demo_images()[0]["image"].save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", text, flags=re.S).group(1)
    scope = {}
    exec(code, scope)
    assert not hasattr(scope["model"], "peft_config")  # Merged.
    assert capsys.readouterr().out.strip()
