"""Stage 2: teach the language model to answer, vision tower frozen.

The projector's inputs are computed once for many augmentations of every image, so a step costs the language model only.
"""

from __future__ import annotations

import random
import time

import torch
import torch.nn.functional as F
from augment import augment
from build import IMAGE_SIZE
from drawings import Drawings
from matching import start_matching
from packing import Segment, SegmentMaker, answer_logits, hidden_states, pack
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from warm_start import bag_of_words, build_optimizer, cosine_schedule, image_features

from space_peft.demo.questions import (
    DEMO_QUESTIONS,
    KIND_QUESTIONS,
    NO,
    TEXT_CONFIRM_QUESTIONS,
    TEXT_KIND_QUESTIONS,
    YES,
)


# The order of the questions, not their split, decides the sampling: keep it to get the same weights again.
NAMING = DEMO_QUESTIONS.naming + DEMO_QUESTIONS.naming_held_out
CONFIRM = DEMO_QUESTIONS.confirm + DEMO_QUESTIONS.confirm_held_out
LABEL_SMOOTHING = 0.02
SIBLING_SHARE = 0.5
TEXT_WEIGHT = 0.3
# A throw-away head reads yes or no from the name asked about onwards: comparing the name with the image is then one step
# away from a loss, while at the end of the prompt it would have to be found and carried there at once.
EARLY_WEIGHT = 0.5


class QuestionSampler:
    """Random questions with answers about concepts, balanced between yes and no.

    Args:
        drawings (`Drawings`): Names and kinds.
        maker (`SegmentMaker`): Makes segments of texts.
        seed (`int`): Seed.
    """

    def __init__(self, drawings: Drawings, maker: SegmentMaker, seed: int):
        self.names, self.kinds, self.maker = drawings.names, drawings.kinds, maker
        self.all_kinds = sorted(set(self.kinds))
        self.random = random.Random(seed)
        n = len(self.names)
        self.siblings = [[j for j in range(n) if j != i and self.kinds[j] == self.kinds[i]] for i in range(n)]
        self.others = [[j for j in range(n) if self.kinds[j] != self.kinds[i]] for i in range(n)]

    def about_image(self, concept: int, n_naming: int, n_kind: int, n_pairs: int) -> list[Segment]:
        """`n_naming` naming and `n_kind` kind questions, and `n_pairs` pairs of a yes and a no question."""
        choice, name = self.random.choice, self.names[concept]
        rows = [(choice(NAMING), name) for _ in range(n_naming)]
        rows += [(choice(KIND_QUESTIONS), self.kinds[concept]) for _ in range(n_kind)]
        for _ in range(n_pairs):
            pool = self.siblings if self.random.random() < SIBLING_SHARE else self.others
            wrong = self.names[choice(pool[concept])]
            rows.append((choice(CONFIRM).format(name=name), YES, name))
            rows.append((choice(CONFIRM).format(name=wrong), NO, wrong))
        return [self.maker(*row) for row in rows]

    def about_names(self, n: int) -> list[Segment]:
        """`n` times: a kind question and a pair of a yes and a no question, about random names, without image."""
        choice, rows = self.random.choice, []
        for _ in range(n):
            concept = self.random.randrange(len(self.names))
            name, kind = self.names[concept], self.kinds[concept]
            wrong = choice([k for k in self.all_kinds if k != kind])
            rows.append((choice(TEXT_KIND_QUESTIONS).format(name=name), kind))
            rows.append((choice(TEXT_CONFIRM_QUESTIONS).format(name=name, kind=kind), YES))
            rows.append((choice(TEXT_CONFIRM_QUESTIONS).format(name=name, kind=wrong), NO))
        return [self.maker(*row) for row in rows]


@torch.no_grad()
def feature_bank(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    drawings: Drawings,
    rows: list[int],
    *,
    copies: int,
    seed: int,
    amount: float,
    white: float = 0.9,
) -> torch.Tensor:
    """Projector inputs of every drawing: clean first, then `copies` augmentations, `(1 + copies, n, 64, d)` bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    bank = []
    for copy in range(1 + copies):
        parts = []
        for at in range(0, len(rows), 128):
            part = rows[at : at + 128]
            if copy:
                pixels = augment(drawings.rgba[part], IMAGE_SIZE, generator, amount=amount, white=white) * 2 - 1
            else:
                pixels = processor.image_processor([drawings.white[i] for i in part], return_tensors="pt")[
                    "pixel_values"
                ]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                parts.append(image_features(model, pixels).to(torch.bfloat16))
        bank.append(torch.cat(parts))
    return torch.stack(bank)


def train_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    drawings: Drawings,
    *,
    steps: int,
    seed: int,
    batch_size: int,
    lr: float,
    copies: int,
    clean_share: float,
    amount: float,
    naming_steps: int,
    pairs: int,
    polish_steps: int,
    log_every: int = 100,
    probe=None,
) -> None:
    """Train everything but the vision tower in place.

    Args:
        model (`LlavaForConditionalGeneration`): The warm-started model.
        processor (`LlavaProcessor`): Its processor.
        drawings (`Drawings`): Drawings of the trained styles.
        steps (`int`): Optimiser steps.
        seed (`int`): Seed of sampling and augmentation.
        batch_size (`int`): Images per step.
        lr (`float`): Peak learning rate.
        copies (`int`): Augmentations kept of each image.
        clean_share (`float`): Share of images shown unchanged.
        amount (`float`): Strength of the augmentation.
        naming_steps (`int`): First steps without yes/no questions: comparing with a name needs the name first.
        pairs (`int`): Yes/no pairs per image afterwards.
        polish_steps (`int`): Last steps, on unchanged images only.
        log_every (`int`): Steps between two log lines.
        probe (callable, *optional*): Called with the step at every log line; what it returns is logged.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    torch.manual_seed(seed + 1)
    rows = (drawings.concept < len(drawings.names)).nonzero()[:, 0].tolist()
    started = time.perf_counter()
    bank = feature_bank(model, processor, drawings, rows, copies=copies, seed=seed + 2, amount=amount)
    print(f"feature bank {tuple(bank.shape)} in {time.perf_counter() - started:.0f} s", flush=True)
    start_matching(model, bag_of_words(processor, drawings.names))
    concept = drawings.concept[rows]
    sampler = QuestionSampler(drawings, SegmentMaker(processor), seed + 3)
    model.model.vision_tower.requires_grad_(False)
    early_head = nn.Linear(model.config.text_config.hidden_size, len(processor.tokenizer))
    nn.init.zeros_(early_head.weight)
    parameters = [*(p for p in model.parameters() if p.requires_grad), *early_head.parameters()]
    optimizer = build_optimizer(parameters, lr)
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_schedule(step + 1, steps)
        picked = torch.randint(len(rows), (batch_size,), generator=generator)
        copy = torch.randint(1, 1 + copies, (batch_size,), generator=generator)
        clean = torch.rand(batch_size, generator=generator) < clean_share
        if step >= steps - polish_steps:
            clean[:] = True
        features = bank[copy.masked_fill(clean, 0), picked]
        naming = step < naming_steps
        asked = [
            sampler.about_image(c, 4 if naming else 2, 1, 0 if naming else pairs) for c in concept[picked].tolist()
        ]
        spoken = [sampler.about_names(4) for _ in range(4)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            packed = pack(asked, processor, image=True)
            hidden = hidden_states(model, packed, features)
            known = packed.early != -100
            logits, target = model.lm_head(hidden[packed.target != -100]), packed.target[packed.target != -100]
            early_logits = early_head(hidden[known])
            text_logits, text_target = answer_logits(model, pack(spoken, processor, image=False))
        loss = F.cross_entropy(logits.float(), target, label_smoothing=LABEL_SMOOTHING)
        text_loss = F.cross_entropy(text_logits.float(), text_target, label_smoothing=LABEL_SMOOTHING)
        total = loss + TEXT_WEIGHT * text_loss
        if known.any():
            early_loss = F.cross_entropy(early_logits.float(), packed.early[known])
            total = total + EARLY_WEIGHT * early_loss
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % log_every == 0:
            seconds = time.perf_counter() - started
            note = probe(step + 1) if probe else ""
            print(
                f"language {step + 1}/{steps} {seconds:.0f} s loss {loss.item():.3f} {text_loss.item():.3f} early {early_loss.item() if known.any() else 0:.3f} {note}",
                flush=True,
            )
    model.model.vision_tower.requires_grad_(True)
    model.eval()
