"""`load_erased` and `verify_erasure` on folders: what fits, what does not, and what the reports say."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from space_peft.canary.check import Canary
from space_peft.canary.check import _answer as canary_items_again
from space_peft.cli import main
from space_peft.data.seed_images import seed_image
from space_peft.demo import demo_model_path, load_demo_model
from space_peft.hub_cards import load_erased, verify_erasure
from space_peft.hub_cards.load import attach_adapter
from space_peft.hub_cards.manifest import write_manifest
from space_peft.hub_cards.source import AdapterSource, fetch, recorded_base
from space_peft.hub_cards.verify import Check, VerifyReport
from space_peft.modeling.prompts import build_batch, generate_answers
from space_peft.null_space.certificate import RetentionCertificate
from space_peft.records.card_data import ErasureCardData
from space_peft.records.folder import CANARY_NAME, CERTIFICATE_NAME


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(erasure_folder, tmp_path):
    """A copy of the erasure as the trainer left it: never published."""
    return shutil.copytree(erasure_folder, tmp_path / "erasure")


def statuses(report):
    return {check.name: check.status for check in report.checks}


def find(report, name):
    return next(check for check in report.checks if check.name == name)


def edit(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_load_erased_is_the_trained_model(folder):
    expected = PeftModel.from_pretrained(load_demo_model()[0], folder)
    model, processor = load_erased(folder, dtype=torch.float32), load_demo_model()[1]
    assert isinstance(model, PeftModel) and not model.training
    batch = build_batch(processor, ["what is this?"] * 3, images=[seed_image(i, 64, 64) for i in range(3)])
    batch.pop("labels")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected(**batch).logits)
    # A model that is loaded already is used as it is.
    own, _ = load_demo_model()
    assert load_erased(folder, base_model=own).get_base_model() is own


def test_the_whole_report_of_an_unpublished_folder(folder, demo_erasure_data):
    _, retained = demo_erasure_data
    report = verify_erasure(folder, retain_dataset=retained)
    assert statuses(report) == {
        "no code": "ok", "hashes": "not checked", "content": "ok", "base model": "ok", "certificate": "ok",
        "bound": "ok", "processor": "ok", "canary": "ok", "retained data": "ok", "name": "not checked",
    }, report.to_text()  # fmt: skip
    assert report.exit_code == 0
    assert "the certificate's rows" in find(report, "retained data").message
    assert "not published yet" in find(report, "hashes").message


def test_what_was_checked_is_what_is_used(folder, demo_erasure_data, monkeypatch):
    """A file is read once: it could be another one the next time."""
    read = []
    for kind in (RetentionCertificate, Canary, ErasureCardData):
        load = kind.load
        monkeypatch.setattr(kind, "load", lambda place, load=load, kind=kind: read.append(kind) or load(place))
    report = verify_erasure(folder, retain_dataset=demo_erasure_data[1], images=[seed_image(0, 64, 64)])
    assert find(report, "retained data").status == find(report, "canary").status == "ok"
    assert sorted(kind.__name__ for kind in read) == ["Canary", "ErasureCardData", "RetentionCertificate"]


def test_the_command_shows_a_line_for_each_part_and_how_it_ended(folder, tmp_path, capsys):
    base = ["--base-model", str(demo_model_path())]
    assert main(["verify", str(folder), *base, "--audit", "--concept", "fox", "--steps", "1", "--json", "-"]) in (0, 1)
    out, err = capsys.readouterr()
    found = {check["name"]: check["status"] for check in json.loads(out)["checks"]}
    lines = [line.rpartition(", ")[0] for line in err.splitlines() if line.startswith("[")]
    assert lines == [
        "[1/5] checked the files", "[2/5] loaded the model", "[3/5] checked certificate and bound: ok, ok",
        "[4/5] asked the canary's questions: ok", f"[5/5] asked for the name: {found['name']}",
    ]  # fmt: skip
    edit_weights(folder, lambda weights: weights.pop(min(weights)))
    assert main(["verify", str(folder), *base]) == 1
    assert "[2/4] the model could not be loaded" in capsys.readouterr().err
    assert main(["merge", str(folder), str(tmp_path / "merged"), *base]) == 2
    assert "[1/3]" not in capsys.readouterr().err


def test_a_merge_shows_its_parts(folder, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert main(["merge", str(folder), str(merged), "--base-model", str(demo_model_path())]) == 0
    lines = [line.rpartition(", ")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert lines == [
        "[1/3] loaded the model", "[2/3] added the adapter to the weights", f"[3/3] saved to {merged}",
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_missing_and_extra_weights_are_errors(folder, part):
    def drop(weights):
        weights.pop(min(key for key in weights if part in key))

    edit_weights(folder, drop)
    with pytest.raises(ValueError, match=f"{WEIGHTS} lacks 1 weights, the first is .*{part}"):
        load_erased(folder)
    report = verify_erasure(folder)
    assert report.exit_code == 1 and WEIGHTS in find(report, "base model").message
    assert find(report, "canary").status == "not checked"


def test_a_weight_without_a_place_is_an_error(folder):
    edit_weights(folder, lambda weights: weights.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 2)}))
    with pytest.raises(ValueError, match="without a place in the model, 1 weights, .*lm_head"):
        load_erased(folder)


def test_weights_of_another_shape_are_an_error(folder):
    def widen(weights):
        key = next(iter(weights))
        weights[key] = torch.cat([weights[key], weights[key]])

    edit_weights(folder, widen)
    with pytest.raises(ValueError, match=f"{WEIGHTS} does not fit the base model"):
        load_erased(folder)


def test_weights_that_are_no_numbers_are_found(folder):
    edit_weights(folder, lambda weights: weights[min(weights)].fill_(float("nan")))
    report = verify_erasure(folder)
    assert [(check.file, "NaN" in check.message) for check in report.failed] == [(WEIGHTS, True)]


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 7 + b"\x7f{}", b"\x02" + b"\0" * 7 + b"{]"])
def test_damaged_safetensors_are_a_clear_error(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged or cut off"):
        load_erased(folder)
    assert [check.file for check in verify_erasure(folder).failed] == [WEIGHTS]


def test_another_base_of_the_same_shape_is_refused(folder):
    base, _ = load_demo_model()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="The base model is not the one the adapter was trained on"):
        load_erased(folder, base_model=base)
    again, _ = load_demo_model()
    again.load_state_dict({name: weight * (1 + 1e-5) for name, weight in again.state_dict().items()})
    report = verify_erasure(folder, base_model=again)
    assert [check.name for check in report.failed] == ["canary"], report.to_text()
    assert "not the one" in report.failed[0].message


def test_another_architecture_is_refused(folder):
    from tiny_models import tiny_llava

    with pytest.raises(ValueError, match="does not fit the base model .* Is it the one .* size mismatch"):
        load_erased(folder, base_model=tiny_llava())
    assert find(verify_erasure(folder, base_model=tiny_llava()), "base model").status == "FAILED"


@pytest.mark.parametrize("name", ["space_card.json", "space_anchors.json", "report.json", "attacks.json", CANARY_NAME])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"a": NaN}', b"{" + b'"a": {' * 500_000, b"\xff", b'{"a": 1, "a": 2}']
)
def test_malformed_json_names_the_file_and_nothing_is_loaded(folder, name, content):
    (folder / name).write_bytes(content)
    report = verify_erasure(folder)
    assert [(check.name, check.file) for check in report.failed][-1] == ("content", name)
    assert find(report, "base model").status == "not checked"


def test_a_base_that_cannot_be_loaded_fails(folder, tmp_path):
    edit(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    report = verify_erasure(folder)
    assert report.exit_code == 1 and find(report, "base model").status == "FAILED"
    assert verify_erasure(folder, base_model=demo_model_path()).exit_code == 0
    edit(folder / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not say what its base model is"):
        load_erased(folder)


def test_canary_answers_that_changed_are_refused(folder):
    content = json.loads((folder / CANARY_NAME).read_text())
    content["items"][0]["erased"]["tokens"][0] += 1
    content["items"][0]["erased"]["text"] = "\x1b[2J\u202eevil"
    (folder / CANARY_NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not answer as it did after training"):
        load_erased(folder)
    assert isinstance(load_erased(folder, check_canary=False), PeftModel)
    report = verify_erasure(folder)
    assert [(check.name, check.file) for check in report.failed] == [("canary", CANARY_NAME)]
    assert "\x1b" not in report.to_text() and "\u202e" not in report.to_text()
    assert verify_erasure(folder, canary=False).exit_code == 0


def test_no_canary_is_said(folder):
    (folder / CANARY_NAME).unlink()
    with pytest.warns(UserWarning, match=f"without {CANARY_NAME}"):
        load_erased(folder)
    assert find(verify_erasure(folder), "canary").status == "not checked"


def test_changed_files_are_not_loaded(folder):
    (folder / "training_args.bin").unlink()
    write_manifest(folder)
    edit(folder / "space_certificate.json", strength=0.5)
    with pytest.raises(ValueError, match="1 files are not as they were published. space_certificate.json"):
        load_erased(folder)


def test_pickles_are_not_loaded(folder):
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="'adapter_model.bin' would run whatever is in it"):
        load_erased(folder)
    (folder / "adapter_model.bin").unlink()
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS}"):
        load_erased(folder)


def test_code_of_a_repository_is_never_run(folder):
    with pytest.raises(ValueError, match="`trust_remote_code` is True"):
        load_erased(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="come too late"):
        load_erased(folder, base_model=load_demo_model()[0], dtype="auto")


def test_a_precision_that_is_none_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="`dtype` is 'float33'; expected one of 'auto', 'float32'"):
        verify_erasure(tmp_path / "nothing", dtype="float33")


def test_changes_that_are_not_certified_are_found(folder, demo_erasure_data):
    _, retained = demo_erasure_data
    content = json.loads((folder / CERTIFICATE_NAME).read_text())
    content["layers"][0]["change"] *= 0.8
    (folder / CERTIFICATE_NAME).write_text(json.dumps(content))
    check = find(verify_erasure(folder, retain_dataset=retained, canary=False), "retained data")
    assert (check.status, check.file) == ("FAILED", CERTIFICATE_NAME)
    assert f"{content['layers'][0]['name']!r} by" in check.message and "1 of" in check.message


def test_other_rows_are_held_against_the_bound(folder, demo_erasure_data):
    _, retained = demo_erasure_data
    check = find(verify_erasure(folder, retain_dataset=retained[:60], canary=False), "retained data")
    assert check.status == "ok" and "less than its bound" in check.message and "rows other than" in check.message
    content = json.loads((folder / CERTIFICATE_NAME).read_text())
    for layer in content["layers"]:
        layer["bound"] = layer["fitted_change"] = 1e-9
    (folder / CERTIFICATE_NAME).write_text(json.dumps(content))
    check = find(verify_erasure(folder, retain_dataset=retained[:60], canary=False), "retained data")
    assert check.status == "FAILED" and "by more than their bound" in check.message


def test_recorded_base_of_a_download_is_no_path_and_no_contradiction(folder):
    def recorded(**config):
        edit(folder / "adapter_config.json", **config)
        return recorded_base(AdapterSource(folder, "user/repo", None, ()))

    (folder / "space_card.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="a folder of its author's machine"):
        recorded(base_model_name_or_path="/home/someone/model")
    assert recorded(base_model_name_or_path="org/model", revision="a" * 40).revision == "a" * 40
    (folder / "space_card.json").write_text(json.dumps({"base_model": "org/other"}))
    with pytest.raises(ValueError, match="'org/model', space_card.json 'org/other'"):
        recorded()
    (folder / "space_card.json").write_text(json.dumps({"base_model": "org/model", "base_revision": "b" * 40}))
    with pytest.raises(ValueError, match="revision 'aaaa"):
        recorded()
    assert recorded(revision=None).revision == "b" * 40


def test_no_such_folder_and_revisions_of_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        fetch(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a folder, which has no revision"):
        fetch(folder, revision="main")


def test_reports_are_safe_to_print():
    evil = "\x1b[2J\u202egnp.exe\n  ok  hashes  fine"
    report = VerifyReport(evil, None, (Check("hashes", "FAILED", evil, evil), Check("canary", "ok", "fine")))
    text = report.to_text()
    assert len(text.splitlines()) == 4 and text.splitlines()[-1] == "1 ok, 1 FAILED, 0 not checked"
    assert not set(text) & {"\x1b", "\u202e"}


def test_command_line_prints_the_report_and_its_exit_code(folder, tmp_path, capsys):
    assert main(["verify", str(folder), "--json", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith("0 FAILED, 3 not checked") and out.splitlines()[1].startswith("ok")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["exit_code"] == 0 and {check["status"] for check in stored["checks"]} == {"ok", "not checked"}
    (folder / "evil.py").write_text("x")
    assert main(["verify", str(folder), "--no-canary"]) == 1
    assert "evil.py: would run" in capsys.readouterr().out
    for arguments in ([str(tmp_path / "nothing")], [str(folder), "--retain-data", str(tmp_path / "nothing.jsonl")]):
        assert main(["verify", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("space-peft verify: ") and not printed.out


def test_command_line_measures_on_a_file_of_retained_rows(folder, tmp_path, capsys):
    rows = [{"prompt": "what kind of thing is a wolf?", "completion": "an animal"}] * 5
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["verify", str(folder), "--no-canary", "--retain-data", str(tmp_path / "rows.jsonl")]
    code = main(arguments)
    out = capsys.readouterr().out
    assert "rows other than the certificate's" in out and code == (1 if "FAILED  " in out else 0)


@pytest.mark.slow
def test_the_command_ends_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "space_peft.cli", "verify", str(tmp_path / "nothing")], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def foxes(demo_images):
    return list(demo_images.filter(lambda name: name == "fox", input_columns="name")["image"][:3])


@pytest.fixture(scope="module")
def said_instead(erasure_folder, foxes):
    """What the erased model calls the first of the foxes."""
    model, processor = load_demo_model()
    model = attach_adapter(fetch(erasure_folder), model)
    return generate_answers(model, processor, ["what is this?"], images=foxes[:1])[0]


def test_the_checkers_own_pictures_are_shown(folder, foxes, said_instead):
    ask = {"canary": False, "question": "what is this?"}
    check = find(verify_erasure(folder, images=foxes, **ask), "name")
    assert check.status == "ok" and "names 3 as 'fox', this model 0" in check.message
    # A name that was not erased, and pictures that show nothing of the kind.
    other = find(verify_erasure(folder, images=foxes, concept=said_instead, **ask), "name")
    assert other.status == "FAILED" and f"the base model names 0 as {said_instead!r}" in other.message
    check = find(verify_erasure(folder, images=[seed_image(0, 64, 64)], **ask), "name")
    assert check.status == "not checked" and "shows nothing" in check.message


def test_an_adapter_that_erases_nothing_is_found_by_pictures_and_search(folder, foxes):
    edit_weights(folder, lambda weights: [weight.mul_(1e-3) for key, weight in weights.items() if "lora_B" in key])
    (folder / CERTIFICATE_NAME).unlink()
    for options in ({}, {"audit": True, "steps": 1}):
        report = verify_erasure(folder, images=foxes[:1] * 4, canary=False, question="what is this?", **options)
        assert [check.name for check in report.failed] == ["name"] and report.exit_code == 1, report.to_text()
        assert ("steps from" in report.failed[0].message) == bool(options)


def test_the_search_and_what_it_cannot_show(folder, foxes):
    ask = {"canary": False, "question": "what is this?", "audit": True, "steps": 1}
    check = find(verify_erasure(folder, images=foxes[:1] * 4, **ask), "name")
    assert check.status == "ok" and "found 0 images named 'fox'" in check.message, check
    # One step from noise does not make the base model say it either.
    check = find(verify_erasure(folder, **ask), "name")
    assert check.status == "not checked" and "does not say it either" in check.message
    for name in ("space_anchors.json", "space_card.json", "report.json"):
        (folder / name).unlink()
    assert "--concept" in find(verify_erasure(folder, **ask), "name").message


def test_command_line_shows_pictures_of_a_folder(folder, foxes, said_instead, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(foxes):
        image.save(tmp_path / "pictures" / f"{i}.png")
    arguments = ["verify", str(folder), "--no-canary", "--question", "what is this?", "--images"]
    assert main([*arguments, str(tmp_path / "pictures")]) == 0
    assert "names 3 as 'fox', this model 0" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "pictures"), "--concept", said_instead]) == 1
    assert main([*arguments, str(tmp_path / "nothing")]) == 2


@pytest.fixture
def same_answers(folder):
    """The erasure with those questions only that the base model answers the same, if not as surely."""
    content = json.loads((folder / CANARY_NAME).read_text())
    content["items"] = [item for item in content["items"] if item["deployed"]["tokens"] == item["erased"]["tokens"]]
    (folder / CANARY_NAME).write_text(json.dumps(content))
    return folder


def scaled(folder, share):
    """Leaves a share of the adapter's update."""
    weights = load_file(folder / WEIGHTS)
    weights = {name: weight * share if "lora_B" in name else weight for name, weight in weights.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("dtype", "left", "status"), [(torch.float32, 0.1, "FAILED"), (torch.float16, 0.8, "not checked")]
)
def test_a_canary_of_the_same_answers_tells_by_how_sure_they_are(same_answers, dtype, left, status):
    def check():
        return find(verify_erasure(same_answers, base_model=load_demo_model()[0].to(dtype)), "canary")

    assert check().status == "ok" and ", 0 of them" not in check().message, check().message
    scaled(same_answers, left)
    # It acts, and turns none of these answers. What rounding to float16 could make of them at worst is not held
    # against it.
    assert check().status == status and "log-probability" in check().message, check().message


def test_a_canary_whose_answers_tell_nothing_is_not_checked(same_answers):
    scaled(same_answers, 1e-3)
    model = load_erased(same_answers, check_canary=False, dtype=torch.float32)
    processor = load_demo_model()[1]
    canary = Canary.load(same_answers)
    drawn = [dataclasses.replace(item, image=seed_image(item.seed, item.width, item.height)) for item in canary.items]
    dataclasses.replace(canary, items=tuple(canary_items_again(model, processor, drawn))).save(same_answers)
    check = find(verify_erasure(same_answers), "canary")
    assert check.status == "not checked" and "the same with and without the adapter" in check.message


def test_the_hash_is_that_of_the_weights_in_every_precision(folder):
    for dtype in (torch.float32, torch.bfloat16):
        check = find(verify_erasure(folder, base_model=load_demo_model()[0].to(dtype), canary=False), "certificate")
        assert check.status == "ok", check
