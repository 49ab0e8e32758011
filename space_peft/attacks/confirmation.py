"""Confirmation: does the model still say yes when it is told the name?

A model that answers "what is this?" with another name may still answer "is there a fox in the image?" with yes. What it
says about a concept that is *not* in the image is the control: some models affirm whatever they are asked.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from PIL import Image

from ..anchors.refine import name_probabilities
from ..data.names import check_target
from ..data.questions import DEFAULT_QUESTIONS, QuestionSet
from ..figures.style import BEFORE
from ..modeling.layers import deployed_model
from ..records.stages import bar
from .material import Material, Needs
from .models import check_controls, has_adapter
from .panels import AFTER, draw_groups
from .results import AttackResult


@dataclass(frozen=True)
class ConfirmationResult(AttackResult):
    """What `confirmation_attack` returns.

    Args:
        concept (`str`): The target, which the images show.
        absent_names (`tuple[str, ...]`): Names of what they do not show.
        p_yes (`float`): Mean p(yes) for the target, over images and questions.
        p_yes_absent (`float`): The same for the absent names.
        confirmed, confirmed_absent (`float`): Share of (image, question) where p(yes) > p(no).
        p_yes_before, p_yes_absent_before (`float`, *optional*): With the adapter switched off; None for a model without
            adapter.
        n (`int`): (image, question) pairs behind `p_yes`.
        questions (`tuple[str, ...]`): With a `{name}` field.
    """

    concept: str
    absent_names: tuple[str, ...]
    p_yes: float
    p_yes_absent: float
    confirmed: float
    confirmed_absent: float
    p_yes_before: float | None
    p_yes_absent_before: float | None
    n: int
    questions: tuple[str, ...]

    name = "confirmation"
    label = "confirmed when asked"
    title = "Asked whether it is there"
    needs = Needs(controls=1, asks="confirm")

    @classmethod
    def make(cls, model, processor, material: Material) -> ConfirmationResult:
        return confirmation_attack(
            model, processor, material.target, material.concept, absent_names=material.controls, aliases=material.aliases,
            questions=material.questions, progress=material.progress,
        )  # fmt: skip

    def summary(self) -> dict:
        return {
            "value": self.p_yes,
            "control": self.p_yes_absent,
            "before": self.p_yes_before,
            "n": self.n,
            "meaning": (
                "mean p(yes) when asked whether the target is in images that show it; control: asked for concepts that "
                "are not in them"
            ),
        }

    def details(self) -> dict:
        return asdict(self)

    @staticmethod
    def draw(axes, details: dict) -> None:
        series = [("after", AFTER, [details["p_yes"], details["p_yes_absent"]])]
        if details["p_yes_before"] is not None:
            series.insert(0, ("before", BEFORE, [details["p_yes_before"], details["p_yes_absent_before"]]))
        draw_groups(axes, ["the target", "what is not there"], series)
        axes.set(ylabel="mean p(yes)")


def confirmation_attack(
    model,
    processor,
    images: Sequence[Image.Image],
    concept: str,
    *,
    absent_names: Sequence[str],
    aliases: Sequence[str] = (),
    questions: QuestionSet = DEFAULT_QUESTIONS,
    batch_size: int = 64,
    progress: bool = True,
) -> ConfirmationResult:
    """Asks yes/no questions about images of the target: for the target, and for what is not in them.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The erased model.
        processor (`ProcessorMixin`): Its processor.
        images (`list[PIL.Image.Image]`): Images of the target.
        concept (`str`): The erased name.
        absent_names (`list[str]`): Names the model knows of what is in none of the images; take siblings and others.
        aliases (`list[str]`, *optional*): Further names of the target, which must not be among the absent ones.
        questions (`QuestionSet`): All of `confirm_held_out` and `confirm` are asked.
        batch_size (`int`, defaults to 64): Questions a forward pass.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        [`ConfirmationResult`]

    Raises:
        ValueError: If there are no images, questions or absent names, or one of these names the target.
    """
    concept, aliases = check_target(concept, aliases)
    absent = check_controls(processor, "absent_names", absent_names, (concept, *aliases))
    asked = tuple(dict.fromkeys((*questions.confirm_held_out, *questions.confirm)))
    if not images or not asked:
        raise ValueError(f"got {len(images)} images and {len(asked)} yes/no questions; at least one of each is needed.")

    before = absent_before = None
    total = (1 + len(absent)) * len(asked) * (2 + has_adapter(model))
    with bar("Confirmation", total, unit="question", show=progress) as counted:

        def probabilities(names: Sequence[str], answer: str) -> list[float]:
            found: list[float] = []
            for name, question in itertools.product(names, asked):
                text = question.format(name=name)
                found += name_probabilities(model, processor, images, text, answer, batch_size=batch_size)
                counted.update()
            return found

        yes, no = (probabilities([concept], answer) for answer in (questions.yes, questions.no))
        yes_absent, no_absent = (probabilities(absent, answer) for answer in (questions.yes, questions.no))
        if has_adapter(model):
            with deployed_model(model):
                before = statistics.fmean(probabilities([concept], questions.yes))
                absent_before = statistics.fmean(probabilities(absent, questions.yes))
    return ConfirmationResult(
        concept=concept,
        absent_names=absent,
        p_yes=statistics.fmean(yes),
        p_yes_absent=statistics.fmean(yes_absent),
        confirmed=_share_above(yes, no),
        confirmed_absent=_share_above(yes_absent, no_absent),
        p_yes_before=before,
        p_yes_absent_before=absent_before,
        n=len(yes),
        questions=asked,
    )


def _share_above(yes: Sequence[float], no: Sequence[float]) -> float:
    return statistics.fmean(a > b for a, b in zip(yes, no, strict=True))
