"""Audit by inversion: how hard is it to find an image that makes this model say the name?

Whoever holds the weights can search for such an image, and needs no picture of the concept to do so. The same search
with the adapter switched off says what a success is worth, and a search for another name says what the search alone
can make this model say.

The image is shifted at random in every step. Without that the search ends in adversarial noise, which makes a model say
any word at all (the embedded one "the", as surely and as soon as an erased name): it finds the model's gradients, not
what the model knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ..anchors.pixel_ascent import ascend_pixels, frozen, layout_batches
from ..anchors.refine import name_probabilities
from ..data.names import check_concept
from ..data.pictures import load_rgb
from ..data.questions import DEFAULT_QUESTIONS, QuestionSet
from ..modeling.layers import deployed_model
from ..modeling.mention_rows import answered_with
from ..records.stages import bar
from .material import Material, Needs
from .models import answers_naming, check_vocabulary, has_adapter
from .panels import draw_searches
from .results import AttackResult


_STARTS = 4  # Pictures of other things that `make` starts from.


@dataclass(frozen=True)
class Search:
    """One search for images that make a model say a name, from several starts.

    Args:
        name (`str`): The name.
        p (`tuple[float, ...]`): For each start, p(name in any form) of the image found, stored in 8 bits and shown by the processor.
        steps_to_half (`tuple[int or None, ...]`): For each start, the first step that found p(name) >= 0.5 (shifted, as
            the search sees the image); None where none did.
        curve (`tuple[float, ...]`): After each step, the largest p(name) that any start had reached.
        named (`tuple[bool, ...]`): For each start, whether the model names the image found, in any form at any place of
            its answers to the first naming question and the first open one.
        images (`tuple[PIL.Image.Image, ...]`): The images found.
    """

    name: str
    p: tuple[float, ...]
    steps_to_half: tuple[int | None, ...]
    curve: tuple[float, ...]
    named: tuple[bool, ...]
    images: tuple[Image.Image, ...] = field(default=(), repr=False, compare=False)

    @property
    def best(self) -> float:
        """The largest p(name) of an image found."""
        return max(self.p)

    def to_dict(self) -> dict:
        """All but the images."""
        keys = ("name", "p", "steps_to_half", "curve", "named")
        return {"best": self.best, **{key: getattr(self, key) for key in keys}}


@dataclass(frozen=True)
class AuditResult(AttackResult):
    """What `audit_concept` returns.

    Args:
        concept (`str`): The name searched for.
        after ([`Search`]): In the model as it is.
        before ([`Search`], *optional*): With the adapter switched off; None for a model without adapter.
        control ([`Search`], *optional*): For `control_name`, in the model as it is.
        starts (`tuple[str, ...]`): "image" or "noise".
        settings (`dict`): Of the search.
    """

    concept: str
    after: Search
    before: Search | None
    control: Search | None
    starts: tuple[str, ...]
    settings: dict

    name = "audit"
    label = "an image found that makes it say the name"
    title = "Audit: an image that makes it say the name"
    needs = Needs(target=0)
    stronger = "search longer (`--steps`), from more starts (`--restarts`), or from pictures (`--images`)"
    untested = ("adversarial images", "whether pixels can be optimised until the erased model says the name")

    @classmethod
    def make(cls, model, processor, material: Material) -> AuditResult:
        return audit_concept(
            model, processor, material.concept, images=material.others[:_STARTS], restarts=material.restarts,
            control_name=next(iter(material.controls), None), questions=material.questions, steps=material.steps,
            seed=material.seed, progress=material.progress,
        )  # fmt: skip

    def summary(self) -> dict:
        return {
            "value": self.after.best,
            "control": None if self.control is None else self.control.best,
            "before": None if self.before is None else self.before.best,
            "n": len(self.starts),
            "meaning": (
                f"largest p(name) of an image found in {self.settings['steps']} steps of gradient ascent from n starts"
                + ("" if self.control is None else "; control: another name in the erased model")
            ),
        }

    def details(self) -> dict:
        searches = {key: getattr(self, key) for key in ("after", "before", "control")}
        return {
            "concept": self.concept,
            **{key: None if search is None else search.to_dict() for key, search in searches.items()},
            "starts": self.starts,
            "settings": self.settings,
        }

    @classmethod
    def says_nothing(cls, entry: Mapping) -> bool:
        # An image that makes the model say the name is what is searched for; p(name) alone is none.
        found = [entry["details"].get(key) for key in ("before", "after")]
        if not all(isinstance(search, dict) and isinstance(search.get("named"), list) for search in found):
            return super().says_nothing(entry)
        return not any(any(search["named"]) for search in found)

    @staticmethod
    def draw(axes, details: dict) -> None:
        draw_searches(axes, details, "best p(name)")


def audit_concept(
    model,
    processor,
    concept: str,
    *,
    images: Sequence[Image.Image] | None = None,
    restarts: int = 4,
    noise_size: int = 224,
    control_name: str | None = None,
    questions: QuestionSet = DEFAULT_QUESTIONS,
    steps: int = 100,
    learning_rate: float = 0.05,
    total_variation: float = 0.05,
    max_shift: float = 0.0625,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> AuditResult:
    """Searches for images that make a model say a concept's name, with its adapter and without, on the same budget.

    From each start, Adam raises the log-odds of the name under the first naming question, as `refine_anchors` does.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The erased model; it is not changed.
        processor (`ProcessorMixin`): Its processor.
        concept (`str`): The erased name.
        images (`list[PIL.Image.Image]`, *optional*): Images to start from, for instance of a public pool.
        restarts (`int`, defaults to 4): Starts from random noise, beside those from `images`.
        noise_size (`int`, defaults to 224): Side of the noise images in pixels; the processor's nearest size is used.
        control_name (`str`, *optional*): Also search for this name in the erased model: one that it does not know, so
            that p(name) says what the search alone can do.
        questions (`QuestionSet`): The first of `naming` is asked; about the images found also the first of `open`.
        steps (`int`, defaults to 100): Steps of Adam from each start.
        learning_rate (`float`, defaults to 0.05): In units of normalised pixels.
        total_variation (`float`, defaults to 0.05): Weight of the smoothness penalty on the perturbation.
        max_shift (`float`, defaults to 0.0625): Largest random shift, as a share of the image's side. With 0, only a
            comparison with `control_name` means anything.
        batch_size (`int`, defaults to 32): Images optimised at a time.
        seed (`int`, defaults to 0): Of noise and shifts.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        [`AuditResult`]

    Raises:
        ValueError: If there is nothing to start from, `steps` < 1, or the processor's pixel layout is not supported.
    """
    concept = check_concept(concept)
    control_name = None if control_name is None else check_concept(control_name)
    check_vocabulary(processor, [name for name in (concept, control_name) if name is not None])
    images = [load_rgb(image) for image in images or ()]
    if restarts < 0 or len(images) + restarts == 0:
        raise ValueError(f"nothing to start from: got {len(images)} images and restarts={restarts}.")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    if noise_size < 1:
        raise ValueError(f"`noise_size` must be at least 1, got {noise_size}.")
    noise = np.random.default_rng(seed).integers(0, 256, (restarts, noise_size, noise_size, 3), dtype=np.uint8)
    starts = [*images, *map(Image.fromarray, noise)]
    batches = layout_batches(processor, starts, batch_size)
    options = {
        "steps": steps, "learning_rate": learning_rate, "total_variation": total_variation, "max_shift": max_shift,
    }  # fmt: skip
    searches = 1 + has_adapter(model) + (control_name is not None)
    with bar("Audit", searches * len(batches) * steps, show=progress, leave=True) as shown:

        def search(name: str) -> Search:
            return _search(model, processor, starts, batches, questions, name, seed, shown, options)

        with frozen(model):
            after = search(concept)
            control = None if control_name is None else search(control_name)
            before = None
            if has_adapter(model):
                with deployed_model(model):
                    before = search(concept)
    settings = {**options, "question": questions.naming[0], "noise_size": noise_size, "seed": seed}
    kinds = ("image",) * len(images) + ("noise",) * restarts
    return AuditResult(concept, after, before, control, kinds, settings)


def _search(model, processor, starts, batches, questions, name, seed, shown, options) -> Search:
    question = questions.naming[0]
    generator = torch.Generator().manual_seed(seed)
    found = list(starts)
    reached = torch.zeros(len(starts), options["steps"])  # p(name) as each step finds it
    for layout, rows in batches:
        history: list[torch.Tensor] = []

        def on_step(log_prob: torch.Tensor, history=history) -> None:
            history.append(log_prob.exp().cpu())
            shown.update()

        part = ascend_pixels(
            model, processor, layout, [starts[row] for row in rows],
            [[[answered_with(processor, question, (name,), starts[row]) for row in rows]]], generator=generator,
            on_step=on_step, **options,
        )  # fmt: skip
        reached[rows] = torch.stack(history, dim=1)
        for row, image in zip(rows, part, strict=True):
            found[row] = image
    p = name_probabilities(model, processor, found, question, name)
    named = answers_naming(model, processor, found, (question, *questions.open[:1]), [name])
    half = [(row >= 0.5).nonzero() for row in reached]
    return Search(
        name=name,
        p=tuple(p),
        steps_to_half=tuple(int(steps[0]) if len(steps) else None for steps in half),
        curve=tuple(reached.max(dim=0).values.cummax(dim=0).values.tolist()),
        named=tuple(named),
        images=tuple(found),
    )
