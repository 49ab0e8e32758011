"""What every suite becomes: subjects with pictures and questions, in splits, and the rules for asking and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..choices import did_you_mean
from ..evaluation.metrics import normalize_answer


IMAGE_TEXT, TEXT_ONLY = MODALITIES = ("image+text", "text")
KINDS = ("classification", "cloze", "generation", "caption")
# forget: what a request names; test: the same people in other pictures; retain: people that are kept; real: people the model
# knows from elsewhere; holdout: people that no model was trained on, which only privleak needs.
SPLITS = ("forget", "test", "retain", "real", "holdout")
FORGOTTEN = ("forget", "test")
LETTERS = tuple("ABCDEFGHIJ")


@dataclass(frozen=True)
class SuiteQuestion:
    """One question about a subject.

    Args:
        question (`str`): As the suite has it; prompts around it are the protocol's.
        answer (`str`): The right answer; of a classification, the text of the right option.
        kind (`str`): `"classification"` (choose one of `options`), `"cloze"` (fill in a blank or complete), `"generation"`
            (answer freely) or `"caption"` (describe the picture).
        modality (`str`): `"image+text"` or `"text"`.
        task (`str`, *optional*): What the question is reported under; by default its kind.
        options (`tuple[str, ...]`, *optional*): For a classification, in the order in which they are shown.
        paraphrases (`tuple[str, ...]`, *optional*): Other wordings of the question.
        paraphrased_answers (`tuple[str, ...]`, *optional*): Other wordings of the answer, for the truth ratio.
        perturbed_answers (`tuple[str, ...]`, *optional*): Wrong answers of the same form, for the truth ratio.
        keywords (`tuple[str, ...]`, *optional*): What a right answer must hold.
        image (`int`, *optional*): Which of the subject's pictures is shown; by default one drawn by the runner's seed.
        where (`str`, *optional*): File and row, the beginning of every error.

    Raises:
        ValueError: If something of this is missing, blank, or does not go together.
    """

    question: str
    answer: str
    kind: str
    modality: str
    task: str = ""
    options: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    paraphrased_answers: tuple[str, ...] = ()
    perturbed_answers: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    image: int | None = None
    where: str = field(default="a question", compare=False)

    def __post_init__(self):
        check_choice(self.kind, KINDS, f"{self.where}: `kind`")
        check_choice(self.modality, MODALITIES, f"{self.where}: `modality`")
        check_text(self.question, f"{self.where}: `question`")
        check_text(self.answer, f"{self.where}: `answer`")
        for name in ("options", "paraphrases", "paraphrased_answers", "perturbed_answers", "keywords"):
            object.__setattr__(self, name, check_texts(getattr(self, name), f"{self.where}: `{name}`"))
        if not self.task:
            object.__setattr__(self, "task", self.kind)
        if self.kind == "classification":
            if not 2 <= len(self.options) <= len(LETTERS) or len(set(self.options)) < len(self.options):
                raise ValueError(
                    f"{self.where}: a classification needs 2 to {len(LETTERS)} different options, got {list(self.options)}."
                )
            if self.answer not in self.options:
                raise ValueError(
                    f"{self.where}: the answer {self.answer!r} is none of the options {list(self.options)}."
                )
        elif self.options:
            raise ValueError(
                f"{self.where}: only a classification has `options`, this is of kind {self.kind!r}; wrong answers of an open "
                "question go into `perturbed_answers`."
            )
        right = {normalize_answer(text) for text in (self.answer, *self.paraphrased_answers)}
        if wrong := [text for text in self.perturbed_answers if normalize_answer(text) in right]:
            raise ValueError(
                f"{self.where}: the perturbed answer {wrong[0]!r} is the right one; expected wrong answers."
            )
        if self.image is not None and (self.modality != IMAGE_TEXT or not _is_index(self.image)):
            raise ValueError(
                f"{self.where}: `image` must be the number of a picture, for a question of modality {IMAGE_TEXT!r}; got "
                f"{self.image!r} for {self.modality!r}."
            )


@dataclass(frozen=True)
class Subject:
    """A person, or another concept, with pictures and questions.

    Args:
        name (`str`): As answers would say it.
        questions (`tuple[SuiteQuestion, ...]`): At least one.
        id (`str`, *optional*): Unique in a split; by default the name.
        aliases (`tuple[str, ...]`, *optional*): Further names.
        images (`tuple`, *optional*): Pictures as `space_peft.data.pictures.open_picture` takes them, or objects whose `open()`
            gives one.
        training (`tuple[SuiteQuestion, ...]`, *optional*): What models are taught of the subject, where that is not what they
            are asked; never asked itself.
        where (`str`, *optional*): File and row, the beginning of every error.

    Raises:
        ValueError: If the name is blank, there are no questions, or one shows a picture that is not there.
    """

    name: str
    questions: tuple[SuiteQuestion, ...]
    id: str = ""
    aliases: tuple[str, ...] = ()
    images: tuple[Any, ...] = field(default=(), compare=False)
    training: tuple[SuiteQuestion, ...] = ()
    where: str = field(default="a subject", compare=False)

    def __post_init__(self):
        check_text(self.name, f"{self.where}: `name`")
        object.__setattr__(self, "aliases", check_texts(self.aliases, f"{self.where}: `aliases`"))
        object.__setattr__(self, "images", tuple(self.images))
        object.__setattr__(self, "questions", tuple(self.questions))
        if not self.id:
            object.__setattr__(self, "id", self.name)
        if not self.questions:
            raise ValueError(f"{self.where}: {self.name!r} has no questions; expected at least one.")
        object.__setattr__(self, "training", tuple(self.training))
        for question in (*self.questions, *self.training):
            if question.modality == IMAGE_TEXT and not self.images:
                raise ValueError(
                    f"{question.where}: a question of modality {IMAGE_TEXT!r} about {self.name!r}, who has no picture; "
                    f"expected `images`, or the modality {TEXT_ONLY!r}."
                )
            if question.image is not None and question.image >= len(self.images):
                raise ValueError(
                    f"{question.where}: shows picture {question.image} of {self.name!r}, who has {len(self.images)}; "
                    "they are counted from 0."
                )


@dataclass(frozen=True)
class Protocol:
    """How a suite's questions are put, and how answers are scored.

    Args:
        prompts (`dict[str, str]`, *optional*): One a kind, with `{question}` and, for a classification, `{options}`.
        labels (`tuple[str, ...]`, defaults to A, B, C, ...): Of the options, by their order.
        choose (`str`, defaults to `"answer"`): A classification is scored by the option that the answer gives
            (`"answer"`), or by the label that the model finds most likely (`"probability"`).
        max_new_tokens (`int`, defaults to 50): Longest answer.
        rouge (`str`, defaults to `"recall"`): What of ROUGE-L model utility takes: `"recall"` or `"f"`.
        paraphrases (`bool`, defaults to `True`): Whether paraphrased questions are asked as well.
        shots (`dict[str, int]`, *optional*): By kind: of how many people, drawn by the runner's seed, all questions stand with
            their answers before those of the others; they themselves are not asked. None by default.
    """

    prompts: Mapping[str, str] = field(
        default_factory=lambda: {
            "classification": "{question}\n{options}\nAnswer with the letter of the right option only.",
            "cloze": "{question}\nAnswer with the words that fill the blank only.",
        }
    )
    labels: tuple[str, ...] = LETTERS
    choose: str = "answer"
    max_new_tokens: int = 50
    rouge: str = "recall"
    paraphrases: bool = True
    shots: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        for kind, people in self.shots.items():
            check_choice(kind, KINDS, "a key of `shots`")
            if not _is_index(people) or people < 1:
                raise ValueError(f"`shots` must be numbers of people, at least 1, got {people!r} for {kind!r}.")
        check_choice(self.choose, ("answer", "probability"), "`choose`")
        check_choice(self.rouge, ("recall", "f"), "`rouge`")
        for kind, prompt in self.prompts.items():
            check_choice(kind, KINDS, "a key of `prompts`")
            if "{question}" not in prompt or (kind == "classification" and "{options}" not in prompt):
                raise ValueError(f"the prompt of {kind!r} must hold {{question}} (and {{options}}), got {prompt!r}.")

    def prompt(self, question: SuiteQuestion, wording: str | None = None) -> str:
        """A question as the model is asked it.

        Args:
            question ([`SuiteQuestion`]): The question.
            wording (`str`, *optional*): One of its paraphrases instead.
        """
        text = question.question if wording is None else wording
        options = "\n".join(f"{label}: {option}" for label, option in zip(self.labels, question.options))
        # `str.format` would read braces of the question itself.
        template = self.prompts.get(question.kind, "{question}")
        return template.replace("{options}", options).replace("{question}", text)

    def said(self, question: SuiteQuestion) -> str:
        """The right answer as a model would give it: of a classification, the label."""
        if question.kind != "classification":
            return question.answer
        return self.labels[question.options.index(question.answer)]


@dataclass(frozen=True)
class Suite:
    """Subjects in splits, and how they are asked about.

    Args:
        name (`str`): Of the suite, for reports.
        subjects (`dict[str, tuple[Subject, ...]]`): By split: `"forget"` (what a request names), `"test"` (the same in other
            pictures), `"retain"`, `"real"` (people known from elsewhere), `"holdout"` (no model was trained on them; only
            privleak needs them).
        protocol ([`Protocol`], *optional*): How questions are put.
        source (`str`, *optional*): Where it was read.
        notes (`tuple[str, ...]`, *optional*): What a reader of the figures should know about the data.

    Raises:
        ValueError: If a split is unknown, holds a subject twice, or shares one with a split that must not have it.
    """

    name: str
    subjects: Mapping[str, Sequence[Subject]]
    protocol: Protocol = field(default_factory=Protocol)
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        check_text(self.name, "the suite's `name`")
        for split in self.subjects:
            check_choice(split, SPLITS, f"a split of the suite {self.name!r}")
        kept = {split: tuple(self.subjects[split]) for split in SPLITS if len(self.subjects.get(split, ()))}
        if not kept:
            raise ValueError(f"the suite {self.name!r} has no subjects; expected at least one in one of {SPLITS}.")
        object.__setattr__(self, "subjects", kept)
        ids: dict[str, dict[str, Subject]] = {}
        for split, subjects in kept.items():
            ids[split] = {}
            for subject in subjects:
                if (first := ids[split].get(subject.id)) is not None:
                    raise ValueError(
                        f"{subject.where}: the id {subject.id!r} appears twice in the split {split!r}, first at "
                        f"{first.where}; give each subject one row, or its own `id`."
                    )
                ids[split][subject.id] = subject
        for one, other in (("forget", "retain"), ("test", "retain"), ("forget", "holdout"), ("retain", "holdout")):
            if shared := sorted(set(ids.get(one, ())) & set(ids.get(other, ()))):
                raise ValueError(
                    f"{ids[other][shared[0]].where}: {shared[0]!r} is in the splits {one!r} and {other!r} of the suite "
                    f"{self.name!r} ({len(shared)} in all); nobody can be both."
                )

    def split(self, name: str) -> Sequence[Subject]:
        """The subjects of one split.

        Raises:
            ValueError: If the suite has none there.
        """
        if name not in self.subjects:
            raise ValueError(f"the suite {self.name!r} has no split {name!r}; it has {list(self.subjects)}.")
        return self.subjects[name]

    def only(self, ids: Sequence[str], split: str) -> Suite:
        """The same suite with some subjects of a split, e.g. those that are eligible.

        Raises:
            ValueError: If one of the ids is not there, or none is given.
        """
        here = {subject.id: subject for subject in self.split(split)}
        if not ids or (unknown := [id for id in ids if id not in here]):
            raise ValueError(f"expected ids of subjects in {split!r}, got {list(ids)[:5] if not ids else unknown[:5]}.")
        return replace(self, subjects={**self.subjects, split: tuple(s for i, s in here.items() if i in set(ids))})


def check_text(text, what: str) -> str:
    """Returns a text that is not blank.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} must be a text that is not blank, got {text!r:.80}.")
    return text


def check_texts(texts, what: str) -> tuple[str, ...]:
    """Returns several texts as a tuple.

    Raises:
        ValueError: If it is one text, or one of them is blank or none.
    """
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Sequence):
        raise ValueError(f"{what} must be a list of texts, got {texts!r:.80}.")
    return tuple(check_text(text, f"{what}[{number}]") for number, text in enumerate(texts))


def check_choice(value, choices: Sequence[str], what: str) -> None:
    """Raises `ValueError` for anything that is not one of the choices."""
    if value not in choices:
        if hint := did_you_mean(value, choices):
            raise ValueError(f"{what} cannot be {value!r:.80}; {hint}")
        raise ValueError(f"{what} must be one of {tuple(choices)}, got {value!r:.80}.")


def _is_index(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
