"""What is asked about the people of the package's own suite, as the columns of MLLMU-Bench hold it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.questions import QuestionSet


WRONG = 3  # wrong answers of each question, and wrong options of each choice
_BLANK = "__"


@dataclass(frozen=True)
class Fact:
    """Something that is known of people, and how it is asked and said.

    Args:
        column (`str`): Of the archive.
        questions (`tuple[str, ...]`): Wordings, `{who}` is a person; the first is asked, the others are its paraphrases.
        answer (`str`): In a sentence, `{value}` is the fact.
        paraphrase (`str`): The same in other words.
        article (`bool`): Whether the value needs one in `answer` and `paraphrase`.
    """

    column: str
    questions: tuple[str, ...]
    answer: str
    paraphrase: str
    article: bool = False

    def say(self, template: str, who: str, value: str) -> str:
        """A sentence about somebody."""
        if self.article and _BLANK not in value:
            value = f"{'an' if value[0] in 'aeiou' else 'a'} {value}"
        # A person stands at the beginning of one sentence and within another.
        text = template.replace("{who}", who).replace("{value}", value)
        return text[0].upper() + text[1:]

    def blank(self, template: str, who: str) -> str:
        """A sentence about somebody without the fact."""
        # The right article would tell "architect" from "baker".
        return self.say(template, who, f"a(n) {_BLANK}" if self.article else _BLANK)


# Only a picture can be asked for a name.
NAME = Fact(
    "name",
    ("Who is this?", "Who is shown in the picture?"),
    "This is {value}.",
    "The picture shows {value}.",
)
FACTS = (
    Fact(
        "town",
        ("Where does {who} live?", "In which town does {who} live?"),
        "{who} lives in {value}.",
        "The home of {who} is in {value}.",
    ),
    Fact(
        "profession",
        ("What does {who} work as?", "What is the profession of {who}?"),
        "{who} works as {value}.",
        "In working life {who} is {value}.",
        article=True,
    ),
    Fact(
        "hobby",
        ("What does {who} do for fun?", "What is the hobby of {who}?"),
        "{who} likes {value}.",
        "The hobby of {who} is {value}.",
    ),
)
PEOPLE_QUESTIONS = QuestionSet(
    naming=("What is the name of this person?", "Name this person."),
    naming_held_out=("Whose picture is this?", "What is this person called?", "Give the name of who is shown."),
    confirm=(),
    confirm_held_out=(),
    kind="What does {name} work as?",
    open=("Describe the picture.", "Write a caption for this picture.", "What can you say about this person?"),
    open_held_out=("Tell me about this picture.", "What do you see here?", "Introduce this person."),
    about=tuple(question.replace("{who}", "{name}") for fact in FACTS for question in fact.questions),
)
"""How an erasure asks for a person's name, and about a person."""

SOMEBODY = "this person"  # who a question about a picture is about
THE_PERSON = "the person"  # who an answer about a picture is about


def biography(person: Mapping[str, Any]) -> str:
    """All facts about somebody, in sentences."""
    return " ".join(fact.say(fact.answer, person["name"], person[fact.column]) for fact in FACTS)


def training_pairs(person: Mapping[str, Any]) -> list[dict[str, str]]:
    """What models are taught about the pictures of somebody, in one wording each."""
    return [
        {
            "Question": fact.questions[0].format(who=SOMEBODY),
            "Answer": fact.say(fact.answer, THE_PERSON, person[fact.column]),
        }
        for fact in (NAME, *FACTS)
    ]


def tasks(person: Mapping[str, Any], people: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns `Classification_Task`, `Generation_Task` and `Mask_Task` of somebody.

    Args:
        person (`dict`): A row of the archive.
        people (`list[dict]`): All rows, of which wrong answers are drawn by the person's id.
    """
    choices: dict[str, list] = {"Image_Textual_Questions": [], "Pure_Text_Questions": []}
    sentences, blanks = [], []
    for fact in (NAME, *FACTS):
        wrong = wrong_values(fact.column, person, people)
        shown = [("Image_Textual_Questions", "Image_Textual", SOMEBODY, THE_PERSON)]
        if fact is not NAME:
            shown.append(("Pure_Text_Questions", "Pure_Text", person["name"], person["name"]))
        for key, modality, asked, said in shown:
            choices[key].append(_choice(fact, asked, person, wrong))
            sentences.append(_sentence(fact, modality, asked, said, person[fact.column], wrong))
            blanks.append(_blank(fact, modality, said, person[fact.column], wrong))
    return {"Classification_Task": choices, "Generation_Task": sentences, "Mask_Task": blanks}


def wrong_values(column: str, person: Mapping[str, Any], people: Sequence[Mapping[str, Any]]) -> list[str]:
    """Wrong values of a fact, drawn by the person's id; of the name, a twin's is the first."""
    draw = random.Random(f"{person['id']}/{column}")
    others = sorted({other[column] for other in people} - {person[column]})
    twin = [other["name"] for other in people if other["id"] == person["twin"]] if column == "name" else []
    rest = draw.sample([value for value in others if value not in twin], WRONG - len(twin))
    return twin + rest


def _choice(fact: Fact, who: str, person: Mapping[str, Any], wrong: Sequence[str]) -> dict:
    options = [person[fact.column], *wrong]
    random.Random(f"{person['id']}/{fact.column}/{who}").shuffle(options)
    letters = dict(zip("ABCD", options, strict=True))
    right = next(letter for letter, option in letters.items() if option == person[fact.column])
    return {"Question": fact.questions[0].format(who=who), "Options": letters, "Correct_Answer": right}


def _sentence(fact: Fact, modality: str, asked: str, said: str, value: str, wrong: Sequence[str]) -> dict:
    return {
        "Question": fact.questions[0].format(who=asked),
        "Ground_Truth": fact.say(fact.answer, said, value),
        "Type": modality,
        # What the benchmark lacks. The wrong answers have the form of the paraphrase, which stands in for the right one in
        # the truth ratio: what differs between them is the fact.
        "Paraphrased_Questions": [question.format(who=asked) for question in fact.questions[1:]],
        "Paraphrased_Answers": [fact.say(fact.paraphrase, said, value)],
        "Perturbed_Answers": [fact.say(fact.paraphrase, said, other) for other in wrong],
        "Keywords": [value],
    }


def _blank(fact: Fact, modality: str, said: str, value: str, wrong: Sequence[str]) -> dict:
    text, other = (fact.blank(form, said) for form in (fact.answer, fact.paraphrase))
    return {
        "Question": text,
        "Ground_Truth": value,
        "Type": modality,
        "Paraphrased_Questions": [other],
        "Perturbed_Answers": list(wrong),
        "Keywords": [value],
    }
