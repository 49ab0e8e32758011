"""A mistyped folder is an error at once; modules of the user's own are imported first."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from space_peft.cli import main
from space_peft.cli.commands import build_parser
from space_peft.cli.erase_options import given_options
from space_peft.cli.places import LOADING, PLACES, check_places, import_modules, model_place, take_config
from space_peft.records.places import check_place, is_path, refuse_missing


COMMANDS = next(action for action in build_parser()._actions if action.dest == "command").choices


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("outputs/demo", False), ("gpt2", False), ("llava-hf/llava-1.5-7b-hf", False), ("a/b/c", True), ("./a", True),
        ("../a/b", True), ("/a/b", True), ("~/a", True), ("a/", True), ("rows.parquet", True), ("org/rows.JSONL", True),
        ("not an id!", True), ("", True), (Path("a"), True), ("C:\\models\\x", True),
    ],
)  # fmt: skip
def test_what_can_only_be_a_path(place, path):
    assert is_path(place) is path


def test_a_missing_path_is_refused_with_the_nearest_there_is(tmp_path, monkeypatch):
    (tmp_path / "outputs" / "without-fox").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refuse_missing("outputs/without-fox/")
    refuse_missing("outputs/elsewhere")  # May be a repository.
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder './output/without-foxx'. Did you mean 'outputs/without-fox'"
    ):
        refuse_missing("./output/without-foxx")
    with pytest.raises(FileNotFoundError) as found:
        refuse_missing("/nowhere/at/all")
    assert "Did you mean" not in str(found.value)
    # What looks like an id, and is in no cache, may not be asked for in these tests.
    with pytest.raises(
        FileNotFoundError, match=r"'outputs/without-foks' here, and no model .* not asked .* 'outputs/without-fox'"
    ):
        check_place("outputs/without-foks")
    with pytest.raises(FileNotFoundError, match="no dataset of that id"):
        check_place("org/rows:train", "dataset")
    with pytest.raises(FileNotFoundError, match="there is no file or folder 'org/x'"):
        check_place("org/x", "folder")


def test_from_python_a_missing_path_is_refused_as_well():
    from space_peft import erase, load_statistics
    from space_peft.data.loading import load_rows
    from space_peft.hub_cards import load_erased
    from space_peft.modeling.loading import load_model

    options = {"anchors": [], "retain_dataset": []}
    for load in (load_model, load_rows, load_statistics, load_erased, lambda place: erase(place, "fox", **options)):
        with pytest.raises(FileNotFoundError, match="there is no file or folder './not/there'"):
            load("./not/there")


@pytest.mark.parametrize(("command", "option"), [(name, option) for name in PLACES for option in PLACES[name]])
def test_every_place_is_looked_for(command, option):
    with pytest.raises(FileNotFoundError, match=rf"^{option}: there is no .* './not/there'"):
        check_places(command, {option: "./not/there"})
    check_places(command, {option: None})


@pytest.mark.parametrize("command", ["plan", "bench", "erase", "anchors", "stats"])
def test_the_embedded_model_has_a_name(command):
    check_places(command, {"model": "demo"})
    assert Path(model_place("demo"), "config.json").is_file() and model_place("org/demo") == "org/demo"


@pytest.mark.parametrize(
    ("command", "option"),
    [("plan", "model"), ("erase", "model"), ("stats", "model"), ("bench", "reference"), ("verify", "base_model")],
)
def test_its_mistyped_name_is_known(command, option):
    with pytest.raises(FileNotFoundError, match=r"'dmeo' here, and no model .* Did you mean 'demo'\?$"):
        check_places(command, {option: "dmeo"})
    with pytest.raises(FileNotFoundError) as found:
        check_places("verify", {"adapter": "dmeo"})  # It takes no such word.
    assert "Did you mean" not in str(found.value)


def test_the_table_of_places_is_that_of_the_parser():
    from space_peft.arguments import EraseArguments

    options = {name: {action.dest for action in parser._actions} for name, parser in COMMANDS.items()}
    options["erase"] = options["anchors"] = {field.name for field in fields(EraseArguments)}
    for command, places in PLACES.items():
        assert set(places) <= options[command], command
    assert {*PLACES, "demo"} == set(COMMANDS), "which options of a new command are places?"
    assert all("modules" in options[command] for command in LOADING)


def test_commands_end_with_2_and_have_not_imported_torch(tmp_path):
    code = (
        "import sys; from space_peft.cli import main\n"
        "for argv in (['verify', './a'], ['merge', './b', 'out'], ['card', 'c'], ['push', 'd', 'user/repo'],\n"
        "             ['erase', '--model', './e', '--concept', 'fox', '--pool', 'p', '--retain', 'r'], ['stats', './f', '--data', 'g', '--output', 'h']):\n"
        "    assert main(argv) == 2, argv\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        f"space-peft {command}" for command in ("verify", "merge", "card", "push", "erase", "stats")
    ]


def test_places_of_erase_are_read_from_file_and_flags(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model: ./a\nconcept: fox\npool: ./b\ntest_images: ./c\n")
    config, flags = take_config(["--pool=./d", "--config", str(path), "--test-images", "./e", "--max_steps", "3"])
    places = given_options("erase", [*flags, "--retain", "./f"], config)
    assert {key: places[key] for key in ("model", "pool", "test_images")} == {
        "model": "./a",
        "pool": "./d",
        "test_images": "./e",
    }
    assert main(["erase", "--config", str(path), "--retain", "./f"]) == 2
    assert "space-peft erase: model: there is no file or folder './a'" in capsys.readouterr().err
    assert main(["erase", "--config", str(tmp_path / "rum.yaml")]) == 2
    assert f"Did you mean '{path}'" in capsys.readouterr().err


def test_modules_of_the_user_are_imported_from_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_registered_model.py").write_text("NAME = 'registered'\n")
    import_modules(["my_registered_model"])
    assert sys.modules.pop("my_registered_model").NAME == "registered"
    (tmp_path / "run.yaml").write_text("import: no_such_module_of_mine\nmodel: .\nconcept: fox\npool: .\nretain: .\n")
    for arguments in (["plan", ".", "--import", "no_such_module_of_mine"], ["erase", "--config", "run.yaml"]):
        assert main(arguments) == 2
        assert "--import no_such_module_of_mine: No module named" in capsys.readouterr().err
