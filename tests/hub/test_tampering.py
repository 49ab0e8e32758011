"""Whatever is changed in a published folder, `verify_erasure` says so and names the file."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from space_peft.demo import demo_model_path
from space_peft.hub_cards import verify_erasure
from space_peft.hub_cards.staging import stage
from space_peft.manifest import MANIFEST_NAME, check_manifest, write_manifest


WATCHED = [
    "adapter_model.safetensors", "adapter_config.json", "space_config.json", "space_certificate.json",
    "space_canary.json", "space_anchors.json", "report.json", "processor_config.json", "tokenizer.json",
    "chat_template.jinja", MANIFEST_NAME,
]  # fmt: skip
BASE = demo_model_path()


@pytest.fixture(scope="module")
def published(erasure_folder, tmp_path_factory):
    """The folder as it would lie on the Hub. Tests put back what they change."""
    folder = tmp_path_factory.mktemp("published")
    stage(erasure_folder, folder, base_model="space-peft/demo-llava", include_images=True)
    return folder


def failed_files(report):
    assert report.exit_code == (1 if report.failed else 0)
    return {check.file for check in report.failed}


def test_an_untouched_folder_passes_every_check(published):
    report = verify_erasure(published, base_model=BASE)
    assert report.exit_code == 0, report.to_text()
    assert {check.name: check.status for check in report.checks} == {
        "no code": "ok", "hashes": "ok", "content": "ok", "base model": "ok", "certificate": "ok", "canary": "ok",
        "retained data": "not checked",
    }  # fmt: skip


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.data())
def test_any_changed_byte_is_found_and_the_file_named(published, data):
    name = data.draw(st.sampled_from(WATCHED))
    path = published / name
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    kind = data.draw(st.sampled_from(["flip", "truncate", "append", "insert", "remove", "delete", "swap"]))
    other = published / data.draw(st.sampled_from([entry for entry in WATCHED if entry != name]))
    others = other.read_bytes()
    changed = {
        "flip": lambda: original[:place] + bytes([original[place] ^ data.draw(st.integers(1, 255))]) + original[place + 1 :],
        "truncate": lambda: original[:place],
        "append": lambda: original + data.draw(st.binary(min_size=1, max_size=3)),
        "insert": lambda: original[:place] + data.draw(st.binary(min_size=1, max_size=3)) + original[place:],
        "remove": lambda: original[:place] + original[place + 1 :],
        "swap": lambda: others,
    }  # fmt: skip
    if kind == "delete" and name == MANIFEST_NAME:
        return  # Whether a folder was published is what the manifest says; see `test_round_trip.py` for the Hub.
    blamed = {name, other.name} if kind == "swap" else {name}
    if MANIFEST_NAME in blamed:
        blamed = {MANIFEST_NAME}  # Without it nothing is known of the others.
    try:
        if kind == "delete":
            path.unlink()
        else:
            path.write_bytes(changed[kind]())
        if kind == "swap":
            other.write_bytes(original)
        report = verify_erasure(published, base_model=BASE)
        assert failed_files(report) == blamed, report.to_text()
        assert all(file in report.to_text() for file in blamed)
        not_loaded = [check for check in report.checks if check.name in ("base model", "canary")]
        assert [check.status for check in not_loaded] == ["not checked"] * 2
    finally:
        path.write_bytes(original)
        other.write_bytes(others)


def test_every_byte_of_the_manifest_counts(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    original = (folder / MANIFEST_NAME).read_bytes()
    for place in range(len(original)):
        (folder / MANIFEST_NAME).write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
        assert [problem.file for problem in check_manifest(folder)] == [MANIFEST_NAME], place


def test_a_manifest_made_to_fit_still_meets_the_certificate(published, tmp_path):
    """Hashes protect against changed files, not against an author; the certificate is of the weights, not of the file."""
    folder = shutil.copytree(published, tmp_path / "copy")
    weights = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in weights if "lora_B" in key)
    weights[key] = weights[key] * 1.01
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_manifest(folder)
    assert failed_files(verify_erasure(folder, base_model=BASE)) == {"space_certificate.json"}


@pytest.mark.parametrize(
    ("name", "key", "value", "blamed"),
    [
        ("adapter_config.json", "lora_alpha", 9, "space_certificate.json"),
        ("adapter_config.json", "peft_type", "IA3", "adapter_config.json"),
        ("adapter_config.json", "megatron_config", {}, "adapter_config.json"),
        ("adapter_config.json", "use_dora", True, "space_config.json"),
        ("adapter_config.json", "base_model_name_or_path", 7, "adapter_config.json"),
        ("adapter_config.json", "base_model_name_or_path", "other/model", "adapter_config.json"),
        ("space_config.json", "strength", 0.1, "space_certificate.json"),
        ("space_config.json", "constraint", "none at all", "space_config.json"),
        ("space_certificate.json", "constraint", "hard", "space_certificate.json"),
        ("space_certificate.json", "layers", [], "space_certificate.json"),
        ("report.json", "after", {}, "report.json"),
        ("report.json", "before", [1], "report.json"),
    ],
)
def test_contents_that_contradict_each_other_are_found_without_hashes(published, tmp_path, name, key, value, blamed):
    folder = shutil.copytree(published, tmp_path / "copy")
    (folder / MANIFEST_NAME).unlink()
    content = json.loads((folder / name).read_text())
    content[key] = value
    (folder / name).write_text(json.dumps(content))
    report = verify_erasure(folder, base_model=BASE)
    assert blamed in failed_files(report), report.to_text()


@pytest.mark.parametrize("name", ["adapter_model.bin", "evil.py", "sub/weights.pkl", "pytorch_model.PT"])
def test_files_that_run_code_are_refused_with_and_without_a_manifest(published, tmp_path, name):
    folder = shutil.copytree(published, tmp_path / "copy")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    for with_manifest in (True, False):
        if not with_manifest:
            (folder / MANIFEST_NAME).unlink()
        report = verify_erasure(folder, base_model=BASE)
        assert ("no code", name) in [(check.name, check.file) for check in report.failed]
        assert all(check.status == "not checked" for check in report.checks if check.name == "base model")


def test_a_loadable_file_that_was_not_published_is_found_and_a_picture_is_not(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    (folder / "photo.jpg").write_bytes(b"x")
    (folder / "LICENSE").write_text("x")
    assert verify_erasure(folder, base_model=BASE, canary=False).exit_code == 0
    (folder / "generation_config.json").write_text("{}")
    assert failed_files(verify_erasure(folder, base_model=BASE)) == {"generation_config.json"}


def test_a_manifest_that_points_outside_is_refused(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "copy")
    (tmp_path / "secret").write_text("secret")
    (folder / "link.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="leads out of the folder"):
        write_manifest(folder)
    (folder / "link.json").unlink()
    (folder / "report.json").unlink()
    (folder / "report.json").symlink_to(tmp_path / "secret")
    problems = check_manifest(folder)
    assert [problem.file for problem in problems] == ["report.json"] and "leads out" in problems[0].message
