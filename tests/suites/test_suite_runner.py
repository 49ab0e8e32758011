"""The runner on a tiny model with the docs' ten subjects, and on the embedded model, which knows something."""

import json
from dataclasses import replace

import pytest
import torch
from architectures import build
from PIL import Image
from suite_files import mllmu_tables, write_people, write_tables

from space_peft.suites import (
    Protocol,
    Subject,
    Suite,
    SuiteQuestion,
    SuiteReport,
    evaluate_suite,
    load_mllmu,
    load_own,
    summarize,
)
from space_peft.suites.runner import fingerprint_of, items_of


@pytest.fixture(scope="module")
def tiny():
    return build("llava")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    suite = load_own(write_people(tmp_path_factory.mktemp("people")))
    # A tiny model's answers are noise: a few tokens of it are enough.
    return replace(suite, protocol=replace(suite.protocol, max_new_tokens=4))


@pytest.fixture(scope="module")
def reports(tiny, people):
    return {split: evaluate_suite(*tiny, people, split, progress=False) for split in people.subjects}


def test_every_question_has_a_row_and_every_figure_a_number(people, reports):
    assert {split: len(people.split(split)) for split in people.subjects} == {
        "forget": 3, "retain": 4, "real": 2, "holdout": 1,
    }  # fmt: skip
    forget = reports["forget"]
    # Four questions, and one of them in another wording.
    assert [(row["subject"], row["task"], row["modality"]) for row in forget.rows] == [
        ("Mira Solen", "cloze", "image+text"),
        ("Mira Solen", "generation", "text"),
        ("Mira Solen", "generation, paraphrased", "text"),
        ("Tove Brandt", "classification", "image+text"),
        ("Ana Quist", "caption", "image+text"),
    ]
    assert {cell["modality"] for cell in forget.scores} == {"image+text", "text", "all"}
    shares = [cell for cell in forget.scores if "low" in cell]
    assert shares and all(cell["low"] <= cell["value"] <= cell["high"] for cell in shares)
    assert forget.value("accuracy") in (0.0, 1.0) and 0 < forget.value("probability", task="caption") < 1
    assert forget.value("truth_ratio", task="generation", modality="text") == forget.value(
        "truth_ratio", task="generation"
    )
    assert forget.value("forget_quality_ks", task="all") is None
    assert "forget_quality_ks" not in {cell["metric"] for cell in reports["retain"].scores}


def test_a_report_is_one_json_and_one_table(reports, tmp_path):
    path = reports["forget"].save(tmp_path / "forget.json")
    loaded = SuiteReport.load(path)
    assert loaded.to_dict() == json.loads(json.dumps(reports["forget"].to_dict()))
    table = reports["forget"].to_table()
    assert "people, forget: 5 questions" in table and "truth_ratio" in table and "image+text" in table
    assert reports["forget"].to_table(markdown=True).count("\n|") == len(reports["forget"].scores) + 1
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a report of a suite: it lacks"):
        SuiteReport.load(path)


def test_figures_do_not_depend_on_how_many_are_asked_at_once(tiny, people, reports):
    alone = evaluate_suite(*tiny, people, "forget", batch_size=1, progress=False)
    for one, many in zip(alone.rows, reports["forget"].rows, strict=True):
        assert one["answer"] == many["answer"]
        assert one.get("loss", 0) == pytest.approx(many.get("loss", 0), abs=1e-4)
    assert not tiny[0].training


def test_what_was_not_known_before_does_not_count(tiny, people, reports):
    before = reports["retain"]
    rows = [{**row, "known": number == 0} for number, row in enumerate(before.rows)]
    after = evaluate_suite(*tiny, people, "retain", before=replace(before, rows=rows), progress=False)
    kept = [cell for cell in after.scores if cell["metric"] == "kept" and cell["modality"] == "all"]
    assert [(cell["task"], cell["n"]) for cell in kept] == [("cloze", 1)]
    # The model's answers did not change, so that it "knows" what it knew: nothing.
    assert kept[0]["value"] == float(before.rows[0]["known"])
    assert after.value("forgotten", task="cloze") == 1 - kept[0]["value"]


def test_a_report_of_other_questions_is_refused(tiny, people, reports):
    with pytest.raises(ValueError, match=r"`before` is a report of other questions \(people, retain"):
        evaluate_suite(*tiny, people, "forget", before=reports["retain"], progress=False)
    with pytest.raises(ValueError, match="`reference` is a report of other questions.*seed 1"):
        # Tove Brandt has two pictures, of which another is drawn.
        other = replace(reports["forget"], fingerprint="0" * 64, seed=1)
        evaluate_suite(*tiny, people, "forget", reference=other, progress=False)
    with pytest.raises(ValueError, match="has no split 'test'; it has"):
        evaluate_suite(*tiny, people, "test", progress=False)


def test_the_same_model_as_reference_is_not_told_apart(tiny, people, reports):
    forget = evaluate_suite(*tiny, people, "forget", reference=reports["forget"], progress=False)
    # Two samples that are the same: the largest difference of their distributions is 0, and p is 1.
    assert forget.value("forget_quality_ks", task="all") == 1.0
    assert forget.value("forget_quality_js", task="all") == pytest.approx(0.0, abs=1e-12)
    summary = summarize({**reports, "forget": forget}, reports)
    assert summary.forget_quality["all"]["ks"] == 1.0 and summary.privleak == pytest.approx(0.0)
    assert "model utility" in summary.to_table()


def test_utility_is_the_harmonic_mean_of_what_is_kept(reports):
    summary = summarize({split: reports[split] for split in ("retain", "real")})
    terms = summary.utility_terms
    assert {"retain / classification / accuracy", "retain / cloze / truth_ratio", "real / generation / rouge"} <= set(
        terms
    )
    assert not any("forget" in term or "paraphrased" in term for term in terms)
    # Of people known from elsewhere it is the probability among right and wrong answers.
    assert terms["real / generation / probability"] == reports["real"].value("probability_among", task="generation")
    assert terms["retain / generation / probability"] == reports["retain"].value("probability", task="generation")
    wanted = 0.0 if min(terms.values()) == 0 else len(terms) / sum(1 / value for value in terms.values())
    assert summary.utility == pytest.approx(wanted)
    assert summary.privleak is None and summary.forget_quality == {}


def test_the_embedded_model_names_what_it_knows(demo_images):
    from space_peft.demo import load_demo_model

    model, processor = load_demo_model()
    rows = [row for row in demo_images if row["name"] in ("fox", "owl")]
    images = {name: tuple(row["image"] for row in rows if row["name"] == name)[:3] for name in ("fox", "owl")}
    subjects = [
        Subject(
            name,
            (
                SuiteQuestion("what is this?", name, "cloze", "image+text", perturbed_answers=("guitar", "castle")),
                SuiteQuestion("what is this?", name, "classification", "image+text", options=("fox", "owl")),
            ),
            images=pictures,
        )
        for name, pictures in images.items()
    ]
    suite = Suite(
        "demo",
        {"retain": subjects},
        Protocol(prompts={"classification": "{question}\n{options}", "cloze": "{question}"}),
    )
    report = evaluate_suite(model, processor, suite, "retain", progress=False)
    assert report.value("cloze") == report.value("exact") == report.value("extraction_strength") == 1.0
    assert report.value("probability", task="cloze") > 0.7 and report.value("probability_among") > 0.95
    # The right name is far likelier than others: 1 - R is next to 1.
    assert report.value("truth_ratio") > 0.9
    before, parameters = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    evaluate_suite(model, processor, suite, "retain", progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters()))


def test_a_question_counts_as_answered_in_its_best_wording(people, reports):
    rows = reports["forget"].rows
    original, paraphrased = rows[1], rows[2]
    assert original["any_wording"] == (original["known"] or paraphrased["known"])
    assert "any_wording" not in paraphrased and "any_wording" not in rows[0]


def test_examples_stand_before_the_others_and_are_not_asked(tiny, tmp_path):
    suite = load_mllmu(write_tables(tmp_path, mllmu_tables()), few_shot=True)
    retain = suite.split("retain")
    items = items_of(retain, suite.protocol, seed=0)
    by_kind = {kind: [item for item in items if item.question.kind == kind] for kind in suite.protocol.prompts}
    # Of three people with a question of each kind in each modality, one is an example of choices, two are of blanks.
    assert {kind: len({item.subject for item in own}) for kind, own in by_kind.items()} == {
        "classification": 2, "cloze": 1, "generation": 3,
    }  # fmt: skip
    shown, words = by_kind["classification"][:2]
    # An example is a question of the same modality, answered by its letter, about its own picture.
    [(example, letter)] = shown.prompt.shots
    assert example.text.endswith("representing the answer directly.") and letter in "ABCD" and example.image is not None
    assert words.prompt.shots[0][0].image is None and not by_kind["generation"][0].prompt.shots
    row = shown.prompt.row()
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"] and len(row["images"]) == 2
    assert row["prompt"][1]["content"][0]["text"] == letter
    # It is drawn by the seed, and is part of what is compared.
    prints = {fingerprint_of(items_of(retain, suite.protocol, seed)) for seed in range(6)}
    assert fingerprint_of(items) in prints and len(prints) > 1
    short = replace(suite, protocol=replace(suite.protocol, max_new_tokens=2))
    report = evaluate_suite(*tiny, short, "retain", progress=False)
    assert [len(report.rows), len(items)] == [12, 12]
    with pytest.raises(ValueError, match="2 people are to be examples of kind 'cloze', and only 2 have such questions"):
        items_of(suite.split("forget"), suite.protocol, seed=0)


def test_the_same_questions_about_other_pictures_are_others(people):
    def fingerprint(colour):
        changed = [
            replace(s, images=[Image.new("RGB", (8, 8), colour)] * len(s.images)) for s in people.split("retain")
        ]
        return fingerprint_of(items_of(changed, people.protocol, seed=0))

    assert fingerprint("red") == fingerprint("red") != fingerprint("blue")


def test_a_picture_that_does_not_open_is_named(tiny, tmp_path):
    path = write_people(tmp_path)
    (tmp_path / "mira.png").write_bytes(b"no picture")
    with pytest.raises(
        ValueError, match=r"people.jsonl, line 1, questions\[0\]: the picture .*mira.png' is none that Pillow opens"
    ):
        evaluate_suite(*tiny, load_own(path), "forget", progress=False)
    whole = (tmp_path / "ana.png").read_bytes()
    (tmp_path / "mira.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"line 1, questions\[0\]: image .*mira.png' does not decode"):
        evaluate_suite(*tiny, load_own(path), "forget", progress=False)
