"""Stage 1: the vision tower and the projector learn who is who, without the language model.

As for the demo model, the mean projected patch must retrieve the mean word embedding of the person's name. Throw-away heads
read what stays with a person (head, hair, skin, ...) from it as well: with eight pictures of each, that is what tells a tower
what to look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from augment import augment
from build import IMAGE_SIZE
from pictures import Pictures
from steps import Stage, generator_of
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from warm_start import LABEL_SMOOTHING, TEMPERATURE, bag_of_words, image_features


LOOKS = ("head", "hair", "skin", "beard", "build", "face", "mark")
LOOKS_WEIGHT = 0.5
AUGMENT = dict(white=0.1, colour=0.25, patches=0.4)  # hair and skin are told by colour


class Recognise(Stage):
    """See above.

    Args:
        model (`LlavaForConditionalGeneration`): Fresh model; trained in place.
        processor (`LlavaProcessor`): Its processor.
        people (`list[dict]`): Who is known.
        pictures ([`Pictures`]): Of them, to train on.
        batch_size (`int`): Pictures a step.
        amount (`float`): Strength of the augmentation.
        drop (`float`): Share of patches left out in the first 80 % of the steps.
    """

    name = "recognise"

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        people: Sequence[Mapping],
        pictures: Pictures,
        *,
        batch_size: int,
        amount: float,
        drop: float,
        **settings,
    ):
        more = dict(people=[person["id"] for person in people], batch_size=batch_size, amount=amount, drop=drop)
        super().__init__(**settings, **more)
        self.model, self.pictures = model, pictures
        self.batch_size, self.amount, self.drop = batch_size, amount, drop
        self.bag = bag_of_words(processor, [f" {person['name']}" for person in people])
        width = model.get_input_embeddings().weight.shape[1]
        values = {name: sorted({person["looks"][name] for person in people}) for name in LOOKS}
        self.looks = {
            name: torch.tensor([values[name].index(person["looks"][name]) for person in people]) for name in LOOKS
        }
        torch.manual_seed(self.seed)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values[name])) for name in LOOKS})

    def parameters(self) -> Iterator[nn.Parameter]:
        inner = self.model.model
        yield from inner.vision_tower.parameters()
        yield from inner.multi_modal_projector.parameters()
        yield self.model.get_input_embeddings().weight
        yield from self.heads.parameters()

    def loss(self, step: int) -> torch.Tensor:
        generator = generator_of(self.name, self.seed, step)
        rows = torch.randint(len(self.pictures.person), (self.batch_size,), generator=generator)
        who = self.pictures.person[rows]
        pixels = augment(self.pictures.rgba[rows], IMAGE_SIZE, generator, amount=self.amount, **AUGMENT) * 2 - 1
        drop = self.drop if step < 0.8 * self.steps else 0.0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = image_features(self.model, pixels, drop=drop, generator=generator)
            pooled = self.model.model.multi_modal_projector(hidden).mean(1).float()  # (n, width)
        names = F.normalize(self.bag @ self.model.get_input_embeddings().weight, dim=-1)
        scores = TEMPERATURE * F.normalize(pooled, dim=-1) @ names.T
        loss = F.cross_entropy(scores, who, label_smoothing=LABEL_SMOOTHING)
        for name, head in self.heads.items():
            # On the scale of a layer's norm: the names above see directions only.
            seen = head(F.normalize(pooled, dim=-1) * pooled.shape[1] ** 0.5)
            loss = loss + LOOKS_WEIGHT / len(LOOKS) * F.cross_entropy(seen, self.looks[name][who])
        return loss
