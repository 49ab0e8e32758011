"""Reading from the local Hub, with huggingface_hub and what builds on it: PEFT, transformers, datasets, cards."""

import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    ModelCard,
    file_exists,
    get_paths_info,
    get_session,
    hf_hub_download,
    list_repo_tree,
    model_info,
    snapshot_download,
    try_to_load_from_cache,
    upload_file,
    whoami,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from packaging.version import Version
from samples import REPO, commit_files, contents


pytestmark = pytest.mark.usefixtures("every_request_is_understood")


# Reading


def test_what_is_there(hub, folder, pushed):
    info = model_info(REPO, files_metadata=True)
    assert {sibling.rfilename for sibling in info.siblings} == {*contents(folder), ".gitattributes"}
    weights = next(s for s in info.siblings if s.rfilename == "adapter_model.safetensors")
    assert weights.size == weights.lfs.size == 400_000
    assert (info.sha, info.author, info.private, info.card_data.license) == (pushed, "user", False, "mit")
    assert info.tags == ["space-peft"]
    assert model_info(REPO, expand=["sha"]).siblings is None
    assert file_exists(REPO, "empty.txt") and not file_exists(REPO, "full.txt")
    found = get_paths_info(REPO, ["pictures", "README.md", "missing"])
    assert [type(entry).__name__ for entry in found] == ["RepoFolder", "RepoFile"]


def test_the_tree_comes_in_pages(hub, folder, pushed):
    hub.page_size = 2
    everything = {entry.path for entry in list_repo_tree(REPO, recursive=True)}
    assert everything == {*contents(folder), ".gitattributes", "pictures"}
    assert len(hub.requests_to("tree")) == 4  # 7 entries
    assert "pictures/before & after.png" not in {entry.path for entry in list_repo_tree(REPO)}
    (picture,) = list_repo_tree(REPO, "pictures", expand=True)
    assert picture.path == "pictures/before & after.png" and picture.last_commit.oid == pushed
    with pytest.raises(EntryNotFoundError):
        list(list_repo_tree(REPO, "missing"))


def test_snapshot(hub, folder, pushed):
    downloaded = contents(snapshot_download(REPO))
    assert downloaded.pop(".gitattributes").startswith(b"*.7z filter=lfs")
    assert downloaded == contents(folder)
    assert all("authorization" not in request.headers for request in hub.requests_to("download"))
    only = snapshot_download(REPO, allow_patterns="*.json", cache_dir=folder.parent / "other")
    assert set(contents(only)) == {"adapter_config.json"}


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors"])
def test_a_file_is_fetched_once_per_content(hub, pushed, name):
    first = hf_hub_download(REPO, name)
    hub.requests.clear()
    assert hf_hub_download(REPO, name) == first
    assert [request.method for request in hub.requests] == ["HEAD"]
    hub.commit(REPO, {"other.txt": b"a new commit"})
    second = hf_hub_download(REPO, name)
    assert second != first and os.path.realpath(second) == os.path.realpath(first)
    assert [request.method for request in hub.requests] == ["HEAD", "HEAD"]
    hub.commit(REPO, {name: b"new content"})
    assert open(hf_hub_download(REPO, name), "rb").read() == b"new content"


def test_what_is_missing_is_said(hub, pushed):
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "missing.json")
    assert try_to_load_from_cache(REPO, "missing.json") is _CACHED_NO_EXIST
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "README.md", revision="no-such-branch")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="no-such-branch")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/never-made", "README.md")


def test_ranges(hub, folder, pushed):
    whole = (folder / "adapter_model.safetensors").read_bytes()
    url = f"{hub.url}/{REPO}/resolve/main/adapter_model.safetensors"
    for header, expected in (("bytes=10-19", whole[10:20]), ("bytes=399990-", whole[-10:]), ("bytes=-7", whole[-7:])):
        response = get_session().get(url, headers={"Range": header})
        assert response.status_code == 206 and response.content == expected
    assert get_session().get(url, headers={"Range": "bytes=400000-"}).status_code == 416
    raw = get_session().get(url.replace("/resolve/", "/raw/")).text
    assert raw.startswith("version https://git-lfs") and raw.endswith("size 400000\n")


# Cards


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("1.21"),
    reason="older versions ask huggingface.co whether a card is valid",
)
def test_card_pushed_and_loaded(hub, pushed):
    card = ModelCard("---\nlicense: apache-2.0\nbase_model: space-peft/demo-llava\n---\n# Forgets fox\n")
    card.push_to_hub(REPO)
    assert hub.files(REPO)["README.md"] == str(card).encode()
    loaded = ModelCard.load(REPO)
    assert loaded.data.base_model == "space-peft/demo-llava" and "Forgets fox" in loaded.text
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit_files({"README.md": b"# No metadata\n"})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: [", "YAML Metadata Error"),
        ("- a list", "expected a mapping"),
        ("base_model: /home/me/model", "base_model"),
        ("tags: one", "tags"),
        ("datasets: [1]", "datasets"),
        ("license: 2.0", "license"),
        ("language: English", "language"),
        ("pipeline_tag: [a]", "pipeline_tag"),
        ("model-index: [{results: []}]", r"model-index\[0\].name"),
        ("model-index: [{name: x, results: [{task: {}, dataset: {name: d, type: d}, metrics: []}]}]", "task.type"),
        (
            "model-index: [{name: x, results: [{task: {type: t}, dataset: {name: d, type: d}, metrics: [{type: m}]}]}]",
            r"metrics\[0\].value",
        ),
    ],
)
def test_invalid_metadata_is_refused(hub, pushed, metadata, message):
    with pytest.raises(ValueError, match=message):
        upload_file(repo_id=REPO, path_or_fileobj=f"---\n{metadata}\n---\n".encode(), path_in_repo="README.md")
    assert hub.head(REPO) == pushed and not hub.requests_to("commit")  # Found out before anything is sent.


# What builds on huggingface_hub


@pytest.mark.slow
def test_model_adapter_and_processor_over_http(hub, demo_base, tmp_path):
    """Stock transformers and PEFT, in this process and in a fresh one: the logits are those of the local model."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base = AutoModelForImageTextToText.from_pretrained(demo_base)
    assert base.config._name_or_path == demo_base
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    model.push_to_hub(REPO, private=True)
    assert set(hub.files(REPO)) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}

    processor = AutoProcessor.from_pretrained(demo_base)
    inputs = processor.tokenizer("what is in the picture", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
        fresh = AutoModelForImageTextToText.from_pretrained(demo_base)
        torch.testing.assert_close(PeftModel.from_pretrained(fresh, REPO)(**inputs).logits, expected, rtol=0, atol=0)
    torch.save({"inputs": dict(inputs), "expected": expected}, tmp_path / "logits.pt")
    code = """
import sys, torch
from transformers import AutoModelForImageTextToText
saved = torch.load(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained("user/adapter").eval()  # base and adapter
with torch.no_grad():
    torch.testing.assert_close(model(**saved["inputs"]).logits, saved["expected"], rtol=0, atol=0)
assert "space_peft" not in sys.modules
print("identical")
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "logits.pt")],
        env=hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert run.stdout.strip() == "identical", run.stderr[-2000:]


def test_dataset_pushed_and_loaded(hub, demo_images):
    from datasets import Image, load_dataset

    rows = demo_images.select(range(6)).select_columns(["image", "name"])
    rows.push_to_hub("user/anchors", private=True)
    assert hub.repository("user/anchors", "dataset").private
    loaded = load_dataset("user/anchors", split="train")
    assert loaded["name"] == rows["name"] and isinstance(loaded.features["image"], Image)
    assert loaded[3]["image"].tobytes() == rows[3]["image"].tobytes()
    before = hub.head("user/anchors", kind="dataset")
    rows.select(range(2)).push_to_hub("user/anchors", revision="small", create_pr=False)
    assert hub.head("user/anchors", kind="dataset") == before
    assert len(load_dataset("user/anchors", split="train", revision="small")) == 2


def test_a_fresh_process_gets_its_own_caches_and_nothing_of_ours(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    code = """
from huggingface_hub import constants, get_token, HfApi
from huggingface_hub.utils._runtime import is_xet_available
print(constants.ENDPOINT, constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE, is_xet_available(), get_token())
print(HfApi().whoami()["name"] if get_token() else "nobody")
"""
    for token, name in (("", "user"), (hub.stranger_token, "stranger"), (None, "nobody")):
        environment = hub.environment(tmp_path, token=token)
        assert not [key for key in environment if key.lower() == "https_proxy"]
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
        line, who = run.stdout.strip().splitlines()
        held = {"user": hub.token, "stranger": hub.stranger_token}.get(name)
        assert line == f"{hub.url} {tmp_path}/hub False False {held}" and who == name


def test_the_endpoint_may_be_given_explicitly(hub):
    assert HfApi(endpoint=hub.url, token=hub.stranger_token).whoami()["name"] == "stranger"


def test_a_reset_hub_remembers_nothing(hub, pushed):
    hub.faults.add("whoami", status=500)
    hub.page_size, hub.part_size = 2, 1
    hub.reset()
    assert not hub.exists(REPO) and not hub.requests and hub.page_size == 1000 and hub.part_size is None
    assert whoami()["name"] == "user"
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "README.md", local_files_only=True)
