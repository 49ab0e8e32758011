"""The questions an erasure is trained with, and the different ones it is tested with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuestionSet:
    """Questions about one image, split into those training may use and those kept for testing.

    An erasure that only silences the one question it was trained on has muted the model, not changed what it knows.
    `generality` is therefore measured on the two `*_held_out` groups alone.

    Args:
        naming (`tuple[str, ...]`): Questions answered by the concept's name; used by refinement and erasure.
        naming_held_out (`tuple[str, ...]`): Paraphrases of them, never used before the evaluation.
        confirm (`tuple[str, ...]`): Yes/no questions with a `{name}` field; used by refinement and erasure.
        confirm_held_out (`tuple[str, ...]`): Paraphrases of them, never used before the evaluation.
        yes (`str`): The answer that confirms.
        no (`str`): The answer that denies.
    """

    naming: tuple[str, ...]
    naming_held_out: tuple[str, ...]
    confirm: tuple[str, ...]
    confirm_held_out: tuple[str, ...]
    yes: str = "Yes"
    no: str = "No"

    def __post_init__(self):
        for group in ("naming", "naming_held_out", "confirm", "confirm_held_out"):
            questions = getattr(self, group)
            if isinstance(questions, str):
                raise TypeError(f"`{group}` must be a tuple of questions, got the single string {questions!r}.")
            if group.startswith("confirm"):
                for question in questions:
                    if "{name}" not in question:
                        raise ValueError(f"every question in `{group}` needs a {{name}} field, got {question!r}.")
        if not self.naming:
            raise ValueError("`naming` is empty: at least one question answered by the concept's name is needed.")
        leaked = (set(self.naming) | set(self.confirm)) & (set(self.naming_held_out) | set(self.confirm_held_out))
        if leaked:
            raise ValueError(
                f"held-out questions must not be used in training, but these are in both: {sorted(leaked)}."
            )


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
