"""Is an erasure in force on a server? Asked from outside, as its users ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from PIL import Image

from ..data.names import check_aliases, check_concept, mentions
from ..data.pictures import load_rgb
from ..data.questions import DEFAULT_QUESTIONS, QuestionSet
from ..data.seed_images import pixel_hash, seed_image
from ..evaluation.endpoint import Endpoint, EndpointError
from ..evaluation.metrics import confirms, is_fluent, normalize_answer
from ..evaluation.probes import OPEN_TOKENS
from ..records.stages import bar
from ..statistics.intervals import exact_interval
from .check import Canary
from .items import MAX_TOKENS


GROUPS = ("naming", "naming_held_out", "open_held_out")
# Counted apart: some models say yes to anything.
CONFIRM = "confirm_held_out"
SHORT_TOKENS = 12
# An erasure that is in force may still name the concept now and then, above all in sentences.
MOST_NAMED = 0.1
# Longest side of a picture that is sent: servers make it smaller themselves, and some take no larger requests.
_LONGEST_SIDE = 1536
AS_ERASED, AS_BEFORE, OTHERWISE = "as erased", "as without the adapter", "otherwise"


@dataclass(frozen=True)
class ServedAnswer:
    """
    One answer about a picture of the concept.

    Args:
        group (`str`): Of [`QuestionSet`]: "naming", "naming_held_out", "open_held_out" or "confirm_held_out".
        question (`str`): What was asked.
        image (`int`): Which picture.
        answer (`str`): What was answered.
        named (`bool`): Whether that names the concept; to a yes/no question, whether it says yes.
    """

    group: str
    question: str
    image: int
    answer: str
    named: bool


@dataclass(frozen=True)
class ServedCanary:
    """
    One of the canary's questions whose answer tells whether the adapter is there.

    Args:
        question (`str`): What was asked.
        answer (`str`): What was answered.
        erased (`str`): What the erased model answered when the canary was made.
        deployed (`str`): What it answered without the adapter.
        outcome (`str`): Which of them it is.
    """

    question: str
    answer: str
    erased: str
    deployed: str
    outcome: str


@dataclass(frozen=True)
class ServedResult:
    """
    What a server's answers say.

    Args:
        concept (`str`): The name asked for.
        asked (`str`): The model that was asked, by the server's name.
        answered (`str`, *optional*): The model that the server says has answered.
        answers (`tuple[ServedAnswer, ...]`): About pictures of the concept.
        canary (`tuple[ServedCanary, ...]`): The canary's answers that tell whether the adapter is there.
        shown (`bool`, *optional*): Whether a picture makes the prompt longer; `None` if the server does not say.
        most (`float`): Largest share of answers that may name the concept.
        confirmed (`tuple[ServedAnswer, ...]`): To yes/no questions about the same pictures; no part of the verdict.
    """

    concept: str
    asked: str
    answered: str | None
    answers: tuple[ServedAnswer, ...]
    canary: tuple[ServedCanary, ...]
    shown: bool | None
    most: float = MOST_NAMED
    confirmed: tuple[ServedAnswer, ...] = ()

    @property
    def named(self) -> int:
        """Answers that name the concept."""
        return sum(answer.named for answer in self.answers)

    @property
    def images(self) -> tuple[int, int]:
        """Pictures that are named in any answer, and all pictures."""
        return len({answer.image for answer in self.answers if answer.named}), len({a.image for a in self.answers})

    @property
    def sensible(self) -> int:
        """Answers that read as language."""
        return sum(is_fluent(answer.answer) for answer in self.answers)

    def of_canary(self, outcome: str) -> int:
        """How many of the canary's answers are "as erased", "as without the adapter" or "otherwise"."""
        return sum(item.outcome == outcome for item in self.canary)

    @property
    def in_force(self) -> bool:
        """Whether the concept is named in few enough answers, and none of the canary's is as without the adapter."""
        return self.named <= self.most * len(self.answers) and not self.of_canary(AS_BEFORE)

    def verdict(self) -> str:
        """The result in a sentence or three."""
        if self.in_force:
            return "in force"
        found = []
        if self.named > self.most * len(self.answers):
            found.append(f"the model names it in {self.named} of {len(self.answers)} answers")
        if self.of_canary(AS_BEFORE):
            found.append(
                f"{self.of_canary(AS_BEFORE)} of {len(self.canary)} of the canary's questions are answered as without the adapter"
            )
        return (
            f"not in force: {', and '.join(found)}. Possible causes: the adapter is not loaded (or the request went to the "
            "base model by its name), or it is applied in part: servers skip adapters of a vision tower, or layers whose "
            "names they do not match, without an error. Merge it (`space-peft merge`) and serve the result, or see the "
            "server's log. Or the erasure itself does not hold: see its report.md, or ask the model without a server "
            "(`space-peft evaluate`)."
        )

    def to_dict(self) -> dict:
        """Everything, for JSON."""
        groups = {}
        for group in GROUPS:
            own = [answer for answer in self.answers if answer.group == group]
            if own:
                groups[group] = _counts(sum(answer.named for answer in own), len(own))
        return {
            "concept": self.concept,
            "in_force": self.in_force,
            "verdict": self.verdict(),
            "asked_model": self.asked,
            "answered_by": self.answered,
            "most": self.most,
            "named": _counts(self.named, len(self.answers)),
            "named_images": _counts(*self.images),
            "groups": groups,
            "confirmed": _counts(sum(a.named for a in self.confirmed), len(self.confirmed)) if self.confirmed else None,
            "sensible": self.sensible,
            "pictures_reach_the_model": self.shown,
            "canary": {outcome: self.of_canary(outcome) for outcome in (AS_ERASED, AS_BEFORE, OTHERWISE)},
            "answers": [asdict(answer) for answer in (*self.answers, *self.confirmed)],
            "canary_answers": [asdict(item) for item in self.canary],
        }

    def to_table(self) -> str:
        """The shares with exact 95 % intervals, for reading."""
        content = self.to_dict()
        lines = [f"{'answers that name it':<24}{'named':>7}{'of':>6}   95 % interval"]
        rows = {**content["groups"], "all": content["named"], "pictures, in any answer": content["named_images"]}
        for name, row in rows.items():
            low, high = row["interval"]
            lines.append(f"{name.replace('_', ' '):<24}{row['named']:>7}{row['n']:>6}   {low:.2f} to {high:.2f}")
        if self.confirmed:
            yes = content["confirmed"]
            lines.append(
                f"asked whether it is one, the model says yes to {yes['named']} of {yes['n']} (no part of the verdict)"
            )
        if self.canary:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in content["canary"].items())
            lines.append(f"canary: of {len(self.canary)} questions {counts}")
        return "\n".join(lines)


def _counts(named: int, n: int) -> dict:
    return {"named": named, "n": n, "interval": list(exact_interval(named, n))}


def probe_served(
    endpoint: Endpoint,
    concept: str,
    images: Sequence[Image.Image],
    *,
    aliases: Sequence[str] = (),
    questions: QuestionSet = DEFAULT_QUESTIONS,
    canary: Canary | None = None,
    most: float = MOST_NAMED,
    progress: bool = True,
) -> ServedResult:
    """Asks a served model about pictures of a concept, and the canary's questions if there are any.

    It says whether the concept is named, not why not: a model that never knew it passes as well.

    Args:
        endpoint ([`Endpoint`]): The server.
        concept (`str`): The erased name.
        images (`list[PIL.Image.Image]`): Pictures of it; longer than 1536 pixels, they are made smaller.
        aliases (`list[str]`, *optional*): Other names of it.
        questions ([`QuestionSet`], *optional*): `naming`, `naming_held_out`, `open_held_out` and `confirm_held_out` are asked.
        canary ([`Canary`], *optional*): Stored with the adapter.
        most (`float`, defaults to 0.1): Share of answers that may name it.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Raises:
        EndpointError: If the server cannot be asked, most of its answers are no language, or pictures do not reach the model.
        ValueError: If there is no picture, or the name is none.
    """
    concept = check_concept(concept)
    names = (concept, *check_aliases(aliases, concept=concept))
    if not images:
        raise ValueError("there is no picture of the concept to ask about; give one at least.")
    if not 0 <= most < 1:
        raise ValueError(f"`most` is {most}; expected a share in [0, 1).")
    images = [_smaller(load_rgb(image)) for image in images]
    asked = [(group, question) for group in GROUPS for question in getattr(questions, group)]
    asked += [(CONFIRM, question.format(name=concept)) for question in questions.confirm_held_out]
    shown = _reaches_model(endpoint, questions.naming[0], images[0])
    items = [] if canary is None else [item for item in canary.items if _tells_by_text(item)]
    answers: list[ServedAnswer] = []
    confirmed: list[ServedAnswer] = []
    answered = None
    with bar("Asking the server", len(images) * len(asked) + len(items), unit="answer", show=progress) as counted:
        for number, image in enumerate(images):
            for group, question in asked:
                tokens = OPEN_TOKENS if group.startswith("open") else SHORT_TOKENS
                reply = endpoint.ask(question, image, max_tokens=tokens)
                answered = reply.model or answered
                confirm = group == CONFIRM
                named = confirms(reply.text, questions.yes) if confirm else mentions(reply.text, names)
                (confirmed if confirm else answers).append(
                    ServedAnswer(group, str(question), number, reply.text.strip(), named)
                )
                counted.update()
        found = []
        for item in items:
            found.append(_ask_canary(endpoint, item))
            counted.update()
    result = ServedResult(
        concept, endpoint.model, answered, tuple(answers), tuple(found), shown, most, confirmed=tuple(confirmed)
    )
    if 2 * result.sensible < len(answers):
        # To say nothing, or garbage, is not to have forgotten.
        garbage = next(answer.answer for answer in answers if not is_fluent(answer.answer))
        raise EndpointError(
            f"of the {len(answers)} answers of {endpoint.model!r} only {result.sensible} read as language; one that does not is "
            f"{garbage!r:.80}: "
            "whether the erasure is in force cannot be said. See whether the server uses the model's chat template, and "
            "switch off reasoning, which may use up all the tokens of an answer."
        )
    return result


def _reaches_model(endpoint: Endpoint, question: str, image: Image.Image) -> bool | None:
    """Whether a picture makes the prompt longer. Some servers leave out what a model they take for a text model cannot read,
    and of a picture that it does not see a model names nothing."""
    with_picture = endpoint.ask(question, image, max_tokens=1).prompt_tokens
    if with_picture is None:
        return None
    without = endpoint.ask(question, max_tokens=1).prompt_tokens
    if without is None:
        return None
    if with_picture <= without:
        raise EndpointError(
            f"a prompt with a picture is {with_picture} tokens long for {endpoint.model!r}, and without it {without}: pictures "
            "do not reach the model, so it cannot name what they show. Serve it as a model that takes pictures (with its "
            "processor)."
        )
    return True


def _smaller(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return image


def _tells_by_text(item) -> bool:
    return normalize_answer(item.erased.text) != normalize_answer(item.deployed.text)


def _ask_canary(endpoint: Endpoint, item) -> ServedCanary:
    image = seed_image(item.seed, item.width, item.height) if item.kind == "seed" else item.image
    if pixel_hash(image) != item.image_sha256:
        raise ValueError(
            f"the canary's image {item.file or f'of seed {item.seed}'} is not the one recorded: download the adapter again."
        )
    said = endpoint.ask(item.question, image, max_tokens=MAX_TOKENS).text
    erased, deployed, now = map(normalize_answer, (item.erased.text, item.deployed.text, said))
    outcome = AS_ERASED if now == erased else AS_BEFORE if now == deployed else OTHERWISE
    return ServedCanary(item.question, said.strip(), item.erased.text, item.deployed.text, outcome)
