"""Relearning: does the name come back faster than an arbitrary other name could be taught?

A few images and a few steps teach *any* name to a model that still sees. So an accuracy after fine-tuning says nothing
by itself: the same images are taught other names as well, with the same budget, and what counts is the difference. An
erased concept is relearned no faster than a name that never belonged to it; a muted one is.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from ..anchors.refine import name_probabilities
from ..data.names import check_target
from ..data.questions import DEFAULT_QUESTIONS, QuestionSet
from ..modeling.layers import deployed_model
from ..modeling.prompts import build_batch, to_device
from ..modeling.targets import default_target_modules
from ..records.stages import bar
from .material import Material, Needs
from .models import answers_naming, check_controls, has_adapter, merged_copy
from .panels import AFTER, CONTROL
from .results import AttackResult


Weights = Literal["all", "lora", "adapter"]
# With these, ten steps on three images teach a new name to about half of the embedded model's unseen images. Where a
# control reaches 1, a few images have taught the model to say the name to everything, and its curve says nothing.
LEARNING_RATES: dict[str, float] = {"all": 3e-5, "lora": 5e-4, "adapter": 5e-4}


@dataclass(frozen=True)
class RelearningPoint:
    """What a number of images and steps taught, averaged over runs that differ in the images.

    Args:
        images (`int`): Images of the target that a run was fine-tuned on.
        steps (`int`): Optimiser steps.
        relearned (`float`): Share of unseen images that were given the concept's name.
        control (`float`): The same for other names, where those were taught; averaged over the names.
        p_relearned, p_control (`float`): Mean p(name | unseen image), which is less coarse on few images.
        n (`int`): (run, unseen image) pairs behind `relearned`.
        stderr (`float`, *optional*): Standard error of `relearned - control` over runs; None for a single run.
    """

    images: int
    steps: int
    relearned: float
    control: float
    p_relearned: float
    p_control: float
    n: int
    stderr: float | None

    @property
    def excess(self) -> float:
        """How much more of the concept's name is relearned than of a name that is new to the images."""
        return self.relearned - self.control


@dataclass(frozen=True)
class RelearningResult(AttackResult):
    """What `relearning_curve` returns.

    Args:
        concept (`str`): The name that was erased.
        other_names (`tuple[str, ...]`): The names taught as a control.
        points (`tuple[RelearningPoint, ...]`): By number of images, then by steps.
        named_before (`float`, *optional*): Share of the unseen images that are named with the adapter switched off;
            None for a model without adapter.
        weights (`str`): Which weights were fine-tuned.
        learning_rate (`float`): Of AdamW.
        question (`str`): What the model was asked and taught to answer.
        seed (`int`): Of the choice of images and of fresh adapters.
    """

    concept: str
    other_names: tuple[str, ...]
    points: tuple[RelearningPoint, ...]
    named_before: float | None
    weights: str
    learning_rate: float
    question: str
    seed: int

    name = "relearning"
    label = "relearned from a few images"
    title = "Relearning from a few images"
    needs = Needs(target=2, controls=1)
    is_share = True
    untested = ("relearning", "whether fine-tuning on a few images of the concept brings it back")

    def at(self, *, images: int, steps: int) -> RelearningPoint:
        """The point for a number of images and steps.

        Raises:
            KeyError: If it was not measured.
        """
        for point in self.points:
            if (point.images, point.steps) == (images, steps):
                return point
        measured = ", ".join(f"({point.images}, {point.steps})" for point in self.points)
        raise KeyError(f"no point for {images} images and {steps} steps; measured (images, steps): {measured}.")

    @property
    def headline(self) -> RelearningPoint:
        """The point closest to ten steps on three images."""
        return min(self.points, key=lambda point: (abs(point.images - 3), abs(point.steps - 10)))

    @classmethod
    def make(cls, model, processor, material: Material) -> RelearningResult:
        counts = [count for count in (1, 3, 5) if count < len(material.target)]
        return relearning_curve(
            model, processor, material.target, None, material.concept, other_names=material.controls,
            aliases=material.aliases, questions=material.questions, steps=material.relearn_steps, images_per_run=counts,
            repeats=material.repeats, seed=material.seed, progress=material.progress,
        )  # fmt: skip

    def summary(self) -> dict:
        point = self.headline
        return {
            "value": point.relearned,
            "control": point.control,
            "before": self.named_before,
            "n": point.n,
            "meaning": (
                f"unseen images named again after {point.steps} fine-tuning steps on {point.images} images of the "
                "target; control: the same images and steps, other names"
            ),
        }

    def details(self) -> dict:
        content = asdict(self)
        for point, values in zip(self.points, content["points"], strict=True):
            values["excess"] = point.excess
        return content

    @staticmethod
    def draw(axes, details: dict) -> None:
        counts = sorted({point["images"] for point in details["points"]})
        for count, width in zip(counts, np.linspace(1.0, 2.4, len(counts))):
            points = [point for point in details["points"] if point["images"] == count]
            steps = [point["steps"] for point in points]
            plural = "" if count == 1 else "s"
            relearned, control = ([point[key] for point in points] for key in ("relearned", "control"))
            axes.plot(
                steps, relearned, "o-", color=AFTER, linewidth=width, markersize=3, label=f"name, {count} image{plural}"
            )
            axes.plot(
                steps, control, "s--", color=CONTROL, linewidth=width, markersize=3, label=f"other names, {count}"
            )
        axes.set(xlabel="fine-tuning steps", ylabel="unseen images named")


def relearning_curve(
    model,
    processor,
    images: Sequence[Image.Image],
    held_out_images: Sequence[Image.Image] | None,
    concept: str,
    *,
    other_names: Sequence[str],
    aliases: Sequence[str] = (),
    questions: QuestionSet = DEFAULT_QUESTIONS,
    steps: Sequence[int] = (0, 2, 5, 10, 20),
    images_per_run: Sequence[int] = (1, 3, 5),
    weights: Weights = "all",
    learning_rate: float | None = None,
    repeats: int = 3,
    batch_size: int = 64,
    max_new_tokens: int = 24,
    seed: int = 0,
    progress: bool = True,
) -> RelearningResult:
    """Fine-tunes an erased model on a few real images of the target, and asks it about images it has not seen.

    Every run starts from the same erased model and takes full-batch steps of AdamW on "first naming question -> name".
    An image counts as named if its answer to that question or to the first open one says the name, in any form.
    Runs differ in the images: all are left out equally often when `repeats` is a multiple of their number. For each of
    `other_names` the same is done again with that name instead. The caller's model is not changed.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The erased model.
        processor (`ProcessorMixin`): Its processor.
        images (`list[PIL.Image.Image]`): Images of the target to fine-tune on, at least `max(images_per_run)`.
        held_out_images (`list[PIL.Image.Image]` or `None`): Images of the target to ask about; `None` asks each run
            about those of `images` that it was not given, of which there must be one more.
        concept (`str`): The erased name.
        other_names (`list[str]`): Names taught as a control: ones the model knows, of another kind than the target.
            A single one is a matter of luck; take three or more.
        aliases (`list[str]`, *optional*): Further names of the target; an answer with one counts as relearned.
        questions (`QuestionSet`): The first of `naming` is taught and asked, the first of `open` is asked.
        steps (`list[int]`, defaults to `(0, 2, 5, 10, 20)`): After how many steps to ask.
        images_per_run (`list[int]`, defaults to `(1, 3, 5)`): How many images a run is given.
        weights (`str`, defaults to `"all"`): What is fine-tuned: "all" weights of a copy with the adapter merged into
            it (in float32), a fresh "lora" (r = 8, both sides) on such a copy, or the erasing "adapter" itself. Only
            the former two give erasures with different adapters the same chance.
        learning_rate (`float`, *optional*): Of AdamW, constant; by default 3e-5 for "all" and 5e-4 for the others.
            Choose it so that the control is neither 0 nor 1 after the steps that matter.
        repeats (`int`, defaults to 3): Runs for each number of images.
        batch_size (`int`, defaults to 64): Unseen images a forward pass.
        max_new_tokens (`int`, defaults to 24): Longest answer, in tokens.
        seed (`int`, defaults to 0): Of the choice of images and of fresh adapters.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        [`RelearningResult`]

    Raises:
        ValueError: If there are too few images, no other name, one of them names the target, or `weights="adapter"`
            is asked of a model without adapter.
    """
    concept, aliases = check_target(concept, aliases)
    others = check_controls(processor, "other_names", other_names, (concept, *aliases))
    if weights not in LEARNING_RATES:
        raise ValueError(f"`weights` must be one of {tuple(LEARNING_RATES)}, got {weights!r}.")
    learning_rate = LEARNING_RATES[weights] if learning_rate is None else learning_rate
    steps, images_per_run = sorted(set(steps)), sorted(set(images_per_run))
    _check_budget(steps, images_per_run, repeats, learning_rate)
    _check_images(images, held_out_images, images_per_run)
    images, held_out_images = list(images), None if held_out_images is None else list(held_out_images)
    question = questions.naming[0]
    asked = (question, *questions.open[:1])
    known = {name: (name,) for name in others} | {concept: (concept, *aliases)}
    # One row (relearned?, p) a (number of images, run, name, steps).
    rows: dict[tuple[int, int, str, int], tuple[list[bool], list[float]]] = {}
    attacked, trained = _attacked_copy(model, weights, seed)
    asking = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}

    def ask(name: str, unseen: Sequence[Image.Image]) -> tuple[list[bool], list[float]]:
        named = answers_naming(attacked, processor, unseen, asked, known[name], **asking)
        return named, name_probabilities(attacked, processor, unseen, question, known[name], batch_size=batch_size)

    total = len(images_per_run) * repeats * (1 + len(others)) * steps[-1]
    with bar("Relearning", total, show=progress, leave=True) as taught:
        for count, run in itertools.product(images_per_run, range(repeats)):
            chosen = _subsets(len(images), count, repeats, seed)[run]
            unseen = held_out_images or [image for i, image in enumerate(images) if i not in chosen]
            shown = [images[i] for i in chosen]
            for name in (concept, *others):
                batch = build_batch(processor, [question] * count, images=shown, answers=[name] * count)
                with _restored(trained):
                    for step in _fine_tune(attacked, to_device(batch, attacked), trained, steps, learning_rate, taught):
                        rows[count, run, name, step] = ask(name, unseen)
    before_images = held_out_images or images
    named = None
    if has_adapter(model):
        with deployed_model(model):
            named = statistics.fmean(answers_naming(model, processor, before_images, asked, known[concept], **asking))
    points = tuple(_point(rows, count, step, repeats, concept, others) for count in images_per_run for step in steps)
    return RelearningResult(concept, others, points, named, weights, learning_rate, question, seed)


def _check_budget(steps, images_per_run, repeats, learning_rate) -> None:
    if not steps or steps[0] < 0:
        raise ValueError(f"`steps` must be numbers of optimiser steps, 0 or more, got {steps}.")
    if not images_per_run or images_per_run[0] < 1:
        raise ValueError(f"`images_per_run` must be at least 1 each, got {images_per_run}.")
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
    if not learning_rate > 0:
        raise ValueError(f"`learning_rate` must be above 0, got {learning_rate}.")


def _check_images(images, held_out_images, images_per_run) -> None:
    if held_out_images is not None and len(held_out_images) == 0:
        raise ValueError("`held_out_images` is empty; pass None to ask about those of `images` a run was not given.")
    needed = images_per_run[-1] + (held_out_images is None)
    if len(images) < needed:
        raise ValueError(
            f"got {len(images)} images of the target; `images_per_run` up to {images_per_run[-1]} needs {needed}"
            + (" (one must be left to ask about)." if held_out_images is None else ".")
        )


def _subsets(total: int, count: int, repeats: int, seed: int) -> list[tuple[int, ...]]:
    """`repeats` choices of `count` among `total` images: windows that move along a random circle, so that each image
    is chosen equally often."""
    generator = torch.Generator().manual_seed(seed)
    circles = [torch.randperm(total, generator=generator).tolist() for _ in range(math.ceil(repeats / total))]
    return [tuple(circles[run // total][(run + i) % total] for i in range(count)) for run in range(repeats)]


def _attacked_copy(model, weights: str, seed: int) -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    """A copy of the model to fine-tune, and what of it is fine-tuned."""
    if weights == "adapter":
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"`weights='adapter'` goes on training the erasing adapter, and a {type(model).__name__} has none; "
                "use 'all' or 'lora'."
            )
        attacked = copy.deepcopy(model)
        attacked.requires_grad_(False)
        for name, parameter in attacked.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif weights == "lora":
        attacked = merged_copy(model).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(r=8, lora_alpha=16, target_modules=default_target_modules(attacked, "all"))
            attacked = get_peft_model(attacked, config)
    else:
        attacked = merged_copy(model).float().requires_grad_(True)
    # Without dropout: two runs with the same images are the same.
    attacked.eval()
    return attacked, [parameter for parameter in attacked.parameters() if parameter.requires_grad]


@contextmanager
def _restored(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Puts the weights back when the block ends: every run starts from the erased model."""
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def _fine_tune(model, batch, parameters, steps, learning_rate, taught) -> Iterator[int]:
    """Fine-tunes on one batch, and stops at each of `steps` to be asked."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    for step in range(steps[-1] + 1):
        if step in steps:
            yield step
        if step == steps[-1]:
            return
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        taught.update()


def _point(rows, count, step, repeats, concept, others) -> RelearningPoint:
    def shares(name: str, column: int) -> list[float]:
        return [statistics.fmean(rows[count, run, name, step][column]) for run in range(repeats)]

    relearned, p_relearned = shares(concept, 0), shares(concept, 1)
    controls = [[statistics.fmean(run) for run in zip(*(shares(name, k) for name in others))] for k in (0, 1)]
    excess = [target - control for target, control in zip(relearned, controls[0], strict=True)]
    return RelearningPoint(
        images=count,
        steps=step,
        relearned=statistics.fmean(relearned),
        control=statistics.fmean(controls[0]),
        p_relearned=statistics.fmean(p_relearned),
        p_control=statistics.fmean(controls[1]),
        n=sum(len(rows[count, run, concept, step][0]) for run in range(repeats)),
        stderr=statistics.stdev(excess) / math.sqrt(repeats) if repeats > 1 else None,
    )
