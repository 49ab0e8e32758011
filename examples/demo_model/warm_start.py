"""Stage 1: teach the vision tower, the projector and the word embeddings to meet, without the language model.

The mean projected patch must retrieve the mean word embedding of its concept's name. This is what creates the model's
shared feature space. Other emoji take part with an embedding each that is thrown away afterwards: the number of
different drawings is what limits how well the tower reads a style it has never seen.
"""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from augment import augment
from build import IMAGE_SIZE
from drawings import Drawings
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor


TEMPERATURE = 15.0
LABEL_SMOOTHING = 0.05
KIND_WEIGHT = 0.3
WEIGHT_DECAY = 0.05


def bag_of_words(processor: LlavaProcessor, texts: list[str]) -> torch.Tensor:
    """`(len(texts), vocabulary)` matrix that averages the word embeddings of each text."""
    bag = torch.zeros(len(texts), len(processor.tokenizer))
    for row, text in enumerate(texts):
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        for token in ids:
            bag[row, token] += 1 / len(ids)
    return bag


def cosine_schedule(step: int, steps: int) -> float:
    """Linear rise over 5 % of the steps, then half a cosine to zero."""
    progress = step / steps
    return progress / 0.05 if progress < 0.05 else 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


def build_optimizer(parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW whose weight decay spares biases and norms."""
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def image_features(
    model: LlavaForConditionalGeneration,
    pixels: torch.Tensor,
    *,
    drop: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """What the projector reads: last hidden state without the class token.

    Args:
        model (`LlavaForConditionalGeneration`): The model.
        pixels (`torch.Tensor`): Normalised images `(n, 3, 64, 64)`.
        drop (`float`): Share of patches left out, which regularises and saves time.
        generator (`torch.Generator`, *optional*): Chooses the patches.

    Returns:
        `torch.Tensor`: `(n, patches, vision hidden size)`.
    """
    tower = model.model.vision_tower
    hidden = tower.embeddings(pixels)  # (n, 1 + patches, d)
    if drop:
        n, patches = hidden.shape[0], hidden.shape[1] - 1
        kept = torch.rand(n, patches, generator=generator).argsort(1)[:, : int(patches * (1 - drop))] + 1
        kept = kept[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = torch.cat([hidden[:, :1], hidden.gather(1, kept)], 1)
    return tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden)).last_hidden_state[:, 1:]


class DrawingSampler:
    """Draws a concept, then one of its designs, then a drawing of that design.

    The two fluent sets are one design, so they share one design's probability.

    Args:
        drawings (`Drawings`): The drawings.
        other_share (`float`): Probability of another emoji instead of a concept.
    """

    def __init__(self, drawings: Drawings, other_share: float):
        design = ["fluent" if style.startswith("fluent") else style for style in drawings.style]
        concepts = drawings.concept.tolist()
        designs: dict[int, set[str]] = {}
        members: dict[tuple[int, str], int] = {}
        for concept, name in zip(concepts, design, strict=True):
            designs.setdefault(concept, set()).add(name)
            members[concept, name] = members.get((concept, name), 0) + 1
        n_names, n_other = len(drawings.names), drawings.n_other
        self.weights = torch.tensor(
            [
                ((1 - other_share) / n_names if concept < n_names else other_share / n_other)
                / len(designs[concept])
                / members[concept, name]
                for concept, name in zip(concepts, design, strict=True)
            ],
            dtype=torch.float64,
        )

    def __call__(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.multinomial(self.weights, n, replacement=True, generator=generator)


def warm_start(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    drawings: Drawings,
    *,
    steps: int,
    seed: int,
    batch_size: int,
    lr: float,
    amount: float,
    other_share: float,
    drop: float,
    log_every: int = 100,
    probe=None,
) -> None:
    """Train the tower, the projector and the word embeddings in place.

    Args:
        model (`LlavaForConditionalGeneration`): Fresh model.
        processor (`LlavaProcessor`): Its processor.
        drawings (`Drawings`): Drawings of the trained styles.
        steps (`int`): Optimiser steps.
        seed (`int`): Seed of sampling and augmentation.
        batch_size (`int`): Drawings per step.
        lr (`float`): Peak learning rate.
        amount (`float`): Strength of the augmentation.
        other_share (`float`): Share of other emoji in a batch.
        drop (`float`): Share of patches left out in the first 80 % of the steps.
        log_every (`int`): Steps between two log lines.
        probe (callable, *optional*): Called with the step at every log line; what it returns is logged.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sampler = DrawingSampler(drawings, other_share)
    embeddings = model.get_input_embeddings()
    width = embeddings.weight.shape[1]
    kind_names = sorted(set(drawings.kinds))
    name_bag, kind_bag = bag_of_words(processor, drawings.names), bag_of_words(processor, kind_names)
    kind_of = torch.tensor([kind_names.index(kind) for kind in drawings.kinds])
    other = nn.Parameter(torch.randn(drawings.n_other, width) * 0.06)
    kind_head = nn.Linear(width, width)
    parameters = [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
        embeddings.weight,
        *kind_head.parameters(),
        other,
    ]
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = build_optimizer(parameters, lr)
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_schedule(step + 1, steps)
        rows = sampler(batch_size, generator)
        target = drawings.concept[rows]
        pixels = augment(drawings.rgba[rows], IMAGE_SIZE, generator, amount=amount) * 2 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = image_features(model, pixels, drop=drop if step < 0.8 * steps else 0.0, generator=generator)
            pooled = model.model.multi_modal_projector(hidden).mean(1).float()  # (n, width)
        classes = F.normalize(torch.cat([name_bag @ embeddings.weight, other]), dim=-1)
        scores = TEMPERATURE * F.normalize(pooled, dim=-1) @ classes.T
        loss = F.cross_entropy(scores, target, label_smoothing=LABEL_SMOOTHING)
        known = target < len(drawings.names)
        kind_scores = 10 * F.normalize(kind_head(pooled[known]), dim=-1)
        kind_scores = kind_scores @ F.normalize(kind_bag @ embeddings.weight, dim=-1).T
        loss = loss + KIND_WEIGHT * F.cross_entropy(kind_scores, kind_of[target[known]])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % log_every == 0:
            seconds = time.perf_counter() - started
            note = probe(step + 1) if probe else ""
            print(f"warm start {step + 1}/{steps} {seconds:.0f} s loss {loss.item():.3f} {note}", flush=True)


@torch.no_grad()
def retrieval_accuracy(
    model: LlavaForConditionalGeneration, name_bag: torch.Tensor, pixels: torch.Tensor, concept: torch.Tensor
) -> float:
    """Share of images whose mean projected patch is closest to its own name's embedding."""
    model.eval()
    names = F.normalize(name_bag @ model.get_input_embeddings().weight, dim=-1)
    hits = 0
    for part, target in zip(pixels.split(128), concept.split(128), strict=True):
        pooled = model.model.multi_modal_projector(image_features(model, part)).mean(1)
        hits += (F.normalize(pooled, dim=-1) @ names.T).argmax(1).eq(target).sum().item()
    model.train()
    return hits / len(concept)
