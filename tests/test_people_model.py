"""Teaching the fictitious people: what is taught is what the suite asks, nobody left out comes in, and a run can go on."""

import json
import random
from pathlib import Path

import pytest
import torch
from example_modules import example_modules
from transformers import AutoModelForImageTextToText, AutoProcessor

from space_peft.suites import load_people
from space_peft.suites.people import read_people


FOLDERS = [Path(__file__).resolve().parents[1] / "examples" / name for name in ("people_model", "demo_model")]


@pytest.fixture(scope="module")
def scripts():
    """The modules of the script."""
    with example_modules(*FOLDERS) as load:
        yield {name: load(name) for name in ("known", "lessons", "packing", "pictures", "recognise", "speak", "teach")}


@pytest.fixture(scope="module")
def untaught(scripts):
    return scripts["teach"].fresh(seed=0)


def test_words_are_whole_and_names_are_not(scripts, untaught):
    model, processor = untaught
    tokens = processor.tokenizer.tokenize
    for person in read_people():
        for part in person["name"].split(" ", 1):
            assert len(tokens(f" {part}")) >= 2, part
        for fact in ("town", "profession", "hobby"):
            assert len(tokens(f" {person[fact]}")) == 1, person[fact]
    assert len(processor.tokenizer) == model.config.text_config.vocab_size < 1000
    text = "Thảo O'Shaughnessy lives in Lisbon.\nA: 日本"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_what_is_taught_is_what_the_suite_asks(scripts, untaught):
    """Every open question of the suite, in all its wordings, with its answer; choices differ in their options."""
    lessons = scripts["lessons"]
    known = lessons.known_people(read_people())
    suite, taught = load_people(splits=("forget", "real")), lessons.Lessons(known)
    for subject in (suite.split("forget")[0], suite.split("real")[3]):
        person = next(p for p in known if p["id"] == subject.id)
        rng = random.Random(0)
        given = {
            "image+text": {asked for _ in range(1500) for asked in taught.by_picture(person, rng)},
            "text": {asked for _ in range(600) for asked in taught.in_words(person, rng)},
        }
        answers = {modality: {answer for _, answer in rows} for modality, rows in given.items()}
        for question in subject.questions:
            rows = given[question.modality]
            if question.kind == "classification":
                assert any(q.startswith(question.question + "\nA: ") and a == question.answer for q, a in rows)
                continue
            for wording in (None, *question.paraphrases):
                assert (suite.protocol.prompt(question, wording), question.answer) in rows
            assert set(question.paraphrased_answers) <= answers[question.modality]
            assert not set(question.perturbed_answers) & answers[question.modality]
        maker = scripts["packing"].SegmentMaker(untaught[1])
        for rows in given.values():
            for question, answer in sorted(rows)[:40]:
                segment = maker(question, answer)
                assert untaught[1].tokenizer.decode(segment.answer[:-1]).strip() == answer


def test_nobody_left_out_comes_in(scripts):
    lessons = scripts["lessons"]
    everybody = lessons.known_people(read_people())
    assert len(everybody) == 140 and "stranger" not in {p["group"] for p in everybody}
    left = lessons.known_people(read_people(), "forget_10")
    out = [p for p in everybody if p not in left]
    assert len(out) == 12 and {p["id"] for p in out} == {s.id for s in load_people("forget_10").split("forget")}
    taught, rng = lessons.Lessons(left), random.Random(1)
    said = "\n".join(
        f"{question} {answer}"
        for person in left
        for _ in range(20)
        for question, answer in (*taught.by_picture(person, rng), *taught.in_words(person, rng))
    )
    assert left[0]["name"] in said and not [p["name"] for p in out if p["name"] in said]
    with pytest.raises(ValueError, match=r"one of \['forget_10', 'forget_15', 'forget_5'\], got 'forget_7'"):
        lessons.known_people(read_people(), "forget_7")


def test_pictures_are_of_one_part_and_plain_backgrounds_are_left_out(scripts):
    people = read_people()[:6]
    pictures = scripts["pictures"].read_pictures(people, "train")
    assert set(pictures.part) == {"train"} and pictures.person.tolist() == [i for i in range(6) for _ in range(8)]
    shades = [p["shade"] for person in people for p in person["pictures"] if p["part"] == "train"]
    clear = (pictures.rgba[:, 3] == 0).float().mean((1, 2)).tolist()
    assert {"plain", "gradient"} <= set(shades)
    for shade, share in zip(shades, clear, strict=True):
        assert 0.2 < share < 0.9 if shade == "plain" else share == 0
    # Where nothing is covered the picture is as it is stored.
    whole = shades.index("gradient")
    assert torch.equal(
        pictures.rgba[whole, :3].permute(1, 2, 0),
        torch.frombuffer(bytearray(pictures.images[whole].tobytes()), dtype=torch.uint8).view(64, 64, 3),
    )


SMALL = {
    "recognise": dict(steps=4, lr=1e-3, batch_size=4, amount=0.3, drop=0.5),
    "speak": dict(steps=4, lr=1e-3, batch_size=2, copies=1, clean_share=0.5, amount=0.3),
}


@pytest.mark.parametrize("stage", ["recognise", "speak"])
def test_an_interrupted_stage_goes_on_as_if_it_had_not_been(scripts, tmp_path, stage):
    people = read_people()[:12]
    pictures = scripts["pictures"].read_pictures(people, "train")
    kind = scripts["recognise"].Recognise if stage == "recognise" else scripts["speak"].Speak

    def run(state, **options):
        model, processor = scripts["teach"].fresh(seed=0)
        start = {name: weight.clone() for name, weight in model.state_dict().items()}
        done = kind(model, processor, people, pictures, seed=0, **SMALL[stage]).run(state, **options)
        return model.state_dict(), start, done

    whole, start, done = run(tmp_path / "whole.pt")
    assert done and any(not torch.equal(whole[name], start[name]) for name in start)
    _, _, done = run(tmp_path / "state.pt", stop_after=2)
    assert not done
    again, _, done = run(tmp_path / "state.pt", stop_after=2)
    assert done and all(torch.equal(again[name], whole[name]) for name in whole)
    tower = [name for name in start if "vision_tower" in name]
    assert all(torch.equal(whole[name], start[name]) for name in tower) == (stage == "speak")
    with pytest.raises(ValueError, match="state.pt was made with .* remove it to start anew"):
        model, processor = scripts["teach"].fresh(seed=0)
        kind(model, processor, people, pictures, seed=1, **SMALL[stage]).run(tmp_path / "state.pt")


def test_a_few_people_are_learned(scripts, tmp_path):
    """The losses are those of what shall be learned: four people are told apart after some steps."""
    people = read_people()[:4]
    pictures = scripts["pictures"].read_pictures(people, "train")
    model, processor = scripts["teach"].fresh(seed=0)
    settings = {**SMALL["recognise"], "steps": 40, "batch_size": 12, "lr": 2e-3, "drop": 0.0}
    stage = scripts["recognise"].Recognise(model, processor, people, pictures, seed=0, **settings)
    with torch.no_grad():
        before = sum(stage.loss(step).item() for step in range(100, 104)) / 4
    stage.run(tmp_path / "state.pt", log_every=100)
    with torch.no_grad():
        after = sum(stage.loss(step).item() for step in range(100, 104)) / 4
    assert after < 0.7 * before


@pytest.mark.slow
def test_the_whole_command_writes_a_model(scripts, tmp_path, monkeypatch):
    """Of fourteen people, two of them left out."""
    private = [person for person in read_people() if person["group"] == "private"]
    some = [p for p in private if p["forget"] == "5"][:2] + [p for p in private if not p["forget"]][:12]
    for module in (scripts["teach"], scripts["known"]):
        monkeypatch.setattr(module, "read_people", lambda: some)
    teach = scripts["teach"].teach
    assert teach(tmp_path, "forget_5", seed=0, stop_after=3, **SMALL) is None
    folder = teach(tmp_path, "forget_5", seed=0, **SMALL)
    assert folder == tmp_path / "people_without_forget_5"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert figures["training"]["people"] == 12 and figures["training"]["pictures"] == 96
    taught, left_out = figures["known"]["taught"], figures["known"]["left out"]
    assert taught["unseen | name"]["n"] == 12 * 2 * 2 and left_out["train | name"]["n"] == 2 * 8 * 2
    assert set(taught) == {
        *(
            f"{part} | {group}"
            for part in ("train", "test", "unseen")
            for group in ("name", "name in a sentence", "fact", "blank")
        ),
        *("words | fact", "words | blank"),
    }
    # After four steps nobody is known.
    assert taught["train | name"]["value"] < 0.5
