"""`space-peft card` and `space-peft push`: exit codes and what is said, without a traceback."""

import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from space_peft.cli import main


REPO = "user/demo-erasure"
BASE = "space-peft/demo-llava"


@pytest.fixture
def folder(erasure_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(erasure_folder, copy)
    return copy


def test_push_with_every_flag(hub, folder, capsys):
    flags = ["--private", "--revision", "v2", "--commit-message", "Forget", "--include-answers", "--retries", "0"]
    assert main(["push", str(folder), REPO, "--base-model", BASE, "--token", hub.token, *flags]) == 0
    out, err = capsys.readouterr()
    assert out.strip().endswith(hub.head(REPO, "v2"))
    assert "[1/2] prepared what is published, " in err and f"[2/2] uploaded to {REPO}, " in err
    assert hub.repository(REPO).private and "answers_after.jsonl" in hub.files(REPO, "v2")
    assert hub.repository(REPO).resolve("v2").title == "Forget"
    assert main(["push", str(folder), REPO, "--base-model", BASE, "--create-pr", "--redact"]) == 0
    assert capsys.readouterr().out.strip().endswith("/discussions/1")
    assert b"fox" not in hub.files(REPO, "refs/pr/1")["README.md"].lower()


@pytest.mark.slow
def test_push_in_a_process_of_its_own(hub, folder, tmp_path):
    command = [sys.executable, "-m", "space_peft.cli", "push", str(folder), REPO, "--base-model", BASE]
    done = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.head(REPO) in done.stdout and "adapter_model.safetensors" in hub.files(REPO)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--base-model", "/models/x"], ["--base-model", BASE, "--revision", "the-fox", "--redact"]],
    ids=str,
)
def test_bad_input_exits_with_2(hub, folder, capsys, arguments):
    assert main(["push", str(folder), REPO, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("space-peft push: ") and "Traceback" not in error and not hub.exists(REPO)


def test_a_missing_folder_and_a_bad_repository_name_exit_with_2(hub, folder, tmp_path, capsys):
    assert main(["push", str(tmp_path / "nothing"), REPO]) == 2
    assert f"there is no file or folder '{tmp_path / 'nothing'}'" in capsys.readouterr().err
    assert main(["push", str(folder), "a/b/c", "--base-model", BASE]) == 2
    assert "a/b/c" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said", [({"status": 403}, "write permission"), ({"status": 500}, "500"), ({"cut_request_after": 1}, "")]
)
def test_a_failed_push_exits_with_1(hub, folder, capsys, options, said):
    hub.faults.add("commit", times=None, **options)
    assert main(["push", str(folder), REPO, "--base-model", BASE, "--retries", "0"]) == 1
    error = capsys.readouterr().err  # After the progress bar of the upload.
    assert "[2/2]" not in error, "nothing was uploaded"
    assert "\nspace-peft push: " in error and said in error and "Traceback" not in error and hub.files(REPO) == {}


def test_card(hub, folder, capsys):
    assert main(["card", str(folder)]) == 0 and "a local model" in (folder / "README.md").read_text()
    assert main(["card", str(folder), "--base-model", str(folder)]) == 2
    assert "base_model" in capsys.readouterr().err
    arguments = ["card", str(folder), "--base-model", BASE, "--license", "mit", "--repo-id", REPO]
    assert main(arguments) == 0
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.base_model == BASE and REPO in card.text
    assert main(arguments) == 0  # Its own card is written anew.
    (folder / "README.md").write_text("# Mine\n")
    assert main(arguments) == 2 and (folder / "README.md").read_text() == "# Mine\n"
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0 and (folder / "README.md").read_text() != "# Mine\n"
