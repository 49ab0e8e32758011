"""`push_erasure` over HTTP: what arrives, and what must not leave the machine."""

import hashlib
import json
import logging
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download

from space_peft.hub_cards import push_erasure
from space_peft.hub_cards.local_traces import local_trace
from space_peft.hub_cards.manifest import check_manifest
from space_peft.records.card_data import ErasureCardData


REPO = "user/demo-erasure"
BASE = "space-peft/demo-llava"


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def folder(erasure_folder, tmp_path):
    """A copy of the trained erasure, with what a run leaves around it."""
    copy = tmp_path / "run"
    shutil.copytree(erasure_folder, copy)
    (copy / "pictures").mkdir(exist_ok=True)
    (copy / "pictures" / "probes.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (copy / "checkpoint-5").mkdir()
    (copy / "checkpoint-5" / "optimizer.pt").write_bytes(pickle.dumps({}))
    (copy / "notes.txt").write_text("mine")
    return copy


def push(folder, repo_id=REPO, **options):
    return push_erasure(folder, repo_id, **{"base_model": BASE, **options})


def titles(hub, repo_id=REPO, revision="main"):
    return [commit.title for commit in hub.repository(repo_id).history(revision)]


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_exactly_the_files_of_the_list_arrive_in_one_commit(hub, folder, tmp_path):
    before = hashes(folder)
    info = push(folder, commit_message="Forget it")
    files = hub.files(REPO)
    left_out = {
        name
        for name in before
        if name.startswith(("answers_", "checkpoint-", "canary/")) or name in ("notes.txt", "training_args.bin")
    } | {"space_stats.safetensors", "space_measured.json"}
    assert {"training_args.bin", "answers_after.jsonl", "space_stats.safetensors", "canary/0.png"} <= left_out
    assert set(files) == set(before) - left_out | {"README.md", "space_manifest.json"}
    assert titles(hub) == ["Forget it", "initial commit"]
    assert info.oid == hub.head(REPO) and info.commit_url.endswith(info.oid)
    assert hashes(folder) == before
    changed = ("adapter_config.json", "space_card.json", "space_canary.json", "README.md", "space_manifest.json")
    for name in set(files) - set(changed):
        assert files[name] == (folder / name).read_bytes(), name
    config = json.loads(files["adapter_config.json"])
    assert config == {**json.loads((folder / "adapter_config.json").read_text()), "base_model_name_or_path": BASE}
    assert json.loads(files["space_card.json"])["base_model"] == BASE
    assert {item["kind"] for item in json.loads(files["space_canary.json"])["items"]} == {"seed"}
    assert check_manifest(snapshot_download(REPO)) == []


def test_asked_for_images_answers_and_null_spaces_come_too(hub, folder):
    push(folder, include_images=True, include_answers=True, include_null_spaces=True)
    files = hub.files(REPO)
    assert {"canary/0.png", "answers_before.jsonl", "answers_after.jsonl", "space_stats.safetensors"} <= set(files)
    assert {item["kind"] for item in json.loads(files["space_canary.json"])["items"]} == {"seed", "image"}


def test_nothing_local_is_published(hub, folder, tmp_path):
    push(folder, include_images=True, include_answers=True, include_null_spaces=True)
    for name, content in hub.files(REPO).items():
        for secret in (str(tmp_path), str(Path(__file__).parents[2]), str(Path.home()) + "/", hub.token):
            assert secret.encode() not in content, (name, secret)


def test_a_second_push_updates_results_and_removes_what_is_gone(hub, folder):
    push(folder)
    hub.commit(REPO, {"theirs.md": b"kept", "pictures/theirs.png": b"kept"})
    first = ModelCard(hub.files(REPO)["README.md"].decode())
    (folder / "pictures" / "probes.png").unlink()
    edit_json(folder / "report.json", lambda report: report["after"]["retain"].update(value=0.25))
    push(folder)
    files = hub.files(REPO)
    assert len(titles(hub)) == 4
    assert "pictures/probes.png" not in files and files["theirs.md"] == files["pictures/theirs.png"] == b"kept"
    second = ModelCard(files["README.md"].decode())

    def results(card):
        return {(r.dataset_config, r.metric_name): r.metric_value for r in card.data.eval_results}

    assert len(second.data.eval_results) == len(first.data.eval_results) == len(results(second))
    changed = {key for key, value in results(second).items() if results(first)[key] != value}
    assert changed == {("retain", "retain (after erasure)")}


def test_pushing_the_same_again_makes_no_commit(hub, folder):
    first = push(folder)
    second = push(folder)
    assert second.oid == first.oid and len(titles(hub)) == 2


def test_a_damaged_manifest_on_the_hub_deletes_nothing(hub, folder, caplog):
    push(folder)
    hub.commit(REPO, {"space_manifest.json": b'{"files": ', "pictures/old.png": b"x"})
    with caplog.at_level(logging.WARNING):
        push(folder)
    assert "pictures/old.png" in hub.files(REPO) and "manifest is damaged" in caplog.text


def test_a_hostile_manifest_deletes_only_what_is_in_the_repository(hub, folder):
    hub.create(REPO)
    listed = {"../other": {}, "/etc/passwd": {}, "README.md": {}, "mine.md": {}}
    hub.commit(REPO, {"space_manifest.json": json.dumps({"files": listed}).encode(), "mine.md": b"x"})
    push(folder)
    assert "mine.md" not in hub.files(REPO) and "README.md" in hub.files(REPO)


def test_revision_makes_a_branch_and_leaves_main_alone(hub, folder):
    push(folder, revision="v2")
    assert hub.files(REPO) == {} and "adapter_model.safetensors" in hub.files(REPO, "v2")
    push(folder, revision="v2", commit_message="again")
    assert titles(hub, revision="v2") == ["Upload erasure with space-peft", "initial commit"]


def test_a_pull_request_leaves_main_alone(hub, folder):
    info = push(folder, create_pr=True)
    assert info.pr_num == 1 and hub.files(REPO) == {}
    assert "adapter_model.safetensors" in hub.files(REPO, "refs/pr/1")


@pytest.mark.parametrize("private", [True, False])
def test_private(hub, folder, private):
    push(folder, private=private)
    assert hub.repository(REPO).private is private


def test_a_repository_without_owner_is_the_users(hub, folder):
    push(folder, "demo-erasure")
    assert "adapter_model.safetensors" in hub.files("user/demo-erasure")


def test_the_given_token_is_used(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    push(folder, token=hub.token)
    assert {request.headers["authorization"] for request in hub.requests_to("commit")} == {f"Bearer {hub.token}"}


def test_a_card_that_a_person_wrote_is_kept(hub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    push(folder)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.text.strip() == "# My own words" and card.data.license == "mit"


def test_peft_writes_the_local_base_into_a_persons_card_and_it_is_replaced(hub, folder):
    path = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    (folder / "README.md").write_text(
        f"---\nbase_model: {path}\ntags:\n- base_model:adapter:{path}\n- mine\n---\n# My own words\n"
    )
    push(folder)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.base_model == BASE and card.data.tags == [f"base_model:adapter:{BASE}", "mine"]


# What is refused, before anything is sent


def refused(hub, folder, match, **options):
    before = hashes(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        push(folder, **options)
    assert not hub.requests_to("create_repo", "commit", "preupload", "upload") and not hub.exists(REPO)
    assert hashes(folder) == before
    return str(caught.value)


def test_a_base_model_known_by_its_path_only_is_asked_for(hub, folder):
    message = refused(hub, folder, "not an id on the Hub", base_model=None)
    assert "--base-model" in message and "base_model" in message


@pytest.mark.parametrize("base", ["/models/llava", "./models/llava", "~/llava", "C:\\models\\llava", "a/b/c"])
def test_a_given_base_model_that_is_a_path_is_refused(hub, folder, base):
    refused(hub, folder, "not an id on the Hub", base_model=base)


def test_the_base_model_of_the_card_data_is_used(hub, folder):
    data = ErasureCardData.load(folder)
    data.base_model, data.base_revision = BASE, "a" * 40
    data.save(folder)
    push(folder, base_model=None)
    config = json.loads(hub.files(REPO)["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE and config["revision"] == "a" * 40
    # Another base than the recorded one has another commit.
    push(folder, base_model="org/other")
    config = json.loads(hub.files(REPO)["adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/other" and config["revision"] is None


def test_a_folder_without_adapter_is_refused(hub, folder):
    (folder / "adapter_config.json").unlink()
    refused(hub, folder, "adapter_config.json")


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(hub, folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    message = refused(hub, folder, "adapter_model.bin.*pickle")
    command = message[message.index('"') + 1 : message.rindex('"')]
    shutil.move(folder / "adapter_model.bin", folder.parent / "adapter_model.bin")
    here = os.getcwd()
    os.chdir(folder.parent)
    try:
        exec(command, {})  # What the message tells to run.
    finally:
        os.chdir(here)
    shutil.move(folder.parent / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    push(folder)


def torch_zip(path):
    torch.save({"a": torch.zeros(2)}, path)


def torch_old(path):
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


def plain_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", pickle.dumps({}))


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "tokenizer.json", "pictures/probes.png", "space_config.json"]
)
@pytest.mark.parametrize(
    "write",
    [torch_zip, torch_old, plain_zip]
    + [lambda path, protocol=protocol: path.write_bytes(pickle.dumps([1], protocol)) for protocol in (2, 3, 4, 5)],
)
def test_a_pickle_is_refused_whatever_its_name(hub, folder, name, write):
    write(folder / name)
    assert name in refused(hub, folder, "pickle")


@pytest.mark.parametrize("name", ["weights.pt", "sub/model.ckpt", "data.pkl", "pytorch_model.bin"])
def test_a_pickles_name_is_refused_whatever_its_content(hub, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    assert name in refused(hub, folder, "pickle")


def test_the_shortest_safetensors_files_are_no_pickles(hub, folder):
    # Their first bytes are the header's length: 0x80 is that of a header of 128 bytes, 0x280 of 640.
    from space_peft.hub_cards.staging import _is_pickle

    for size in (0x80, 0x280, 0x380, 0x480, 0x580):
        path = folder / "x.safetensors"
        path.write_bytes(size.to_bytes(8, "little") + b"{" + b" " * (size - 2) + b"}")
        assert not _is_pickle(path), hex(size)


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_damaged_adapter_is_refused(hub, folder, size):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(hub, folder, "adapter_model.safetensors is damaged")


def test_a_link_out_of_the_folder_is_refused(hub, folder, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    assert "special_tokens_map.json" in refused(hub, folder, "leads out of the folder")


PLANTED = {
    "token": "hf_" + "aB3" * 10,
    "home": str(Path.home() / "data" / "x.json"),
    "home of another machine": "/home/somebody/data",
    "mac": "see /Users/somebody/data",
    "windows": "C:\\Users\\somebody\\data",
    "tilde": "~/data/x",
    "file url": "file:///data/x",
    "temporary": "/tmp/run-7",
    "environment": "s3cr3t-s3cr3t-s3cr3t",
}


@pytest.mark.parametrize("text", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize(
    "file, key",
    [("report.json", "settings"), ("space_anchors.json", "description"), ("adapter_config.json", "task_type")],
)
def test_planted_traces_are_found_and_their_place_is_named(hub, folder, monkeypatch, text, file, key):
    monkeypatch.setenv("MY_API_KEY", PLANTED["environment"])
    edit_json(folder / file, lambda content: content.update({key: {"note": f"{text}"} if key == "settings" else text}))
    message = refused(hub, folder, "local to this machine")
    assert f"{file}: {key}" in message
    if text in (PLANTED["token"], PLANTED["environment"]):
        assert text not in message


def test_a_token_in_the_tokenizer_or_in_weights_is_found(hub, folder):
    (folder / "chat_template.jinja").write_text("{# " + PLANTED["token"] + " #}")
    assert "chat_template.jinja: line 1" in refused(hub, folder, "local to this machine")


@pytest.mark.parametrize(
    "text",
    [
        "image and/or text", "https://huggingface.co/org/home/x", "</s>", "a/b", "1/2", "./relative/path", "org/name",
        r"(.*\.)?(language_model\.(.*\.)?q_proj)", "{% if x %}/{% endif %}", "~10 s", "lr: 5e-3", "hf_hub", "N/A / none",
        "is this a fox?", "\\n", "s3://bucket/x",
    ],
)  # fmt: skip
def test_ordinary_texts_are_no_traces(text):
    assert local_trace(text) is None


def test_a_vocabulary_may_hold_pieces_of_paths():
    assert local_trace("/usr", paths=False) is None and local_trace("/usr") is not None
