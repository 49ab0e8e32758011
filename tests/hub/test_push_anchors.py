"""Anchors as a dataset on the Hub: ids and scores by default, images under a licence only."""

import json

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from huggingface_hub.errors import HfHubHTTPError
from markdown_it import MarkdownIt

from space_peft.anchors import anchor_info, set_anchor_info
from space_peft.data.source import dataset_source
from space_peft.hub_cards import push_anchors


REPO = "user/anchors"


@pytest.fixture
def anchors(demo_erasure_data):
    return demo_erasure_data[0]


def test_ids_and_scores_with_their_provenance(hub, anchors):
    info = push_anchors(anchors, REPO, license="cc-by-4.0")
    files = hub.files(REPO, kind="dataset")
    assert set(files) == {"README.md", "data/train-00000-of-00001.parquet", "space_manifest.json"}
    assert info.oid == hub.head(REPO, kind="dataset")
    assert len(hub.repository(REPO, "dataset").history()) == 2
    loaded = load_dataset(REPO, split="train")
    assert anchor_info(loaded) == anchor_info(anchors)
    for part in (loaded.select(range(2)), loaded.map(lambda row: {"x": 1}).filter(lambda row: row["rank"] < 2)):
        source = dataset_source(part)
        assert source == {
            "id": REPO, "revision": info.oid, "split": "train", "license": None, "rows": 2,
            "fingerprint": part._fingerprint,
        }  # fmt: skip
    assert dataset_source(anchors)["id"] is None and dataset_source([{}]) == {**dict.fromkeys(source), "rows": 1}

    images = {"image", "raw_image"} & set(anchors.column_names)
    assert images and set(loaded.column_names) == set(anchors.column_names) - images
    for column in loaded.column_names:
        assert loaded[column] == anchors[column], column
    assert b"PNG" not in files["data/train-00000-of-00001.parquet"]
    card = DatasetCard(files["README.md"].decode())
    assert card.data.license == "cc-by-4.0" and "space-peft" in card.data.tags
    assert "erasure of: fox" in card.text and f'load_dataset("{REPO}"' in card.text


def test_images_need_a_licence(hub, anchors):
    with pytest.raises(ValueError, match="licence only: pass `license=`"):
        push_anchors(anchors, REPO, include_images=True)
    some = anchors.add_column("license", ["mit", None] + ["mit"] * (len(anchors) - 2))
    with pytest.raises(ValueError, match="1 of 8 anchors have no licence.*row 1"):
        push_anchors(some, REPO, include_images=True)
    with pytest.raises(ValueError, match="no licence of the Hub|license|licence"):
        push_anchors(anchors, REPO, include_images=True, license="my own")
    assert not hub.requests


def test_images_come_when_asked_and_allowed(hub, anchors):
    licensed = anchors.add_column("license", ["mit"] * 3 + ["cc-by-4.0"] * (len(anchors) - 3))
    licensed = set_anchor_info(licensed, anchor_info(anchors))
    push_anchors(licensed, REPO, include_images=True)
    loaded = load_dataset(REPO, split="train")
    assert loaded["image"][0].tobytes() == anchors["image"][0].tobytes()
    card = DatasetCard(hub.files(REPO, kind="dataset")["README.md"].decode())
    assert card.data.license is None and "cc-by-4.0 (5), mit (3)" in card.text.replace("\\", "")
    push_anchors(anchors, REPO, include_images=True, license="mit")
    card = DatasetCard(hub.files(REPO, kind="dataset")["README.md"].decode())
    assert card.data.license == "mit" and len(hub.repository(REPO, "dataset").history()) == 3


def test_redacted(hub, anchors, tmp_path):
    with pytest.raises(ValueError, match="redaction_folder"):
        push_anchors(anchors, REPO, redact=True)
    with pytest.raises(ValueError, match="cannot be used together"):
        push_anchors(anchors, REPO, redact=True, include_images=True, license="mit")
    with pytest.raises(ValueError, match="mentions the concept"):
        push_anchors(anchors, "user/fox-anchors", redact=True, redaction_folder=tmp_path)
    push_anchors(anchors, REPO, redact=True, redaction_folder=tmp_path)
    assert not any(b"fox" in content.lower() for content in hub.files(REPO, kind="dataset").values())
    loaded = load_dataset(REPO, split="train")
    assert loaded["score"] == anchors["score"] and not {"caption", "pool_row", "pool_id", "image"} & set(
        loaded.column_names
    )
    assert anchor_info(loaded)["concept"].startswith("redacted on request (hash ")


@pytest.mark.parametrize("place", ["provenance", "caption"])
def test_nothing_local(hub, anchors, place):
    if place == "provenance":
        info = anchor_info(anchors)
        info["pool"]["path"] = "/home/me/pool"
        anchors = set_anchor_info(anchors, info)
    else:
        captions = ["/home/me/x.png"] * len(anchors)
        info = anchor_info(anchors)
        anchors = set_anchor_info(anchors.remove_columns("caption").add_column("caption", captions), info)
    with pytest.raises(ValueError, match="/home/me"):
        push_anchors(anchors, REPO)
    assert not hub.requests


def test_hostile_captions_do_not_break_the_card(hub, anchors):
    info = {**anchor_info(anchors), "concept": "fox | [x](http://evil) <script>\n---\n# h"}
    captions = [
        "a | b\n| c",
        "<script>alert(1)</script>",
        "[x](javascript:1)",
        "---",
        "# h",
        "{{ 7*7 }}",
        "`",
        "\u202egpj",
    ]
    hostile = set_anchor_info(anchors.remove_columns("caption").add_column("caption", captions), info)
    push_anchors(hostile, REPO)
    text = hub.files(REPO, kind="dataset")["README.md"].decode()
    tokens = MarkdownIt("commonmark").enable("table").parse(DatasetCard(text).text)
    kinds = [token.type for token in tokens]
    inline = {child.type for token in tokens for child in token.children or ()}
    assert "\u202e" not in text and not {"link_open", "image", "html_inline"} & inline
    assert (
        kinds.count("html_block") == 1
        and kinds.count("heading_open") == 1
        and kinds.count("tr_open") == 1 + len(anchors)
    )


def test_a_fault_is_retried(hub, anchors, waits, monkeypatch):
    monkeypatch.setattr("space_peft.hub_cards.commit.time.sleep", lambda seconds: None)
    hub.faults.add("commit", lose_reply=True)
    push_anchors(anchors, REPO)
    assert len(hub.repository(REPO, "dataset").history()) == 2
    with pytest.raises(HfHubHTTPError, match="write permission"):
        push_anchors(anchors, REPO, token=hub.read_token, commit_message=json.dumps("x"), license="mit")
