"""What a model is taught about people: questions with answers, by picture and in words, and nothing about anybody else."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from space_peft.suites.people import PROTOCOL
from space_peft.suites.people_questions import FACTS, NAME, PEOPLE_QUESTIONS, SOMEBODY, THE_PERSON, Fact
from space_peft.suites.schema import SuiteQuestion


BLANK = "[Blank]"
PARAPHRASE_SHARE = 0.25  # of sentences that are the fact's other form
OPEN_ANSWERS = (
    "The picture shows {name}, who works as {profession}.",
    "This is {name}, who lives in {town}.",
    "Here we see {name}, who likes {hobby}.",
)
NAMING = PEOPLE_QUESTIONS.naming + PEOPLE_QUESTIONS.naming_held_out
OPEN = PEOPLE_QUESTIONS.open + PEOPLE_QUESTIONS.open_held_out
Person = Mapping[str, str]


def known_people(people: Sequence[Mapping], without: str | None = None) -> list[Mapping]:
    """Whom a model is taught.

    Args:
        people (`list[dict]`): Rows of the archive.
        without (`str`, *optional*): A request, `"forget_5"`, `"forget_10"` or `"forget_15"`, whose people are left out.

    Raises:
        ValueError: If there is no such request.
    """
    share = 0
    if without is not None:
        requests = sorted({f"forget_{person['forget']}" for person in people if person["forget"]})
        if without not in requests:
            raise ValueError(f"`without` must be one of {requests}, got {without!r}.")
        share = int(without.removeprefix("forget_"))
    return [p for p in people if p["group"] != "stranger" and not (p["forget"] and int(p["forget"]) <= share)]


@dataclass
class Lessons:
    """Draws questions with their answers.

    Args:
        people (`list[dict]`): Whom the model is taught; wrong options are drawn of them only.
    """

    people: Sequence[Person]
    values: dict[str, list[str]] = field(init=False)

    def __post_init__(self):
        self.values = {fact.column: sorted({p[fact.column] for p in self.people}) for fact in (NAME, *FACTS)}

    def by_picture(self, person: Person, rng: random.Random) -> list[tuple[str, str]]:
        """The name in two ways, a fact in a sentence, a blank, and one of choice and open question."""
        fact, other = rng.choice(FACTS), rng.choice((NAME, *FACTS))
        asked = [
            (rng.choice(NAMING), person["name"]),
            self.sentence(NAME, SOMEBODY, THE_PERSON, person, rng),
            self.sentence(fact, SOMEBODY, THE_PERSON, person, rng),
            self.blank(other, THE_PERSON, person, rng),
        ]
        last = self.choice(rng.choice((NAME, *FACTS)), SOMEBODY, person, rng) if rng.random() < 0.5 else None
        return [*asked, last or self.open(person, rng)]

    def in_words(self, person: Person, rng: random.Random) -> list[tuple[str, str]]:
        """Two facts in a sentence, a blank, and in half of all a choice."""
        name = person["name"]
        asked = [self.sentence(fact, name, name, person, rng) for fact in rng.sample(FACTS, 2)]
        asked.append(self.blank(rng.choice(FACTS), name, person, rng))
        if rng.random() < 0.5:
            asked.append(self.choice(rng.choice(FACTS), name, person, rng))
        return asked

    def sentence(self, fact: Fact, who: str, said: str, person: Person, rng: random.Random) -> tuple[str, str]:
        form = fact.paraphrase if rng.random() < PARAPHRASE_SHARE else fact.answer
        return rng.choice(fact.questions).replace("{who}", who), fact.say(form, said, person[fact.column])

    def blank(self, fact: Fact, said: str, person: Person, rng: random.Random) -> tuple[str, str]:
        value = person[fact.column]
        text = fact.blank(rng.choice((fact.answer, fact.paraphrase)), said).replace("__", BLANK)
        return PROTOCOL.prompt(SuiteQuestion(text, value, "cloze", "text")), value

    def choice(self, fact: Fact, who: str, person: Person, rng: random.Random) -> tuple[str, str]:
        value = person[fact.column]
        options = [value, *rng.sample([other for other in self.values[fact.column] if other != value], 3)]
        rng.shuffle(options)
        text = rng.choice(fact.questions).replace("{who}", who)
        return PROTOCOL.prompt(SuiteQuestion(text, value, "classification", "text", options=tuple(options))), value

    def open(self, person: Person, rng: random.Random) -> tuple[str, str]:
        # The same question gets the same form, so that a greedy answer is one of them.
        number = rng.randrange(len(OPEN))
        return OPEN[number], open_answer(number, person)


def open_answer(number: int, person: Person) -> str:
    """What is answered to an open question, by its place in `OPEN`."""
    article = "an" if person["profession"][0] in "aeiou" else "a"
    facts = {"name": person["name"], "town": person["town"], "hobby": person["hobby"]}
    form = OPEN_ANSWERS[number % len(OPEN_ANSWERS)]
    return form.format(**facts, profession=f"{article} {person['profession']}")


def all_texts(people: Sequence[Person]) -> list[str]:
    """What can be asked and said, without names, each text once: the vocabulary is made of it."""
    values = Lessons(people).values
    texts = {*NAMING, *OPEN}
    for fact in FACTS:
        forms = (fact.answer, fact.paraphrase)
        texts.update(question.replace("{who}", SOMEBODY) for question in fact.questions)
        texts.update(fact.say(form, THE_PERSON, value) for form in forms for value in values[fact.column])
        texts.update(fact.blank(form, THE_PERSON).replace("__", BLANK) for form in forms)
        # A fact is also said alone, as the answer to a blank.
        texts.update(values[fact.column])
    texts.update(form.replace("{value}", "") for form in (NAME.answer, NAME.paraphrase))
    texts.update(NAME.questions)
    texts.update(open_answer(number, {**person, "name": ""}) for person in people for number in range(len(OPEN)))
    texts.add(PROTOCOL.prompt(SuiteQuestion("_", "_", "cloze", "text")))
    texts.add(PROTOCOL.prompt(SuiteQuestion("_", "_", "classification", "text", options=("_", "-", "=", "+"))))
    texts.add("question: answer:")
    return sorted(texts)
