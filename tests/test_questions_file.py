"""A user's own questions, from a YAML file."""

import pytest

from space_peft.cli import main
from space_peft.cli.erase import parse_run, read_questions
from space_peft.data.questions import DEFAULT_QUESTIONS, Dialogue, load_questions


FILE = """
naming: ["Was ist das?", "Was zeigt das Bild?"]
naming_held_out: ["Wie heißt das?"]
confirm: ["Ist das {name}?"]
confirm_held_out: []
yes: Ja
no: Nein
open:
  - Beschreibe das Bild.
  - ["Hier ist ein Bild.", "Danke.", "Was zeigt es?"]
  - turns: ["Was ist zu sehen?"]
    system: Du antwortest kurz.
"""


def test_groups_and_dialogues_are_read_and_the_rest_is_the_librarys(tmp_path):
    path = tmp_path / "fragen.yaml"
    path.write_text(FILE, encoding="utf-8")
    questions = load_questions(path)
    assert questions.naming == ("Was ist das?", "Was zeigt das Bild?") and questions.naming_held_out == (
        "Wie heißt das?",
    )
    assert (questions.yes, questions.no, questions.confirm_held_out) == ("Ja", "Nein", ())
    assert questions.open[1:] == (
        Dialogue(("Hier ist ein Bild.", "Danke.", "Was zeigt es?")),
        Dialogue(("Was ist zu sehen?",), system="Du antwortest kurz."),
    )
    assert questions.open_held_out == DEFAULT_QUESTIONS.open_held_out and questions.kind == DEFAULT_QUESTIONS.kind


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nameing: [What]", "they set 'nameing'; expected some of naming, naming_held_out"),
        ("- What", "holds a list; expected names with values, such as `naming: "),
        ("naming: What", "must be a tuple of questions, got the single one 'What'"),
        ("naming: []", "`naming` is empty"),
        ("yes: Yes", "they set 'yes' to True; expected a text in quotes"),
        ("confirm: [Is it]", "needs a {name} field"),
        ("open: [{turns: [a, b]}]", "must be an odd number"),
        ("open: [{sytem: a, turns: [a]}]", "sytem"),
        ("naming: [3]", "must hold texts"),
    ],
)
def test_what_cannot_be_used_is_said_with_the_file(text, said, tmp_path):
    path = tmp_path / "questions.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as found:
        load_questions(path)
    assert said in str(found.value) and str(path) in str(found.value)


def test_the_command_takes_the_file(tmp_path, capsys):
    path = tmp_path / "fragen.yaml"
    path.write_text(FILE, encoding="utf-8")
    options = ["--model", ".", "--concept", "fox", "--output_dir", str(tmp_path)]
    assert read_questions(parse_run([*options, "--questions", str(path)])[0].job).yes == "Ja"
    assert read_questions(parse_run(options)[0].job) == DEFAULT_QUESTIONS
    options += ["--pool", str(tmp_path), "--retain", str(tmp_path)]
    assert main(["erase", *options, "--questions", str(tmp_path / "frage.yaml")]) == 2
    assert (
        f"questions: there is no file or folder '{tmp_path}/frage.yaml'. Did you mean '{path}'"
        in capsys.readouterr().err
    )
