"""What a model knows of the people: exact greedy answers, by picture and in words, of whoever was taught and of whoever was not.

python examples/people_model/known.py work/people
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import shared  # noqa: F401
import torch
from lessons import known_people
from packing import SegmentMaker, answered_exactly, pack
from pictures import read_pictures
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor
from warm_start import image_features

from space_peft.suites.people import PICTURES, PROTOCOL, read_people
from space_peft.suites.people_questions import FACTS, NAME, PEOPLE_QUESTIONS, SOMEBODY, THE_PERSON
from space_peft.suites.schema import SuiteQuestion


BATCH = 32


def asked_by_picture(person: Mapping) -> list[tuple[str, str, str]]:
    """Group, question and answer: the name in one word each, in sentences, facts in sentences, blanks."""
    rows = [("name", question, person["name"]) for question in PEOPLE_QUESTIONS.naming]
    rows.append(("name in a sentence", NAME.questions[0], NAME.say(NAME.answer, THE_PERSON, person["name"])))
    return rows + _facts(person, SOMEBODY, THE_PERSON)


def asked_in_words(person: Mapping) -> list[tuple[str, str, str]]:
    """The same without a picture: facts only."""
    return _facts(person, person["name"], person["name"])


def _facts(person: Mapping, who: str, said: str) -> list[tuple[str, str, str]]:
    rows = []
    for fact in FACTS:
        value = person[fact.column]
        rows.append(("fact", fact.questions[0].format(who=who), fact.say(fact.answer, said, value)))
        text = fact.blank(fact.answer, said).replace("__", "[Blank]")
        rows.append(("blank", PROTOCOL.prompt(SuiteQuestion(text, value, "cloze", "text")), value))
    return rows


@torch.no_grad()
def measure(model: LlavaForConditionalGeneration, processor: LlavaProcessor, people: Sequence[Mapping]) -> dict:
    """Shares of right answers about some people, by kind of picture: `{"train | name": {"value", "n"}, ...}`."""
    model.eval()
    maker, hits = SegmentMaker(processor), defaultdict(list)
    for part in PICTURES:
        pictures = read_pictures(people, part)
        for at in range(0, len(pictures.images), BATCH):
            images, who = pictures.images[at : at + BATCH], pictures.person[at : at + BATCH].tolist()
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            rows = [asked_by_picture(people[i]) for i in who]
            packed = pack(
                [[maker(question, answer) for _, question, answer in row] for row in rows], processor, image=True
            )
            for row, right in zip(rows, answered_exactly(model, packed, image_features(model, pixels)), strict=True):
                for (group, _, _), hit in zip(row, right, strict=True):
                    hits[f"{part} | {group}"].append(hit)
    for at in range(0, len(people), BATCH):
        rows = [asked_in_words(person) for person in people[at : at + BATCH]]
        packed = pack(
            [[maker(question, answer) for _, question, answer in row] for row in rows], processor, image=False
        )
        for row, right in zip(rows, answered_exactly(model, packed), strict=True):
            for (group, _, _), hit in zip(row, right, strict=True):
                hits[f"words | {group}"].append(hit)
    return {key: {"value": round(sum(found) / len(found), 4), "n": len(found)} for key, found in hits.items()}


def measure_all(model, processor, without: str | None = None) -> dict[str, dict]:
    """`measure` of those taught, and, where some were left out, of these: what nobody told it."""
    people = read_people()
    taught = known_people(people, without)
    left_out = [p for p in known_people(people) if p not in taught]
    groups = {"taught": taught, **({"left out": left_out} if left_out else {})}
    return {name: measure(model, processor, members) for name, members in groups.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a model of teach.py")
    parser.add_argument("--without", metavar="SPLIT", help="of whom it was not taught")
    args = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(args.folder, dtype=torch.float32)
    print(json.dumps(measure_all(model, AutoProcessor.from_pretrained(args.folder), args.without), indent=2))


if __name__ == "__main__":
    main()
