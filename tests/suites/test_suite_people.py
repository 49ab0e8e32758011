"""The package's own suite: who is where, which pictures they have, what is asked, and that its schema is MLLMU-Bench's."""

import io
from dataclasses import replace

import numpy as np
import pytest
from architectures import build
from PIL import Image

from space_peft.suites import evaluate_suite, load_mllmu, load_people, load_suite, people_tables, summarize
from space_peft.suites.answers import Prompt
from space_peft.suites.people import read_people
from space_peft.suites.scoring import PARAPHRASED


@pytest.fixture(scope="module")
def suite():
    return load_suite("people", split="forget_5", training=True)


def ids(suite, split):
    return {subject.id for subject in suite.split(split)}


def shown(subject):
    return [np.asarray(Prompt("", image).opened().convert("RGB")).tobytes() for image in subject.images]


def test_who_is_where(suite):
    assert {split: len(found) for split, found in suite.subjects.items()} == {
        **{"forget": 6, "test": 6, "retain": 114, "real": 20, "holdout": 20}
    }
    assert suite.name == "people" and "forget_5" in suite.source and suite.notes
    assert ids(suite, "forget") == ids(suite, "test")
    groups = {person["id"]: person["group"] for person in read_people()}
    for split, group in (("forget", "private"), ("retain", "private"), ("real", "public"), ("holdout", "stranger")):
        assert {groups[id] for id in ids(suite, split)} == {group}


def test_larger_requests_hold_smaller_ones(suite):
    forgotten = [ids(suite, "forget")]
    for split, size in (("forget_10", 12), ("forget_15", 18)):
        other = load_people(split, splits=("forget", "retain"))
        forgotten.append(ids(other, "forget"))
        assert len(forgotten[-1]) == size and len(other.split("retain")) == 120 - size
        assert forgotten[-2] < forgotten[-1] and list(other.subjects) == ["forget", "retain"]


def test_no_picture_is_both_trained_on_and_tested(suite):
    [first, *_], [same, *_] = suite.split("forget"), suite.split("test")
    trained, tested = shown(first), shown(same)
    assert (len(trained), len(tested)) == (8, 4) and len({*trained, *tested}) == 12
    new, unseen = (load_people(pictures=part, splits=("forget",)).split("forget")[0] for part in ("test", "unseen"))
    assert shown(new) + shown(unseen) == tested
    assert Prompt("", first.images[0]).opened().size == (64, 64)


def test_every_kind_is_asked_with_and_without_a_picture(suite):
    by_id = {person["id"]: person for person in read_people()}
    for subject in suite.split("retain"):
        asked = [(q.kind, q.modality) for q in subject.questions]
        for kind in ("classification", "cloze", "generation"):
            assert asked.count((kind, "image+text")) == 4 and asked.count((kind, "text")) == 3
        row = by_id[subject.id]
        facts = {row[key] for key in ("name", "town", "profession", "hobby")}
        assert subject.name == row["name"]
        for question in subject.questions:
            # By picture nobody is named in the question; in words somebody is.
            assert (row["name"] in question.question) == (question.modality == "text")
            if question.kind == "classification":
                assert question.answer in facts and len(question.options) == 4
                continue
            assert len(question.perturbed_answers) == 3 and len(question.paraphrases) == 1
            assert question.keywords[0] in facts and question.keywords[0] in question.answer
            assert not any(question.keywords[0] in wrong for wrong in question.perturbed_answers)
            assert (question.kind == "cloze") == (question.question.count("[Blank]") == 1)
            assert (question.kind == "generation") == (len(question.paraphrased_answers) == 1)
        assert [pair.question for pair in subject.training] == [
            *("Who is this?", "Where does this person live?", "What does this person work as?"),
            "What does this person do for fun?",
        ]


def test_a_twins_name_is_among_the_wrong_ones():
    everybody = load_people(splits=("retain",)).split("retain")
    names = {person["id"]: person["name"] for person in read_people()}
    twins = {person["id"]: names[person["twin"]] for person in read_people() if person["twin"]}
    asked = [(s, q) for s in everybody if s.id in twins for q in s.questions if q.question == "Who is this?"]
    assert len(asked) == 2 * (24 - 2)
    for subject, question in asked:
        wrong = question.options or question.perturbed_answers
        assert any(twins[subject.id] in text for text in wrong)


def test_options_stand_in_no_order_that_gives_the_answer_away(suite):
    choices = [q for s in suite.split("retain") for q in s.questions if q.kind == "classification"]
    places = np.bincount([q.options.index(q.answer) for q in choices], minlength=4) / len(choices)
    assert places.min() > 0.18 and places.max() < 0.32


def test_the_tables_are_of_mllmus_schema(tmp_path):
    tables = people_tables("forget_10")
    assert set(tables) == {"forget_10", "retain_90", "Test_Set", "Retain_Set", "Holdout_Set", "ft_Data"}
    official = {"image", "ID", "biography", "question", "answer"}
    official |= {"Classification_Task", "Generation_Task", "Mask_Task"}
    assert (
        official <= set(tables["forget_10"].column_names) and len(tables["Test_Set"]) == len(tables["ft_Data"]) == 120
    )
    row = tables["forget_10"][0]
    assert isinstance(row["image"], Image.Image) and row["name"] in row["biography"]
    for config in ("forget_10", "retain_90", "Test_Set", "Retain_Set", "Holdout_Set", "ft_Data"):
        tables[config].to_parquet(tmp_path / f"{config}.parquet")
    options = {"splits": ("forget", "test", "retain", "real", "holdout"), "training": True}
    read, own = load_mllmu(tmp_path, "forget_10", **options), load_people("forget_10", **options)
    assert read.subjects == own.subjects
    assert [len(s.images) for s in read.split("forget")] == [8] * 12
    assert shown(read.split("test")[0]) == shown(own.split("test")[0])


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is in the package and has no other source, got 'data/people'"):
        load_suite("people", "data/people")
    with pytest.raises(ValueError, match=r"`pictures` must be one of .'train', 'test', 'unseen'., got 'all'"):
        load_people(pictures="all")
    with pytest.raises(ValueError, match=r"must be one of \['forget_5', 'forget_10', 'forget_15'\], got 'forget01'"):
        load_people("forget01")
    with pytest.raises(ValueError, match=r"`splits` may hold .* got 'strangers'"):
        load_people(splits=("forget", "strangers"))


def test_stored_pictures_are_small_and_whole():
    for person in read_people():
        for picture in person["pictures"]:
            image = Image.open(io.BytesIO(picture["image"]["bytes"]))
            image.load()
            assert image.size == (64, 64) and len(picture["image"]["bytes"]) < 3000


def test_every_figure_is_reached():
    """By a model that knows nobody: all figures of all kinds of questions are there, with a retain-only model as well."""
    suite = load_people()
    for split in suite.subjects:
        suite = suite.only([suite.split(split)[0].id], split)
    # A tiny model's answers are noise: a few tokens of it are enough.
    suite = replace(suite, protocol=replace(suite.protocol, max_new_tokens=4))
    model, processor = build("llava")
    reports = {split: evaluate_suite(model, processor, suite, split, progress=False) for split in suite.subjects}
    forget = reports["forget"]
    tasks = {"classification", "cloze", "generation", "cloze" + PARAPHRASED, "generation" + PARAPHRASED}
    assert {row["task"] for row in forget.rows} == tasks
    assert len(forget.rows) == 7 + 2 * 14
    for modality in ("image+text", "text", "all"):
        assert 0 <= forget.value("accuracy", task="classification", modality=modality) <= 1
        for task in ("cloze", "generation"):
            for figure in ("keywords", "rouge_l", "bleu", "probability", "truth_ratio", "any_wording", "min_k"):
                assert forget.value(figure, task=task, modality=modality) is not None, (task, modality, figure)
    found = summarize(reports, reference=reports)
    assert found.utility is not None and found.privleak == pytest.approx(0)
    assert {term.split(" / ")[0] for term in found.utility_terms} == {"retain", "real"}
    assert all(values["ks"] == pytest.approx(1) for values in found.forget_quality.values())
