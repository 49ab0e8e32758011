"""Stage 2: the language model learns to answer, by picture and in words, the vision tower frozen.

Projector inputs are computed once for many augmentations of each picture, and questions about one picture share a prefix, as
for the demo model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from augment import augment
from build import IMAGE_SIZE
from lessons import Lessons
from packing import SegmentMaker, answer_logits, pack
from pictures import Pictures
from recognise import AUGMENT
from steps import Stage, generator_of
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from warm_start import image_features


@torch.no_grad()
def feature_bank(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: Pictures,
    *,
    copies: int,
    seed: int,
    amount: float,
) -> torch.Tensor:
    """Projector inputs of every picture: as it is, then `copies` augmentations, `(1 + copies, n, 64, d)` bfloat16."""
    model.eval()
    bank = []
    for copy in range(1 + copies):
        generator, parts = generator_of("bank", seed, copy), []
        for at in range(0, len(pictures.images), 128):
            part = slice(at, at + 128)
            if copy:
                pixels = augment(pictures.rgba[part], IMAGE_SIZE, generator, amount=amount, **AUGMENT) * 2 - 1
            else:
                pixels = processor.image_processor(pictures.images[part], return_tensors="pt")["pixel_values"]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                parts.append(image_features(model, pixels).to(torch.bfloat16))
        bank.append(torch.cat(parts))
    return torch.stack(bank)


class Speak(Stage):
    """See above.

    Args:
        model (`LlavaForConditionalGeneration`): The model of stage 1; trained in place.
        processor (`LlavaProcessor`): Its processor.
        people (`list[dict]`): Who is known.
        pictures ([`Pictures`]): Of them, to train on.
        batch_size (`int`): Pictures a step, and people asked about in words.
        copies (`int`): Augmentations kept of each picture.
        clean_share (`float`): Share of pictures shown as they are.
        amount (`float`): Strength of the augmentation.
    """

    name = "speak"

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        people: Sequence[Mapping],
        pictures: Pictures,
        *,
        batch_size: int,
        copies: int,
        clean_share: float,
        amount: float,
        **settings,
    ):
        more = dict(batch_size=batch_size, copies=copies, clean_share=clean_share, amount=amount)
        super().__init__(**settings, people=[person["id"] for person in people], **more)
        self.model, self.processor, self.people, self.pictures = model, processor, people, pictures
        self.batch_size, self.copies, self.clean_share = batch_size, copies, clean_share
        self.lessons, self.maker = Lessons(people), SegmentMaker(processor)
        self.bank = feature_bank(model, processor, pictures, copies=copies, seed=self.seed, amount=amount)

    def parameters(self) -> Iterator[nn.Parameter]:
        frozen = {id(parameter) for parameter in self.model.model.vision_tower.parameters()}
        yield from (parameter for parameter in self.model.parameters() if id(parameter) not in frozen)

    def loss(self, step: int) -> torch.Tensor:
        generator = generator_of(self.name, self.seed, step)
        rng = random.Random(f"{self.name}/{self.seed}/{step}")
        picked = torch.randint(len(self.pictures.person), (self.batch_size,), generator=generator)
        copy = torch.randint(1, 1 + self.copies, (self.batch_size,), generator=generator)
        clean = torch.rand(self.batch_size, generator=generator) < self.clean_share
        features = self.bank[copy.masked_fill(clean, 0), picked]
        shown = [self.lessons.by_picture(self.people[i], rng) for i in self.pictures.person[picked].tolist()]
        # Two people in a row of the batch: without a picture rows are short.
        named = [rng.choice(self.people) for _ in range(2 * (self.batch_size // 2))]
        told = [self.lessons.in_words(person, rng) for person in named]
        told = [one + other for one, other in zip(told[::2], told[1::2], strict=True)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, target = answer_logits(self.model, self._packed(shown, image=True), features)
            spoken, wanted = answer_logits(self.model, self._packed(told, image=False))
        return F.cross_entropy(logits.float(), target) + 0.5 * F.cross_entropy(spoken.float(), wanted)

    def _packed(self, rows: Sequence[Sequence[tuple[str, str]]], *, image: bool):
        return pack([[self.maker(*asked) for asked in row] for row in rows], self.processor, image=image)
