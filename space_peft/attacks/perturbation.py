"""Perturbed images: is the concept forgotten in its pictures only, or in what is done to them as well?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageOps

from ..data.names import check_aliases, check_target, mentions
from ..data.pictures import load_rgb
from ..data.questions import DEFAULT_QUESTIONS, QuestionSet
from ..figures.style import BEFORE
from ..modeling.layers import deployed_model
from ..modeling.prompts import generate_answers
from .material import Material, Needs
from .models import has_adapter
from .panels import AFTER, draw_groups
from .results import AttackResult


def add_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise with a standard deviation of a tenth of the range."""
    values = np.asarray(image, dtype=np.float32)
    return Image.fromarray((values + rng.normal(0, 25.5, values.shape)).round().clip(0, 255).astype(np.uint8))


def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A window of four fifths of either side, at random."""
    width, height = (max(1, round(0.8 * side)) for side in image.size)
    left, top = (int(rng.integers(0, side - kept + 1)) for side, kept in zip(image.size, (width, height)))
    return image.crop((left, top, left + width, top + height))


def flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Left and right exchanged."""
    return ImageOps.mirror(image)


def turn(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turned by up to 20 degrees to either side, on white."""
    return image.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BICUBIC, fillcolor="white")


def grey(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Without colour."""
    return image.convert("L").convert("RGB")


PERTURBATIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "noise": add_noise,
    "crop": crop,
    "flip": flip,
    "turn": turn,
    "grey": grey,
}
"""Changes of a picture by name: functions of an RGB image and a random generator."""


@dataclass(frozen=True)
class PerturbationResult(AttackResult):
    """What `perturbation_attack` returns.

    Args:
        concept (`str`): The target.
        named (`dict[str, float]`): By perturbation, "none" first, the share of perturbed images that are named.
        named_before (`dict[str, float]`, *optional*): With the adapter switched off; None for a model without adapter.
        n (`int`): Images under each perturbation, repeats included.
        seed (`int`): Of the perturbations.
    """

    concept: str
    named: dict[str, float]
    named_before: dict[str, float] | None
    n: int
    seed: int

    name = "perturbation"
    label = "named under perturbations"
    title = "Perturbed images"
    needs = Needs()
    is_share = True
    untested = ("changed images", "the concept under noise, crops, flips")

    @property
    def worst(self) -> str:
        """The perturbation under which the target is named most."""
        return max((kind for kind in self.named if kind != "none"), key=self.named.__getitem__)

    @classmethod
    def make(cls, model, processor, material: Material) -> PerturbationResult:
        return perturbation_attack(
            model, processor, material.target, material.concept, aliases=material.aliases,
            other_names=material.images.other_names, questions=material.questions, repeats=material.repeats,
            seed=material.seed, progress=material.progress,
        )  # fmt: skip

    def summary(self) -> dict:
        return {
            "value": self.named[self.worst],
            "control": self.named["none"],
            "before": None if self.named_before is None else self.named_before[self.worst],
            "n": self.n,
            "meaning": f"images of the target named under {self.worst}, the worst perturbation; control: as they are",
        }

    def details(self) -> dict:
        return asdict(self)

    @staticmethod
    def draw(axes, details: dict) -> None:
        kinds = list(details["named"])
        series = [("after", AFTER, [details["named"][kind] for kind in kinds])]
        if details["named_before"] is not None:
            series.insert(0, ("before", BEFORE, [details["named_before"][kind] for kind in kinds]))
        draw_groups(axes, kinds, series)
        axes.set(ylabel="target named")


def perturbation_attack(
    model,
    processor,
    images: Sequence[Image.Image],
    concept: str,
    *,
    aliases: Sequence[str] = (),
    other_names: Sequence[str] = (),
    questions: QuestionSet = DEFAULT_QUESTIONS,
    perturbations: Mapping[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = PERTURBATIONS,
    repeats: int = 3,
    batch_size: int = 64,
    max_new_tokens: int = 12,
    seed: int = 0,
    progress: bool = True,
) -> PerturbationResult:
    """Asks about images of the target under noise, crops, flips, turns and without colour.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The erased model.
        processor (`ProcessorMixin`): Its processor.
        images (`list[PIL.Image.Image]`): Images of the target.
        concept (`str`): The erased name.
        aliases (`list[str]`, *optional*): Further names of the target; an answer with one names it.
        other_names (`list[str]`, *optional*): Names of other concepts, so that "hot dog" is not taken to name "dog".
        questions (`QuestionSet`): The first of `naming` is asked.
        perturbations (`dict[str, Callable]`, *optional*): Functions of an RGB image and a `numpy.random.Generator`.
        repeats (`int`, defaults to 3): Draws of each perturbation for each image.
        batch_size (`int`, defaults to 64): Questions a forward pass.
        max_new_tokens (`int`, defaults to 12): Longest answer, in tokens.
        seed (`int`, defaults to 0): Of the perturbations.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        [`PerturbationResult`]

    Raises:
        ValueError: If there are no images or no perturbations.
    """
    concept, aliases = check_target(concept, aliases)
    other_names = check_aliases(other_names, what="other_names")
    if not images or not perturbations or repeats < 1:
        raise ValueError(
            f"got {len(images)} images, {len(perturbations)} perturbations and repeats={repeats}; at least one of each "
            "is needed."
        )
    clean = [load_rgb(image) for image in images]
    rng = np.random.default_rng(seed)
    shown = {"none": clean}
    for kind, perturb in perturbations.items():
        shown[kind] = [perturb(image, rng) for _ in range(repeats) for image in clean]

    def named(model) -> dict[str, float]:
        answers = generate_answers(
            model, processor, [questions.naming[0]] * sum(map(len, shown.values())),
            images=[image for kind in shown.values() for image in kind],
            batch_size=batch_size, max_new_tokens=max_new_tokens, desc="Perturbation" if progress else None,
        )  # fmt: skip
        hits = iter([mentions(answer, (concept, *aliases), other_names) for answer in answers])
        return {kind: statistics.fmean(next(hits) for _ in part) for kind, part in shown.items()}

    after, before = named(model), None
    if has_adapter(model):
        with deployed_model(model):
            before = named(model)
    return PerturbationResult(concept, after, before, repeats * len(clean), seed)
