"""Train, push, load in a process that has no space_peft, verify: all of it over HTTP with the unmodified libraries."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from peft import PeftModel
from samples import telling
from transformers import AutoModelForImageTextToText

from space_peft.canary.check import Canary
from space_peft.cli import main
from space_peft.demo import load_demo_model
from space_peft.hub_cards import load_erased, push_erasure, verify_erasure
from space_peft.modeling.prompts import build_batch
from space_peft.records.card_data import ErasureCardData
from space_peft.records.folder import MANIFEST_NAME


REPO = "user/without-fox"

# Stock libraries only, in a process where importing space_peft fails.
LOAD = """
import sys
sys.modules["space_peft"] = None
try:
    import space_peft
except ImportError:
    pass
else:
    raise SystemExit("space_peft can be imported")
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
base, repo, batch, out = sys.argv[1:]
batch = torch.load(batch)
with torch.no_grad():
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    before = model(**batch).logits
    peft = PeftModel.from_pretrained(model, repo).eval()(**batch).logits
    # The repository names its base model, which is looked up and downloaded as well.
    auto = AutoModelForImageTextToText.from_pretrained(repo, dtype=torch.float32).eval()(**batch).logits
torch.save([before, peft, auto], out)
"""


@pytest.fixture
def pushed(hub, demo_base, erasure_folder):
    """The erasure on the Hub, beside its base model."""
    return push_erasure(erasure_folder, REPO, base_model=demo_base, include_images=True)


def tamper(hub, name, change):
    """Somebody who can write to the repository changes one file of it."""
    hub.commit(REPO, {name: change(hub.files(REPO)[name])})


def flip(content):
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_stock_libraries_load_it_without_space_peft(hub, demo_base, pushed, erasure_folder, demo_images, tmp_path):
    model, processor = load_demo_model()
    model = PeftModel.from_pretrained(model, erasure_folder)
    batch = build_batch(processor, ["what is this?"] * 4, images=demo_images["image"][:4])
    batch.pop("labels")
    with torch.no_grad():
        trained = model(**batch).logits
    torch.save(batch, tmp_path / "batch.pt")
    arguments = [demo_base, REPO, str(tmp_path / "batch.pt"), str(tmp_path / "out.pt")]
    environment = {**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, peft, auto = torch.load(tmp_path / "out.pt")
    assert (before - trained).abs().max() > 1e-3, "the adapter must do something"
    assert torch.equal(peft, trained)
    assert torch.equal(auto, trained)


def test_load_erased_from_the_hub_pins_what_it_loads(hub, demo_base, pushed, erasure_folder):
    model = load_erased(REPO, revision=pushed.oid, dtype=torch.float32)
    expected = PeftModel.from_pretrained(load_demo_model()[0], erasure_folder).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    # A later commit does not reach those who asked for this one.
    tamper(hub, "adapter_model.safetensors", flip)
    load_erased(REPO, revision=pushed.oid, check_canary=False)
    with pytest.raises(ValueError, match="1 files are not as they were published. adapter_model.safetensors"):
        load_erased(REPO)


def test_verify_passes_and_names_the_commit(hub, pushed, demo_erasure_data):
    report = verify_erasure(REPO, retain_dataset=demo_erasure_data[1])
    assert report.exit_code == 0 and report.commit == pushed.oid, report.to_text()
    left = {check.name: check.status for check in report.checks if check.status != "ok"}
    assert left == {"bound": "not checked", "name": "not checked"}, "no statistics were pushed, and no audit asked for"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "space_certificate.json", MANIFEST_NAME])
def test_a_byte_changed_on_the_hub_makes_verify_fail(hub, pushed, capsys, name):
    assert main(["verify", REPO, "--no-canary"]) == 0
    tamper(hub, name, flip)
    assert main(["verify", REPO, "--no-canary"]) == 1
    out = capsys.readouterr().out
    assert any("FAILED" in line and name in line for line in out.splitlines()), out
    assert main(["verify", REPO, "--no-canary", "--revision", pushed.oid]) == 0


def test_a_deleted_file_and_a_deleted_manifest_make_verify_fail(hub, pushed):
    hub.commit(REPO, {"space_certificate.json": None})
    assert [check.file for check in verify_erasure(REPO, canary=False).failed] == ["space_certificate.json"]
    hub.commit(REPO, {MANIFEST_NAME: None})
    assert [check.file for check in verify_erasure(REPO, canary=False).failed] == [MANIFEST_NAME]
    with pytest.warns(UserWarning, match=f"no {MANIFEST_NAME}"):
        load_erased(REPO, check_canary=False)


@pytest.mark.parametrize("name", ["adapter_model.bin", "modeling_evil.py"])
def test_code_on_the_hub_is_neither_downloaded_nor_run(hub, pushed, name):
    hub.commit(REPO, {name: b"raise SystemExit('ran')"})
    report = verify_erasure(REPO)
    assert [(check.name, check.file) for check in report.failed] == [("no code", name)]
    with pytest.raises(ValueError, match=f"{name!r} would run whatever is in it"):
        load_erased(REPO)
    assert not [request for request in hub.requests if request.path.endswith(name)]


def test_a_truncated_download_is_never_taken_for_the_file(hub, pushed, waits):
    hub.faults.add("download", cut_reply_after=1000, times=50)
    with pytest.raises(ConnectionError, match="user/without-fox.* was not downloaded"):
        load_erased(REPO)
    assert main(["verify", REPO]) == 2
    hub.faults.clear()
    assert verify_erasure(REPO).exit_code == 0


def test_a_damaged_cache_is_found(hub, pushed):
    report = verify_erasure(REPO, canary=False)
    assert report.exit_code == 0
    path = os.path.realpath(try_to_load_from_cache(REPO, "adapter_model.safetensors", revision=pushed.oid))
    with open(path, "r+b") as file:
        file.seek(2000)
        file.write(b"\xff")
    assert [check.file for check in verify_erasure(REPO, canary=False).failed] == ["adapter_model.safetensors"]


def test_a_base_model_that_changed_is_found(hub, demo_base, pushed):
    """The base model's repository is somebody else's: its main branch may move."""
    from safetensors.torch import load, save

    weights = load(hub.files(demo_base)["model.safetensors"])
    weights = {name: weight * 1.01 if weight.is_floating_point() else weight for name, weight in weights.items()}
    hub.commit(demo_base, {"model.safetensors": save(weights, metadata={"format": "pt"})})
    report = verify_erasure(REPO)
    assert [check.name for check in report.failed] == ["canary"] and "not the one" in report.failed[0].message
    assert verify_erasure(REPO, base_model=load_demo_model()[0]).exit_code == 0


def test_the_recorded_commit_of_the_base_model_is_loaded(hub, demo_base, erasure_folder, tmp_path):
    folder = shutil.copytree(erasure_folder, tmp_path / "erasure")
    data = ErasureCardData.load(folder)
    data.base_model, data.base_revision = demo_base, hub.head(demo_base)
    data.save(folder)
    push_erasure(folder, REPO)
    assert json.loads(hub.files(REPO)["adapter_config.json"])["revision"] == data.base_revision
    hub.commit(demo_base, {"model.safetensors": b"broken"})
    assert verify_erasure(REPO).exit_code == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapter was trained on")
        load_erased(REPO)


def test_another_repository_or_commit_of_the_base_model_is_said(hub, demo_base, erasure_folder, tmp_path):
    folder = shutil.copytree(erasure_folder, tmp_path / "erasure")
    data = ErasureCardData.load(folder)
    data.base_model, data.base_revision = demo_base, hub.head(demo_base)
    data.save(folder)
    push_erasure(folder, REPO)
    hub.commit(demo_base, {"NEWS.txt": b"a later commit, the same weights"})
    later = hub.head(demo_base)
    base = AutoModelForImageTextToText.from_pretrained(demo_base, dtype=torch.float32)
    with pytest.warns(UserWarning, match=f"trained on {demo_base!r} at commit {data.base_revision}; .* commit {later}"):
        load_erased(REPO, base_model=base)
    hub.create("user/copy")
    hub.commit("user/copy", hub.files(demo_base))
    with pytest.warns(UserWarning, match=f"trained on {demo_base!r} at commit .*; this is 'user/copy'"):
        load_erased(REPO, base_model="user/copy")


def test_private_and_missing_repositories_are_bad_input(hub, pushed, monkeypatch, capsys):
    hub.repository(REPO).private = True
    assert main(["verify", REPO, "--no-canary"]) == 0
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    assert main(["verify", REPO]) == 2
    assert main(["verify", "user/nothing"]) == 2
    assert main(["verify", "not a repository!"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("space-peft verify: ") == 3 and "Traceback" not in printed.err


def test_redacted_and_imageless_pushes_verify(hub, demo_base, erasure_folder, tmp_path):
    folder = shutil.copytree(erasure_folder, tmp_path / "erasure")
    push_erasure(folder, "user/redacted", base_model=demo_base, redact=True)
    assert telling(hub.files("user/redacted"), "fox") == []
    report = verify_erasure("user/redacted")
    assert report.exit_code == 0, report.to_text()
    canary = next(check for check in report.checks if check.name == "canary")
    assert canary.status == "ok", canary.message
    # None of its pictures is published, and no answer says the name.
    assert all(item.kind == "seed" for item in Canary.load(snapshot_download("user/redacted")).items)
