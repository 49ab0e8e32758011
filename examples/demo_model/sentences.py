"""Stage 3: teach the model to answer open questions in sentences, without changing what it answered before.

The vocabulary grows by the words of `templates.py`; the vision tower stays as it is. Each step teaches sentences about
some images and asks old questions about others, whose answers shall stay those of the second stage's model. The images
are those of `images.parquet`, trained styles only, so this stage needs no rendering.
"""

from __future__ import annotations

import copy
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from build import build_processor
from concepts import concept_kinds
from drawings import DRAWING_SIZE, Drawings
from language import QuestionSampler, feature_bank
from packing import Segment, SegmentMaker, answer_logits, pack
from PIL import Image
from templates import FAVOURITE, OPEN_QUESTIONS, name_forms, sentence_texts, sentences
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from warm_start import build_optimizer, cosine_schedule

from space_peft.data.questions import Question
from space_peft.demo import TRAINED_STYLES, load_demo_images


NEW_WORD_STD = 0.03


def shipped_drawings() -> Drawings:
    """The trained styles' images of `images.parquet`, white made transparent: on white they look as they did."""
    kinds = concept_kinds()
    names = list(kinds)
    rows = [row for row in load_demo_images() if row["style"] in TRAINED_STYLES]
    rgba = []
    for row in rows:
        small = row["image"].resize((DRAWING_SIZE,) * 2, Image.LANCZOS)
        rgb = np.asarray(small)
        opaque = 255 - rgb.min(-1, keepdims=True)
        rgba.append(np.concatenate([rgb - (255 - opaque), opaque], -1))
    return Drawings(
        rgba=torch.from_numpy(np.stack(rgba)).permute(0, 3, 1, 2).contiguous(),
        white=[row["image"] for row in rows],
        concept=torch.tensor([names.index(row["name"]) for row in rows]),
        style=[row["style"] for row in rows],
        names=names,
        kinds=list(kinds.values()),
        n_other=0,
    )


@torch.no_grad()
def extend_vocabulary(model: LlavaForConditionalGeneration, old: LlavaProcessor, *, seed: int) -> LlavaProcessor:
    """Add the words of the sentences to the model, in place.

    A plural starts near the mean of all words plus what is particular about its names ("balls": "ball", "bowling" and
    "tennis"); any other word starts near the mean.

    Args:
        model (`LlavaForConditionalGeneration`): The second stage's model.
        old (`LlavaProcessor`): Its processor.
        seed (`int`): Seed of the new rows.

    Returns:
        `LlavaProcessor`: Processor with the larger vocabulary.

    Raises:
        ValueError: If the second stage's vocabulary is not the beginning of the new one.
    """
    processor = build_processor(sentence_texts())
    known, ids = old.tokenizer.get_vocab(), processor.tokenizer.get_vocab()
    if any(ids.get(word) != index for word, index in known.items()):
        raise ValueError("the second stage's vocabulary is not the beginning of the third's: run all stages again.")
    words = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(len(ids), mean_resizing=False)
    model.config.text_config.vocab_size = len(ids)
    rows = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    rows[len(known) :] = words.mean(0) + NEW_WORD_STD * torch.randn(
        len(ids) - len(known), words.shape[1], generator=generator
    )
    for forms in name_forms().values():
        singular, plural = forms.name.split()[-1], forms.plural.split()[-1]
        if plural not in known:
            rows[ids[plural]] += words[known[singular]] - words.mean(0)
    return processor


class SentenceSampler:
    """Random open questions with answers, the likeliest template as often as all others together.

    Args:
        drawings (`Drawings`): Names.
        maker (`SegmentMaker`): Makes segments of texts.
        seed (`int`): Seed.
    """

    def __init__(self, drawings: Drawings, maker: SegmentMaker, seed: int):
        self.names, self.maker = drawings.names, maker
        self.random = random.Random(seed)
        # Questions that share what stands before the image can share a pack.
        self.groups: dict[tuple[int, ...], list[Question]] = {}
        for question in OPEN_QUESTIONS:
            before = maker(question, sentences(question, self.names[0])[0]).before
            self.groups.setdefault(before, []).append(question)

    def __call__(self, concept: int, questions: list[Question], n: int) -> list[Segment]:
        """`n` different ones of `questions` about a concept, answered."""
        segments = []
        for question in self.random.sample(questions, n):
            likeliest, *others = sentences(question, self.names[concept])
            answer = likeliest if self.random.random() < FAVOURITE else self.random.choice(others)
            segments.append(self.maker(question, answer))
        return segments


def train_sentences(
    model: LlavaForConditionalGeneration,
    old_processor: LlavaProcessor,
    drawings: Drawings,
    *,
    steps: int,
    seed: int,
    batch_size: int,
    lr: float,
    copies: int,
    clean_share: float,
    amount: float,
    questions: int,
    replay_size: int,
    keep_weight: float,
    log_every: int = 20,
) -> LlavaProcessor:
    """Train everything but the vision tower in place.

    Args:
        model (`LlavaForConditionalGeneration`): The second stage's model.
        old_processor (`LlavaProcessor`): Its processor.
        drawings (`Drawings`): Drawings of the trained styles.
        steps (`int`): Optimiser steps.
        seed (`int`): Seed of the new words, sampling and augmentation.
        batch_size (`int`): Images asked open questions per step.
        lr (`float`): Peak learning rate.
        copies (`int`): Augmentations kept of each image.
        clean_share (`float`): Share of images shown unchanged.
        amount (`float`): Strength of the augmentation.
        questions (`int`): Open questions per image.
        replay_size (`int`): Images asked old questions per step.
        keep_weight (`float`): Weight of the divergence from the second stage's answers to them.
        log_every (`int`): Steps between two log lines.

    Returns:
        `LlavaProcessor`: Processor with the larger vocabulary.
    """
    generator = torch.Generator().manual_seed(seed + 4)
    bank = feature_bank(
        model,
        old_processor,
        drawings,
        list(range(len(drawings.style))),
        copies=copies,
        seed=seed + 5,
        amount=amount,
        white=1.0,  # what is white in a drawing is transparent here, and no other background must show through
    )
    old_model = copy.deepcopy(model).requires_grad_(False).eval()
    processor = extend_vocabulary(model, old_processor, seed=seed + 6)
    maker = SegmentMaker(processor)
    sampler, old_questions = SentenceSampler(drawings, maker, seed + 7), QuestionSampler(drawings, maker, seed + 8)
    model.model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(parameters, lr)
    total_questions = sum(len(group) for group in sampler.groups.values())

    def show(n: int) -> tuple[list[int], torch.Tensor]:
        """`n` random images: their concepts and projector inputs."""
        picked = torch.randint(len(drawings.style), (n,), generator=generator)
        version = torch.randint(1, 1 + copies, (n,), generator=generator)
        clean = torch.rand(n, generator=generator) < clean_share
        return drawings.concept[picked].tolist(), bank[version.masked_fill(clean, 0), picked]

    def divergence(packed, features: torch.Tensor | None) -> torch.Tensor:
        """Mean Kullback-Leibler divergence of the answers from the second stage's."""
        with torch.no_grad():
            wanted = answer_logits(old_model, packed, features)[0].float().log_softmax(-1)
        got = answer_logits(model, packed, features)[0].float().log_softmax(-1)[:, : wanted.shape[1]]
        return F.kl_div(got, wanted, log_target=True, reduction="batchmean")

    started = time.perf_counter()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_schedule(step + 1, steps)
        logits, targets = [], []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for asked in sampler.groups.values():
                # As many images as give every question the same share.
                per_image = min(questions, len(asked))
                concepts, features = show(round(batch_size * questions * len(asked) / total_questions / per_image))
                rows = [sampler(concept, asked, per_image) for concept in concepts]
                part = answer_logits(model, pack(rows, processor, image=True), features)
                logits.append(part[0])
                targets.append(part[1])
            concepts, features = show(replay_size)
            rows = [old_questions.about_image(concept, 3, 1, 3) for concept in concepts]
            kept = divergence(pack(rows, processor, image=True), features)
            rows = [old_questions.about_names(4) for _ in range(4)]
            text_kept = divergence(pack(rows, processor, image=False), None)
        loss = F.cross_entropy(torch.cat(logits).float(), torch.cat(targets))
        (loss + keep_weight * (kept + text_kept)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % log_every == 0:
            seconds = time.perf_counter() - started
            print(
                f"sentences {step + 1}/{steps} {seconds:.0f} s loss {loss.item():.3f} kept {kept.item():.4f} "
                f"{text_kept.item():.4f}",
                flush=True,
            )
    model.model.vision_tower.requires_grad_(True)
    model.eval()
    return processor
