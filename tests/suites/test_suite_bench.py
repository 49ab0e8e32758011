"""`space-peft bench` on the embedded model: a concept is unlearned as a person would be."""

import json
import re
from dataclasses import replace

import pytest
from PIL import Image
from suite_files import mllmu_tables, write_people, write_tables

from space_peft.cli import bench as suite_bench
from space_peft.cli import main
from space_peft.cli.bench import BenchSettings, run_bench, training_rows
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.suites import PEOPLE_QUESTIONS, Protocol, Subject, Suite, SuiteQuestion, load_own


KEPT = ("owl", "guitar", "castle", "tractor")
SETTINGS = BenchSettings(
    steps=2,
    refine_steps=1,
    anchors=3,
    batch_size=4,
    questions=DEMO_QUESTIONS,
    progress=False,
    # What is trained is tested elsewhere.
    training={"canary_items": 0, "certificate_share": 0.0, "refresh_steps": None, "answer_tokens": 4},
)


@pytest.fixture(scope="module")
def things(demo_images):
    rows = [row for row in demo_images if row["name"] in ("fox", *KEPT)]

    def subject(name):
        wrong = tuple(other for other in KEPT[:3] if other != name)
        question = SuiteQuestion("what is this?", name, "cloze", "image+text", perturbed_answers=wrong)
        return Subject(name, (question,), images=[row["image"] for row in rows if row["name"] == name][:2])

    protocol = Protocol(prompts={}, max_new_tokens=4)
    return Suite("things", {"forget": [subject("fox")], "retain": [subject(name) for name in KEPT]}, protocol)


def test_what_methods_train_on(tmp_path, things):
    people = load_own(write_people(tmp_path))
    rows = training_rows(people.split("forget"), people, DEMO_QUESTIONS, words=False)
    # Mira's question with a picture, not that in words; Tove has a choice only, and is asked for by name, about each picture.
    assert [(row["prompt"].split("\n")[0], row["completion"], len(row["images"])) for row in rows] == [
        ("The name of the person is __", "Mira Solen", 1),
        (DEMO_QUESTIONS.naming[0], "Tove Brandt", 1),
        (DEMO_QUESTIONS.naming[0], "Tove Brandt", 1),
        ("Describe the picture.", "Ana Quist reads a book at a window.", 1),
    ]
    words = training_rows(people.split("retain"), people, DEMO_QUESTIONS, words=True)
    assert {"prompt": "Where does Pia Lund live?", "completion": "She lives in Bergen."} in words
    # A question about no picture in particular is one about each.
    assert len(training_rows(things.split("forget"), things, DEMO_QUESTIONS, words=True)) == 2


def test_a_method_is_compared_with_the_original_and_a_retain_only_model(tmp_path, things, capsys):
    output = tmp_path / "bench"
    # No model without the fox is at hand: the original takes its place, and is not told from itself.
    content = run_bench(
        load_demo_model,
        things,
        ["npo"],
        output,
        settings=replace(SETTINGS, progress=True),
        load_reference=load_demo_model,
        about={"model": "demo"},
    )
    assert list(content["models"]) == ["original", "retain-only", "npo"]
    # A line for each part, and nothing of a trainer's.
    out, err = capsys.readouterr()
    lines = [re.sub(r"(, \w+ \d\.\d\d)*, [\d.]+ s$", "", line) for line in err.splitlines()]
    assert not out and [line for line in lines if line.startswith("[")] == [
        "[1/8] loaded the model: retain-only", "[2/8] asked the suite's questions: retain-only",
        "[3/8] loaded the model: original", "[4/8] asked the suite's questions: original",
        "[5/8] loaded the model: original, for npo", "[6/8] unlearned: npo", "[7/8] asked the suite's questions: npo",
        f"[8/8] saved to {output}",
    ]  # fmt: skip
    original, npo = content["models"]["original"], content["models"]["npo"]
    assert original["forget_quality"] == 1.0 and 0 < original["utility"] <= 1 and original["forgotten"] is None
    assert npo["forgotten"] in (0.0, 1.0) and 0 <= npo["kept"] <= 1 and npo["seconds"] > 0

    # Two steps against the name change how likely it is.
    def loss(name):
        report = json.loads((output / f"{name}.json").read_text())["splits"]["forget"]
        return report["rows"][0]["loss"]

    assert loss("npo") > loss("original") + 0.1
    assert json.loads((output / "bench.json").read_text()) == json.loads(json.dumps(content))
    assert "| npo |" in (output / "bench.md").read_text() and Image.open(output / "bench.png").size[0] > 400
    with pytest.raises(FileExistsError, match="is not empty"):
        run_bench(load_demo_model, things, ["npo"], output, settings=SETTINGS)


@pytest.mark.slow
def test_space_needs_no_picture_of_the_forgotten(tmp_path, things, demo_images):
    pool = demo_images.filter(lambda name: name not in ("fox", *KEPT), input_columns="name").select(range(0, 300, 20))
    content = run_bench(load_demo_model, things, ["space"], tmp_path / "bench", settings=SETTINGS, pool=pool)
    assert content["models"]["space"]["forget_quality"] is None
    assert content["models"]["space"]["utility"] > 0


def test_what_cannot_run_is_refused_before_anything_runs(tmp_path, things):
    def run(*methods, suite=things, **options):
        run_bench(load_demo_model, suite, methods, tmp_path / "bench", settings=SETTINGS, **options)

    with pytest.raises(ValueError, match="a method must be one of .*'npo'.*, got 'sgd'"):
        run("npo", "sgd")
    with pytest.raises(ValueError, match="one or more different methods"):
        run("npo", "npo")
    with pytest.raises(ValueError, match="SPACE needs a `pool`"):
        run("space")
    with pytest.raises(ValueError, match="has no split 'retain'"):
        run("npo", suite=Suite("x", {"forget": things.split("forget")}))
    assert not (tmp_path / "bench").exists()


def test_the_command_hands_on_what_it_is_told(capsys, tmp_path, monkeypatch):
    seen = {}

    def run(load_model, suite, methods, output, **options):
        seen.update(options, suite=suite, methods=methods, output=output)
        return {"models": {"npo": dict.fromkeys(("utility", *suite_bench.COLUMNS), 0.5)}}

    monkeypatch.setattr(suite_bench, "run_bench", run)
    source = str(write_tables(tmp_path / "mllmu", mllmu_tables()))
    arguments = ["bench", "--suite", "mllmu", "--source", source, "--split", "forget_5", "--model", "demo"]
    options = [
        "--methods",
        "npo",
        "ga",
        "--steps",
        "7",
        "--seed",
        "3",
        "--limit",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, *options]) == 0
    assert "| npo | 0.5 |" in capsys.readouterr().out
    assert [len(subjects) for subjects in seen["suite"].subjects.values()] == [1, 1, 1, 1]
    assert (seen["settings"].steps, seen["settings"].seed, seen["methods"]) == (7, 3, ["npo", "ga"])
    assert seen["load_reference"] is None and seen["pool"] is None and seen["about"]["limit"] == 1
    # Methods train on the benchmark's own pairs, put as they are.
    rows = training_rows(seen["suite"].split("forget"), seen["suite"], DEMO_QUESTIONS, words=False)
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        ("Who is it?", "It is Person 0."),
        ("Age?", "Forty."),
    ]
    assert main([*arguments, *options[:-4], "--limit", "0"]) == 2 and "at least 1, got 0" in capsys.readouterr().err


def test_the_command_asks_the_packages_own_people_in_their_words(tmp_path, monkeypatch):
    seen = {}

    def run(load_model, suite, methods, output, **options):
        seen.update(options, suite=suite)
        return {"models": {"npo": dict.fromkeys(("utility", *suite_bench.COLUMNS), 0.5)}}

    monkeypatch.setattr(suite_bench, "run_bench", run)
    arguments = ["bench", "--suite", "people", "--split", "forget_5", "--model", "demo", "--methods", "npo"]
    assert main([*arguments, "--limit", "1", "--output", str(tmp_path / "out")]) == 0
    assert seen["settings"].questions is PEOPLE_QUESTIONS
    [somebody] = seen["suite"].split("forget")
    rows = training_rows([somebody], seen["suite"], PEOPLE_QUESTIONS, words=False)
    # Four pairs about each of eight pictures, and nothing in words.
    assert len(rows) == 32 and all(len(row["images"]) == 1 for row in rows)
    assert {row["completion"] for row in rows if row["prompt"] == "Who is this?"} == {f"This is {somebody.name}."}


def test_the_command_says_what_is_wrong(capsys, tmp_path):
    path = write_people(tmp_path)
    path.write_text(path.read_text().replace('"split": "real"', '"split": "known"'))
    arguments = ["bench", "--suite", "own", "--source", str(path), "--model", "demo", "--methods", "npo"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "people.jsonl, line 8: `split` must be one of" in capsys.readouterr().err
    assert main([*arguments, "--split", "forget_5"]) == 2
    assert "the suite 'own' takes no `split`; it takes ['revision', 'protocol']" in capsys.readouterr().err
    assert main([*arguments[:2], "mllmoo", *arguments[3:]]) == 2
    assert "the suite's name cannot be 'mllmoo'; did you mean 'mllmu'?" in capsys.readouterr().err
