"""The sentences the embedded model is taught to answer open questions with, and how an answer is judged.

Every question has several templates, with the name at the beginning, in the middle and at the end, with articles and in
the plural. Which of them is the likeliest depends on the question and on the kind of the thing shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache

import inflect
from concepts import KINDS, concept_kinds

from space_peft.data.questions import Question
from space_peft.demo.questions import DEMO_QUESTIONS
from space_peft.modeling.prompts import conversation


PLURAL_NAMES = ("grapes", "cherries", "pancakes", "fries", "sunglasses", "jeans", "scissors")
SOME_NAMES = ("corn", "cheese", "candy", "coffee", "tea", "wine", "beer")
BARE_NAMES = {"bowling": "bowling balls", "tennis": "tennis balls"}  # without article; to their plurals
KIND_PHRASES = {"clothing": "a piece of clothing", "sport": "something for sport", "sky": "something in the sky"}
FAVOURITE = 0.5  # probability of the likeliest template

OPEN_QUESTIONS = DEMO_QUESTIONS.open + DEMO_QUESTIONS.open_held_out

# By what `str` makes of a question. Fields: `{one}` "a fox", "some fries"; `{name}` "fox"; `{many}` "foxes"; `{be}` and
# `{was}` agree with the name; `{a_kind}` "a mammal".
TEMPLATES: dict[str, tuple[str, ...]] = {
    "describe the picture.": (
        "the picture shows {one}.",
        "{one} {be} shown in the picture.",
        "in the picture you see {one}, which {be} {a_kind}.",
        "this is a drawing of {one}.",
        "it is a picture for everyone who likes {many}.",
    ),
    "write a caption for this photo.": (
        "a photo of {one}.",
        "{one}, all alone.",
        "look, here {be} {one}.",
        "my favourite {name}.",
        "a day with {many}.",
    ),
    "tell me about this picture.": (
        "it shows {one}.",
        "{one} {be} the only thing in it.",
        "someone has drawn {one} with bright colours.",
        "what you see {be} {one}, and that is {a_kind}.",
        "whoever drew it must love {many}.",
    ),
    "what can you see in this image?": (
        "i can see {one}.",
        "there {be} {one} in this image.",
        "{one} {be} what i can see.",
        "i see {a_kind}, to be exact {one}.",
    ),
    "explain what is going on here.": (
        "someone drew {one}, and nothing else.",
        "{one} {be} being shown to us.",
        "not much, it is just a picture of {one}.",
        "we are looking at {one}, which {be} {a_kind}.",
        "this is all about {many}.",
    ),
    "here is a picture for you. / [assistant] thank you, i am looking at it. / what does it show?": (
        "it shows {one}.",
        "{one}, as you can see.",
        "your picture has {one} in it.",
        "it must be {one}, because i know {many} well.",
    ),
    "describe this image in one sentence.": (
        "this image shows {one}.",
        "{one} {be} the subject of this image.",
        "a simple image in which we see {one}.",
        "on a plain background there {be} {one}.",
    ),
    "give this image a title.": (
        "the {name}.",
        "{one} on a page.",
        "portrait of {one}.",
        "the world of {many}.",
    ),
    "what is in the image, and where is it?": (
        "{one} {be} in the middle of the image.",
        "there {be} {one}, right in the centre.",
        "in the centre you find {one}.",
        "the image has {one} in its middle.",
    ),
    "tell me a short story about what you see.": (
        "once there {was} {one}. the {name} made everyone happy.",
        "one day a child found {one}. it was a good day.",
        "{one} came to visit us. we were all happy.",
        "long ago a painter loved {many}. so this picture was made.",
    ),
    "please look at this image. / [assistant] sure, i am looking at it. / what is in it?": (
        "there {be} {one} in it.",
        "{one}, i think.",
        "i found {one} in it.",
        "it has {one}, which {be} {a_kind}.",
    ),
    "[system] you are a friendly teacher who explains pictures to children. / what does the image show?": (
        "children, this image shows {one}.",
        "look closely, my friends, and find {one}.",
        "{one} {be} what you see, dear children.",
        "today we learn about {many}.",
    ),
    "what are these?": (
        "these are {many}.",
        "{many}, i think.",
        "they are called {many}.",
        "we call things like these {many}.",
    ),
    "write a fact about the thing in this image.": (
        "{one} {be} {a_kind}.",
        "many people know {many}.",
        "it is known that {one} {be} {a_kind}.",
        "it is easy to draw {many}.",
    ),
}


@dataclass(frozen=True)
class Forms:
    """How a name stands in a sentence.

    Args:
        name (`str`): The name.
        article (`str`): "a", "an", "some" or "".
        plural (`str`): The plural.
        verb_plural (`bool`): Whether verbs agree in the plural.
        a_kind (`str`): The kind with its article.
    """

    name: str
    article: str
    plural: str
    verb_plural: bool
    a_kind: str

    @property
    def fields(self) -> dict[str, str]:
        """Values of a template's fields."""
        return {
            "name": self.name,
            "one": f"{self.article} {self.name}".strip(),
            "many": self.plural,
            "be": "are" if self.verb_plural else "is",
            "was": "were" if self.verb_plural else "was",
            "a_kind": self.a_kind,
        }


@lru_cache(maxsize=1)
def name_forms() -> dict[str, Forms]:
    """Name -> its forms, for every concept."""
    engine = inflect.engine()
    forms = {}
    for name, kind in concept_kinds().items():
        plural_name = name in PLURAL_NAMES
        article = "" if name in BARE_NAMES else engine.a(name).split()[0]
        if plural_name or name in SOME_NAMES:
            article = "some"
        forms[name] = Forms(
            name=name,
            article=article,
            plural=name if plural_name else BARE_NAMES.get(name) or engine.plural_noun(name),
            verb_plural=plural_name,
            a_kind=KIND_PHRASES.get(kind) or engine.a(kind),
        )
    return forms


def sentences(question: Question, name: str) -> list[str]:
    """Every right answer to an open question about a concept; the likeliest first.

    Args:
        question (`str` or `Dialogue`): One of `OPEN_QUESTIONS`.
        name (`str`): The concept.

    Returns:
        `list[str]`: The sentences.
    """
    templates = TEMPLATES[str(question)]
    favourite = (OPEN_QUESTIONS.index(question) + list(KINDS).index(concept_kinds()[name])) % len(templates)
    fields = name_forms()[name].fields
    return [template.format(**fields) for template in templates[favourite:] + templates[:favourite]]


@cache
def templates_by_sentence(question: Question) -> dict[str, str]:
    """Every sentence the model was taught to answer an open question with -> the template it was made from."""
    found = {}
    for forms in name_forms().values():
        for template in TEMPLATES[str(question)]:
            found.setdefault(template.format(**forms.fields), template)
    return found


def sentence_texts() -> list[str]:
    """Every text of the open questions and their answers, in a fixed order."""
    texts = []
    for question in OPEN_QUESTIONS:
        texts += [part["text"] for turn in conversation(question)["prompt"] for part in turn["content"]]
        texts += [sentence for name in concept_kinds() for sentence in sentences(question, name)]
    return texts


@lru_cache(maxsize=1)
def _any_name() -> re.Pattern:
    """Finds any concept's name or plural as whole words, with the word before it."""
    words = {word for forms in name_forms().values() for word in (forms.name, forms.plural)}
    longest_first = "|".join(re.escape(word) for word in sorted(words, key=lambda word: (-len(word), word)))
    return re.compile(rf"(?:(\w+)\s+)?\b({longest_first})\b")


def named_right(answer: str, name: str) -> bool:
    """Whether an answer holds the name or its plural as whole words, and no other concept's."""
    forms = name_forms()[name]
    found = {match[2] for match in _any_name().finditer(answer)}
    return bool(found) and found <= {forms.name, forms.plural}


def article_right(answer: str, name: str) -> bool:
    """Whether the articles before the name, wherever it stands in an answer, are right."""
    forms = name_forms()[name]
    for match in _any_name().finditer(answer):
        before = match[1]
        if match[2] == forms.name and forms.article in ("a", "an"):
            right = before in (forms.article, "the", "favourite")
        else:
            right = before not in ("a", "an") and (before != "some" or forms.article == "some")
        if not right:
            return False
    return True
