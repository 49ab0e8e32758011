"""All attacks on one erasure, from the same pictures and names. A new attack has a function and a line in `RUNS` here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from PIL import Image

from ..data.questions import DEFAULT_QUESTIONS, QuestionSet
from ..evaluation.named_images import NamedImages, named_probes
from .audit import audit_concept
from .confirmation import confirmation_attack
from .hints import hint_attack
from .linear_probe import linear_probes
from .perturbation import perturbation_attack
from .quantization import quantization_attack
from .relearning import relearning_curve
from .results import AttackResult
from .soft_prompt import soft_prompt_attack


_STARTS = 4  # Pictures of other things that the audit starts from.
_MOST_NAMES = 3  # Controls that are each taught or asked for.


@dataclass(frozen=True)
class Material:
    """
    What attacks are made with.

    Args:
        concept (`str`): The erased name.
        images ([`NamedImages`]): Pictures of it, and of other things.
        aliases (`list[str]`, *optional*): Other names of it.
        control_names (`list[str]`, *optional*): Known names of other things; by default those of the pictures.
        questions (`QuestionSet`): What is asked.
        steps (`int`, defaults to 100): Of searches, from each start.
        restarts (`int`, defaults to 4): Starts of the audit from noise.
        relearn_steps (`list[int]`): After how many steps of fine-tuning the model is asked.
        repeats (`int`, defaults to 3): Runs of what has chance in it.
        seed (`int`, defaults to 0): Of all that has chance in it.
        progress (`bool`, defaults to `True`): Show progress bars.
    """

    concept: str
    images: NamedImages
    aliases: tuple[str, ...] = ()
    control_names: tuple[str, ...] = ()
    questions: QuestionSet = DEFAULT_QUESTIONS
    steps: int = 100
    restarts: int = 4
    relearn_steps: tuple[int, ...] = (0, 2, 5, 10, 20)
    repeats: int = 3
    seed: int = 0
    progress: bool = True

    @property
    def target(self) -> list[Image.Image]:
        """Pictures of the concept."""
        return list(self.images.target)

    @property
    def others(self) -> list[Image.Image]:
        """Pictures of other things."""
        return [image for _, image in self.images.others]

    @property
    def controls(self) -> list[str]:
        """Names of other things."""
        return list(self.control_names or self.images.other_names[:_MOST_NAMES])


def _audit(model, processor, material: Material) -> AttackResult:
    return audit_concept(
        model, processor, material.concept, images=material.others[:_STARTS], restarts=material.restarts,
        control_name=next(iter(material.controls), None), questions=material.questions, steps=material.steps,
        seed=material.seed, progress=material.progress,
    )  # fmt: skip


def _relearning(model, processor, material: Material) -> AttackResult:
    counts = [count for count in (1, 3, 5) if count < len(material.target)]
    return relearning_curve(
        model, processor, material.target, None, material.concept, other_names=material.controls,
        aliases=material.aliases, questions=material.questions, steps=material.relearn_steps, images_per_run=counts,
        repeats=material.repeats, seed=material.seed, progress=material.progress,
    )  # fmt: skip


def _linear_probe(model, processor, material: Material) -> AttackResult:
    return linear_probes(
        model, processor, material.target, material.others, material.concept, questions=material.questions,
        seed=material.seed, progress=material.progress,
    )  # fmt: skip


def _quantization(model, processor, material: Material) -> AttackResult:
    probes = named_probes(material.concept, material.images, questions=material.questions, aliases=material.aliases)
    probes = [probe for probe in probes if probe.name in ("forget", "retain")]
    return quantization_attack(model, processor, probes, progress=material.progress)


def _confirmation(model, processor, material: Material) -> AttackResult:
    return confirmation_attack(
        model, processor, material.target, material.concept, absent_names=material.controls, aliases=material.aliases,
        questions=material.questions,
    )  # fmt: skip


def _perturbation(model, processor, material: Material) -> AttackResult:
    return perturbation_attack(
        model, processor, material.target, material.concept, aliases=material.aliases,
        other_names=material.images.other_names, questions=material.questions, repeats=material.repeats,
        seed=material.seed,
    )  # fmt: skip


def _hints(model, processor, material: Material) -> AttackResult:
    first = {name: image for name, image in reversed(material.images.others)}
    return hint_attack(
        model, processor, material.target, material.concept, others=list(first.items())[:_MOST_NAMES], aliases=material.aliases,
        questions=material.questions,
    )  # fmt: skip


def _soft_prompt(model, processor, material: Material) -> AttackResult:
    return soft_prompt_attack(
        model, processor, material.target, material.concept, control_name=material.controls[0],
        questions=material.questions, steps=material.steps, seed=material.seed, progress=material.progress,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """
    How an attack is made from the common material, and what it cannot do without.

    Args:
        attack (`Callable`): Of a model, its processor and the material; returns an [`AttackResult`].
        target (`int`, defaults to 1): Pictures of the concept.
        others (`int`, defaults to 0): Pictures of other things.
        things (`int`, defaults to 0): Different other things on pictures.
        controls (`int`, defaults to 0): Names of other things.
        asks (`str`, *optional*): Group of questions that must not be empty.
    """

    attack: Callable[..., AttackResult]
    target: int = 1
    others: int = 0
    things: int = 0
    controls: int = 0
    asks: str | None = None

    def lacks(self, material: Material) -> str | None:
        """What is missing, in words; `None` if nothing is."""
        counts = {
            "pictures of the concept": (len(material.target), self.target),
            "pictures of other things": (len(material.others), self.others),
            "different things on other pictures": (len(material.images.other_names), self.things),
            "control names": (len(material.controls), self.controls),
        }
        for what, (given, needed) in counts.items():
            if given < needed:
                return f"which needs {what}: {needed} or more, got {given}"
        if self.asks is not None and not getattr(material.questions, self.asks):
            return f"for which there are no questions of the kind `{self.asks}`"
        return None


RUNS: dict[str, Run] = {
    "audit": Run(_audit, target=0),
    "relearning": Run(_relearning, target=2, controls=1),
    "linear_probe": Run(_linear_probe, target=2, others=2),
    "quantization": Run(_quantization),
    "confirmation": Run(_confirmation, controls=1, asks="confirm"),
    "perturbation": Run(_perturbation),
    "hints": Run(_hints, things=3),
    "soft_prompt": Run(_soft_prompt, target=2, controls=1),
}
"""By the key in `attacks.json`, in the order in which they are made."""


def check_attacks(names: Iterable[str] | None) -> list[str]:
    """Names of attacks; all of them by default.

    Raises:
        ValueError: If there is no such attack.
    """
    names = list(RUNS if names is None else dict.fromkeys(names))
    if unknown := [name for name in names if name not in RUNS]:
        raise ValueError(f"there are no attacks {unknown}; expected some of {list(RUNS)}.")
    return names
