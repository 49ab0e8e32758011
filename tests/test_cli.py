"""The command line."""

import json
import subprocess
import sys
import warnings

import pytest

from space_peft.cli import main


def test_unknown_concept_names_the_nearest_and_exits_with_2(capsys, tmp_path):
    assert main(["demo", "--concept", "foks", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "'foks'" in error and "fox" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("concept", ["", "   ", "x" * 10_000])
def test_bad_names_exit_with_2(capsys, tmp_path, concept):
    assert main(["demo", "--concept", concept, "--output", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err) < 500


def test_help_is_quick_and_complete():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "space_peft.cli", "demo", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--concept" in done.stdout and "--seed" in done.stdout
    assert " torch\n" not in done.stderr


def test_the_demo_replaces_no_erasure_of_the_users_own(tmp_path, capsys):
    (tmp_path / "report.json").write_text("{}")  # As of `erase` and `evaluate`.
    (tmp_path / "adapter_model.safetensors").write_bytes(b"hours of work")
    assert main(["demo", "--concept", "fox", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"space-peft demo: {tmp_path} holds files of something else; choose another folder, or empty it."
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"hours of work"


@pytest.mark.slow
def test_demo_writes_everything(tmp_path):
    output = tmp_path / "demo"
    assert main(["demo", "--concept", "fox", "--output", str(output), "--seed", "0"]) == 0
    report = json.loads((output / "report.json").read_text())
    assert list(report)[:6] == ["concept", "seed", "settings", "versions", "before", "after"] and "seconds" in report
    keys = {"forget", "generality", "retain", "retain_unseen_style", "siblings", "text", "text_target", "fluency"}
    assert keys <= set(report["before"]) and keys <= set(report["after"])
    assert report["before"]["forget"]["value"] > 0.7 and report["after"]["forget"]["value"] <= 0.2
    assert report["after"]["retain"]["value"] > 0.95 and report["after"]["text"]["value"] > 0.97
    names = {path.name for path in output.iterdir()}
    assert {
        "adapter_model.safetensors", "adapter_config.json", "space_config.json", "space_certificate.json",
        "space_anchors.json", "report.json", "README.md", "pictures",
    } <= names  # fmt: skip
    assert len(list((output / "pictures").glob("*.png"))) == 5 and "anchors" not in names
    assert report["seconds"].keys() == {
        "evaluate_before",
        "prepare",
        "anchors",
        "erase",
        "certificate",
        "evaluate_after",
    }
    assert [path for path in tmp_path.iterdir()] == [output]
    # A second run replaces the first; a folder of something else is left alone.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    assert main(["demo", "--concept", "fox", "--output", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_what_is_said_to_developers_of_other_libraries_is_not_shown(capsys):
    from space_peft.cli.options import without_developers_warnings

    def warn(module, category):
        warnings.warn_explicit("use another", category, "file.py", 1, module=module)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with without_developers_warnings():
            warn("transformers.modeling_utils", FutureWarning)
            warn("torch", DeprecationWarning)
            for module, category in (
                ("space_peft.config", FutureWarning),
                ("transformers", UserWarning),
                ("torchure", FutureWarning),
            ):
                warn(module, category)
        warn("torch", FutureWarning)
    assert [warning.category for warning in shown] == [FutureWarning, UserWarning, FutureWarning, FutureWarning]
