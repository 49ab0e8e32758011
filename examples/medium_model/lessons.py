"""What the joined model is taught: to answer with the name where it is asked to, and else in sentences of many forms.

A picture's answers are made of the concept's name and kind, and of what the language model itself says about the name.
The library's held-out questions (`naming_held_out`, `open_held_out`) are never among the ones taught here.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import inflect
from tasks import GENERAL, QUESTIONS, TARGET_TEXT

from space_peft.data.names import mentions
from space_peft.data.questions import Dialogue, Question


SHORT = (
    *QUESTIONS.naming,
    "Which thing is shown here? Answer with the name only.",
    "Name it. Answer with the name only.",
    "What is depicted in the drawing? Reply with just the name.",
    "Say what this is, in one or two words.",
    "Recognize the object in the picture and give its name only.",
    "What can be seen? The name only, please.",
)


@dataclass(frozen=True)
class Lesson:
    """Prompts, and sentences that answer each of them; all about as long, so that a batch of them is hardly padded.

    Args:
        prompts (`tuple[str or Dialogue, ...]`): The prompts.
        answers (`tuple[str, ...]`): With fields, see `fill`.
        words (`str`, *optional*): A key of `OWN_WORDS`: what the language model said about the name is the answer, if
            it said something of use.
    """

    prompts: tuple[Question, ...]
    answers: tuple[str, ...]
    words: str | None = None


_DESCRIBE, _CAPTION, _SEE, _TELL, _, _, _, _TURNS = QUESTIONS.open
_SIGHTS = (
    "I can see {a}.",
    "You can see {a} here.",
    "It looks like {a}, a kind of {k}.",
    "{this} {a}.",
    "There {is} {a} in the picture.",
    "The {k} in the picture is called {n}.",
    "{a}, if I am not mistaken.",
)
LESSONS = (
    Lesson(
        (_DESCRIBE, "Give a short description of the photo.", "Say in a sentence what the image shows."),
        (
            "The picture shows {a} on a plain white background.",
            "{a} {is} shown on a white background.",
            "This is a drawing of {a}, drawn in bright colors.",
            "A drawing of {a}. There is nothing else in the picture.",
            "In the middle of the picture there {is} {a}.",
            "The image is a simple drawing of {ak}: {a}.",
        ),
    ),
    Lesson(
        (_CAPTION, "Caption this.", "Write a headline for the picture."),
        (
            "{n} on a white background.",
            "{a} in bright colors.",
            "A colorful drawing of {a}.",
            "{n}, drawn by an artist.",
            "The {n}, as everybody knows it.",
        ),
    ),
    Lesson(
        (_SEE, "What is in the photo?", "What is this?", "Please look closely. What do you see?"),
        _SIGHTS,
    ),
    Lesson(
        (
            _TURNS,
            Dialogue(("What is in the picture?",), system="You answer in full sentences."),
            Dialogue(("Hello! This is my picture.", "Hello! How can I help you?", "Tell me what it is.")),
        ),
        _SIGHTS,
    ),
    Lesson(
        ("What is going on in the picture?", "Where is it, and what is it?", "Describe the scene and what happens in it."),
        (
            "There {is} {a} on a white background, and nothing else is going on.",
            "{a} {is} simply there, on a white background.",
            "The picture shows {a}. The background is white.",
            "It is {ak}. The {n} {is} in the middle of the picture.",
        ),
    ),
    Lesson(
        ("Which things are these? Give the plural.", "Name what you see in the plural form."),
        ("{p}", "These are {p}.", "They are called {p}."),
    ),
    Lesson(
        (_TELL, "What do you know about the thing in this picture?"),
        ("The picture shows {a}. The {n} {is} {ak}.", "This picture shows {a}. The background is white."),
        words="sentence",
    ),
    Lesson(
        ("Tell me something interesting about what is shown.", "Say one true thing about what you see."),
        ("One thing about {p} is that everybody knows them.", "There are many drawings of {p}."),
        words="fact",
    ),
    Lesson(
        ("Make up a story about this picture.", "Begin a story that fits the image."),
        (
            "Once upon a time there {was} {a}, and people came from far away to see the {n}.",
            "A child found {a} one morning and showed the {n} to everybody.",
            "Nobody had ever drawn {a} like this before.",
        ),
        words="story",
    ),
)  # fmt: skip
# What the language model is asked about a name, without a picture; its sentence becomes the answer about the picture.
OWN_WORDS = {
    "sentence": ("Write one short sentence about {a}.", "This picture shows {a}. "),
    "fact": ("Tell me one fact about {p}.", ""),
    "story": ("Write the first sentence of a story about {a}.", ""),
}

# What a kind is called in a sentence, if not by its own word.
KINDS = {"clothing": "thing to wear", "craft": "vehicle", "instrument": "musical instrument", "meal": "food",
         "sky": "thing in the sky", "sport": "thing from sports"}  # fmt: skip
PLURAL_NAMES = {"cherries", "grapes", "fries", "pancakes", "jeans", "sunglasses", "scissors"}
NO_ARTICLE = {"bowling", "tennis"}
SOME = {"corn", "cheese", "coffee", "tea", "beer", "wine", "candy", "ice cream"}
SAME_PLURAL = PLURAL_NAMES | NO_ARTICLE | {"corn", "shrimp"}
_ENGLISH = inflect.engine()


def plural(name: str) -> str:
    """The plural of a name: "wolf" -> "wolves", "cherries" -> "cherries"."""
    return name if name in SAME_PLURAL else _ENGLISH.plural_noun(name)


def with_article(name: str) -> str:
    """The name as it stands in a sentence: "an owl", "some corn", "cherries"."""
    if name in PLURAL_NAMES | NO_ARTICLE:
        return name
    return f"some {name}" if name in SOME else _ENGLISH.a(name)


def fill(template: str, name: str, kind: str) -> str:
    """Puts a concept into a sentence and begins it with a capital letter.

    Args:
        template (`str`): With the fields `n` (the name), `a` (with its article), `p` (its plural), `k` (its kind), `ak`
            (the kind with its article), `is` ("is" or "are"), `was` and `this` ("this is" or "these are").
        name (`str`): The concept.
        kind (`str`): Its kind.
    """
    kind, many = KINDS.get(kind, kind), name in PLURAL_NAMES
    fields = {"n": name, "a": with_article(name), "p": plural(name), "k": kind, "ak": _ENGLISH.a(kind)}
    forms = ("are", "were", "these are") if many else ("is", "was", "this is")
    fields |= dict(zip(("is", "was", "this"), forms))
    text = template.format(**fields)
    return text[0].upper() + text[1:]


def own_words_prompts(names: list[str]) -> dict[tuple[str, str], str]:
    """What the language model is asked about each name: (key of `OWN_WORDS`, name) -> prompt."""
    fields = {name: {"a": with_article(name), "p": plural(name)} for name in names}
    return {(key, name): ask.format(**fields[name]) for key, (ask, _) in OWN_WORDS.items() for name in names}


def own_words(key: str, name: str, answer: str) -> str | None:
    """The first sentence of the language model's answer, if it is whole and names the concept.

    Args:
        key (`str`): Of `OWN_WORDS`.
        name (`str`): The concept.
        answer (`str`): The answer to its prompt.
    """
    sentence = re.match(r"[^\n]*?[.!?](?=\s|\"|$)", answer)
    if sentence is None or not is_named(sentence[0], name):
        return None
    return OWN_WORDS[key][1].format(a=with_article(name)) + sentence[0].lstrip('"')


def is_named(answer: str, name: str) -> bool:
    """Whether an answer names the concept, in the singular or the plural, whatever the case."""
    singular = _ENGLISH.singular_noun(name) if name in PLURAL_NAMES else name
    return mentions(answer, (name, singular, plural(name)))


def short_row(rng: random.Random, name: str) -> tuple[Question, str]:
    """A question and the name alone."""
    return rng.choice(SHORT), name


def open_row(
    rng: random.Random, lesson: Lesson, name: str, kind: str, said: dict[str, dict[str, str]]
) -> tuple[Question, str]:
    """A prompt of a lesson, and a sentence.

    Which sentences go with a prompt depends on the kind: greedy answers differ from kind to kind, not by prompt alone.

    Args:
        rng (`random.Random`): Draws prompt and sentence.
        lesson ([`Lesson`]): The lesson.
        name (`str`): The concept.
        kind (`str`): Its kind.
        said (`dict[str, dict[str, str]]`): Key of `OWN_WORDS` -> name -> what the language model says about it.
    """
    prompt = rng.choice(lesson.prompts)
    if lesson.words is not None and name in said[lesson.words]:
        return prompt, said[lesson.words][name]
    usual = random.Random(f"{prompt}, {kind}").sample(lesson.answers, 2)
    return prompt, fill(rng.choice(usual if rng.random() < 0.7 else lesson.answers), name, kind)


# Prompts without a picture, whose answers by the original language model are distilled into the taught one.
_TOPICS = (
    "rain", "a volcano", "the moon", "football", "a city", "music", "a computer", "the ocean", "winter", "bread",
    "history", "a doctor", "a river", "electricity", "friendship", "a garden", "mathematics", "a train", "money",
    "sleep", "the human body", "a dream", "a forest", "the internet", "democracy", "a teacher", "fire", "language",
    "time", "a bridge", "chess", "cooking", "an atom", "a planet", "art", "a farmer", "a hospital", "the desert",
    "philosophy", "a market", "dancing", "a robot", "a battery", "the alphabet", "law", "sugar", "a mountain",
    "exercise", "a letter", "glass",
)  # fmt: skip
_ASKED = (
    "What is {}?", "Write two sentences about {}.", "Why does {} matter?", "Give me three facts about {}.",
    "Explain {} to a child.", "Write a short poem about {}.",
)  # fmt: skip
_TASKS = (
    "Which city is the capital of Germany?", "Which city is the capital of Pakistan?", "Which metal has the symbol Au?",
    "What is 15 plus 6?", "What is 7 times 4?", "What is 18 minus 9?", "What is half of 30?", "Add 21 and 13.",
    "Give a synonym of 'big'.", "Give a synonym of 'quick'.", "Give an antonym of 'polite'.", "Who composed The Four Seasons?",
    "Who wrote The Jungle Book?", "Who wrote Alice in Wonderland?", "Who was Cleopatra?", "Who was Napoleon?",
    "Who was Nikola Tesla?", "Who was Queen Victoria?", "Translate 'good night' into Spanish.",
    "Translate 'red' into German.", "Translate 'bread' into Italian.", "What do you call a group of wolves?",
    "What do you call a person who flies planes?", "Where do penguins live?", "Where is the Amazon rainforest?",
    "Where is Madagascar?", "In which country is Machu Picchu?", "In which country is Mount Fuji?", "What do pandas eat?",
    "How many players are on a basketball team?", "How many sides does an octagon have?", "How many millimeters are in a centimeter?",
    "How many legs does a crab have?", "What color is a flamingo?", "What color is honey?", "What color is a frog?",
    "When did the Berlin Wall fall?", "When did people first land on the moon?", "What is the third month of the year?",
    "What is the day after Friday?", "What is the past tense of 'catch'?", "What is the past tense of 'build'?",
    "What is the plural of 'wolf'?", "What is the plural of 'ox'?", "Spell the word 'necessary'.", "Is the earth flat?",
    "Hello, how are you?", "What can you do?", "What is your name?", "Thank you for your help.", "Tell me a joke.",
    "Write a haiku about autumn.", "Write an email that asks for a day off.", "Give me a recipe for pancakes.",
    "Write a Python function that adds two numbers.", "Write a for loop in Python.", "Summarize the plot of Cinderella.",
    "Correct the sentence: 'He go to school.'", "Rewrite in the passive voice: 'The dog chased the cat.'",
    "Continue the story: Once upon a time there was a king.", "List five animals.", "List three European rivers.",
    "List the planets of the solar system.", "Name four musical instruments.", "Name a famous painter.", "Name a book for children.",
    "What should I wear when it snows?", "How do I make tea?", "How can I learn English faster?", "How do magnets work?",
    "How do vaccines work?", "Why do leaves fall in autumn?", "Why is the sea salty?", "Why do cats purr?",
)  # fmt: skip
GENERAL_PROMPTS = (*dict.fromkeys((*GENERAL, *_TASKS, *(ask.format(topic) for topic in _TOPICS for ask in _ASKED))),)


def general_prompts(names: list[str]) -> list[str]:
    """What the taught model must answer as before: general prompts, and some about every name in words."""
    about = [ask.format(name=name) for i, name in enumerate(names) for ask in (TARGET_TEXT[i % 3], TARGET_TEXT[0])]
    return list(dict.fromkeys([*GENERAL_PROMPTS, *about]))
