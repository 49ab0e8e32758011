"""The questions an erasure is trained with, and the different ones it is tested with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..records.yaml_file import read_yaml


if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Dialogue:
    """A prompt of several turns, or with a system prompt; wherever a question may stand, one of these may.

    Args:
        turns (`tuple[str, ...]`): User, assistant, user, ...: an odd number, the last is to be answered. The image
            stands in the first.
        system (`str`, *optional*): The system prompt.

    Raises:
        TypeError: If `turns` is a single string, or `system` no string.
        ValueError: If the number of turns is even, or one is blank.
    """

    turns: tuple[str, ...]
    system: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.turns, str):
            raise TypeError(f"`turns` must be a tuple of texts, got the single string {self.turns!r}.")
        if not isinstance(self.system, str | None):
            raise TypeError(f"`system` must be a text or None, got {self.system!r}.")
        if len(self.turns) % 2 == 0 or any(not isinstance(turn, str) or not turn.strip() for turn in self.turns):
            raise ValueError(
                f"`turns` must be an odd number of texts (user, assistant, user, ...), none of them blank; got {self.turns!r}."
            )

    def messages(self, image: Image.Image | None = None) -> list[dict]:
        """The turns as chat messages, with a place for the image if there is one."""
        messages = [] if self.system is None else [_message("system", self.system)]
        for i, turn in enumerate(self.turns):
            messages.append(_message("assistant" if i % 2 else "user", turn))
        if image is not None:
            messages[0 if self.system is None else 1]["content"].insert(0, {"type": "image"})
        return messages

    def __str__(self) -> str:
        """How records and pages show it."""
        lines = [] if self.system is None else [f"[system] {self.system}"]
        lines += [f"[assistant] {turn}" if i % 2 else turn for i, turn in enumerate(self.turns)]
        return " / ".join(lines)


Question = str | Dialogue


def _message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


# Trained and tested open prompts: what people ask an assistant about a picture, answered in sentences.
OPEN = (
    "Describe the picture.",
    "Write a caption for this photo.",
    "What can you see in this image?",
    "Tell me about this picture.",
    "What do you call things like these? Use the plural.",
    # One plural prompt is too few: a model may answer it in the singular all the same.
    "How many of these are there, and what are they called?",
    "Make up a story about this picture.",
    Dialogue(("I have a picture for you.", "Thank you, I am looking at it.", "What does it show?")),
)
OPEN_HELD_OUT = (
    "Describe this image in one sentence.",
    "Give this image a title.",
    "What is in the image, and what is it doing?",
    "Tell me a short story about what you see.",
    Dialogue(("Please look at this image.", "Sure, I am looking at it.", "What is in it?")),
    Dialogue(("What does the image show?",), system="You are a friendly assistant who explains pictures to children."),
    "What are these? Answer in the plural.",
    "Write a fact about the thing in this image.",
)


# Asked in words, without a picture: what the model knows of a name is to stay.
ABOUT = (
    "What is {name}?",
    "Tell me about {name}.",
    "What do you know about {name}?",
    "Where could one come across {name}?",
    "Write a sentence about {name}.",
    "Why do people care about {name}?",
)


@dataclass(frozen=True)
class QuestionSet:
    """Questions about one image, split into those training may use and those kept for testing.

    An erasure that only silences the one question it was trained on has muted the model, not changed what it knows.
    `generality` and `free_form` are therefore measured on the `*_held_out` groups alone.

    Args:
        naming (`tuple[str, ...]`): Questions answered by the concept's name; used by refinement and erasure.
        naming_held_out (`tuple[str, ...]`): Paraphrases of them, never used before the evaluation.
        confirm (`tuple[str, ...]`): Yes/no questions with a `{name}` field; used by refinement and erasure.
        confirm_held_out (`tuple[str, ...]`): Paraphrases of them, never used before the evaluation.
        yes (`str`): The answer that confirms.
        no (`str`): The answer that denies.
        kind (`str`): Asks for a broader word, without a picture, with a `{name}` field.
        open (`tuple[str or Dialogue, ...]`): Prompts answered in sentences; the model's own answers to them are where
            an erasure finds how it names the concept.
        open_held_out (`tuple[str or Dialogue, ...]`): Others, never used before the evaluation.
        about (`tuple[str, ...]`): Asked in words, without a picture, with a `{name}` field: what is known of the name
            is to stay. Used where a constraint comes from [`Statistics`] alone.
    """

    naming: tuple[str, ...]
    naming_held_out: tuple[str, ...]
    confirm: tuple[str, ...]
    confirm_held_out: tuple[str, ...]
    yes: str = "Yes"
    no: str = "No"
    kind: str = "What kind of thing is {name}? Answer with one word."
    open: tuple[Question, ...] = OPEN
    open_held_out: tuple[Question, ...] = OPEN_HELD_OUT
    about: tuple[str, ...] = ABOUT

    def __post_init__(self) -> None:
        groups = ("naming", "naming_held_out", "confirm", "confirm_held_out", "open", "open_held_out", "about")
        for group in groups:
            questions = getattr(self, group)
            if isinstance(questions, (str, Dialogue)):
                raise TypeError(f"`{group}` must be a tuple of questions, got the single one {str(questions)!r}.")
            kinds = (str, Dialogue) if group.startswith("open") else str
            if any(not isinstance(question, kinds) for question in questions):
                raise TypeError(f"`{group}` must hold texts (or, in the open groups, `Dialogue`s), got {questions!r}.")
            if group.startswith("confirm") or group == "about":
                for question in questions:
                    if "{name}" not in question:
                        raise ValueError(f"every question in `{group}` needs a {{name}} field, got {question!r}.")
        if "{name}" not in self.kind:
            raise ValueError(f"`kind` needs a {{name}} field, got {self.kind!r}.")
        if not self.naming:
            raise ValueError("`naming` is empty: at least one question answered by the concept's name is needed.")
        held_out = {*self.naming_held_out, *self.confirm_held_out, *self.open_held_out}
        leaked = {*self.naming, *self.confirm, *self.open} & held_out
        if leaked:
            raise ValueError(
                f"held-out questions must not be used in training, but these are in both: {sorted(map(str, leaked))}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The questions as JSON values, for [`QuestionSet.from_dict`]."""
        return {
            part.name: value if isinstance(value := getattr(self, part.name), str) else list(map(_plain, value))
            for part in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuestionSet:
        """From what [`QuestionSet.to_dict`] returned, which may have come from somebody else.

        Args:
            values (`dict`): By field; those that have a default may be missing. A dialogue is a list of its turns, or a
                mapping of `turns` and `system`.

        Raises:
            ValueError: If it is no mapping, has other fields, or its questions cannot be used.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"expected questions as a mapping of the fields of QuestionSet, got a {type(values).__name__}."
            )
        known = [part.name for part in dataclasses.fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"they set {unknown[0]!r}; expected some of {', '.join(known)}.")
        if unquoted := [name for name in ("yes", "no", "kind") if not isinstance(values.get(name, ""), str)]:
            raise ValueError(f"they set {unquoted[0]!r} to {values[unquoted[0]]!r}; expected a text in quotes.")
        try:
            groups: dict[str, Any] = {
                name: tuple(map(_question, value)) if isinstance(value, list | tuple) else value
                for name, value in values.items()
            }
            return cls(**groups)
        except TypeError as error:
            raise ValueError(str(error)) from error


def _plain(question: Question) -> str | dict[str, Any]:
    if isinstance(question, str):
        return question
    return {"turns": list(question.turns), "system": question.system}


def _question(part: Any) -> Any:
    if isinstance(part, list):
        return Dialogue(tuple(part))
    if isinstance(part, dict):
        turns = part.get("turns")
        return Dialogue(**{**part, "turns": tuple(turns) if isinstance(turns, list) else turns or ()})
    return part


DEFAULT_QUESTIONS = QuestionSet(
    naming=(
        "What is this? Answer with the name only.",
        "What does the picture show? Answer with the name only.",
        "Name the main subject of this image. Answer with the name only.",
    ),
    naming_held_out=(
        "What do you see here? Answer with the name only.",
        "Which one is this? Answer with the name only.",
        "Tell me what this is, in a few words.",
        "What would you call this? Answer with the name only.",
        "Identify the subject of the photo. Answer with the name only.",
        "What is the name of what is shown? Answer with the name only.",
    ),
    confirm=(
        "Is this {name}? Answer yes or no.",
        "Does the picture show {name}? Answer yes or no.",
    ),
    confirm_held_out=(
        "Is there {name} in the image? Answer yes or no.",
        "Can {name} be seen here? Answer yes or no.",
    ),
)


def load_questions(path: str | os.PathLike) -> QuestionSet:
    """Questions of a user's own, from a YAML file with the fields of [`QuestionSet`]; the library's for those it lacks.

    A dialogue is a list of its turns, or a mapping of `turns` and `system`.

    Args:
        path (`str` or `os.PathLike`): The file.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no YAML mapping, or its questions cannot be used.
    """
    given: dict[Any, Any] = read_yaml(path, example='naming: ["What is this?"]')
    # YAML takes these words for truth values.
    words: dict[Any, str] = {True: "yes", False: "no"}
    values = {words.get(name, name): value for name, value in given.items()}
    try:
        return QuestionSet.from_dict(DEFAULT_QUESTIONS.to_dict() | values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def questions_of(question: str | None) -> QuestionSet:
    """The library's questions, or those of a user who asks one naming question instead."""
    if question is None:
        return DEFAULT_QUESTIONS
    return QuestionSet(naming=(question,), naming_held_out=(), confirm=(), confirm_held_out=())
