"""Anchor refinement: turn public images into images for which *this model* answers the concept's name.

Raw proxies barely activate the concept, and an erasure that is confined to a null space then changes nothing. The
model itself is the only source of knowledge about the concept that is left, so each anchor's pixels are optimised
until the model says the name. This stage is ours (METHOD, section 3), not the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from ..features import tap_image_features
from ..losses import answer_labels, log1mexp, name_log_prob
from ..prompts import answer_logits, build_batch, load_rgb, name_tokens, to_device
from ..questions import DEFAULT_QUESTIONS, QuestionSet
from .encoders import OwnSpaceEncoder
from .info import anchor_info, set_anchor_info
from .pixels import PixelLayout, encode_image, find_layout, image_statistics, tolerance_of
from .select import concept_embedding


def text_anchor(model, processor, concept: str, info: dict) -> torch.Tensor:
    """e_c `(d,)` in the model's own space, from the name and the aliases and description in the anchors' provenance."""
    encoder = OwnSpaceEncoder(model, processor)
    names = {"aliases": info.get("aliases") or (), "description": info.get("description")}
    return torch.as_tensor(concept_embedding(encoder, concept, **names))


def _to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """`(n, 3, h, w)` in [0, 1] to 8-bit images."""
    array = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def _total_variation(x: torch.Tensor) -> torch.Tensor:
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


@torch.no_grad()
def name_probabilities(
    model, processor, images: Sequence[Image.Image], question: str, name: str, *, batch_size: int = 64
) -> list[float]:
    """p(name | image, question) of every image, the name's tokens fed as the answer.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        processor (`ProcessorMixin`): Its processor.
        images (`list[PIL.Image.Image]`): n images.
        question (`str`): The question asked about each.
        name (`str`): The answer whose probability is wanted.
        batch_size (`int`, defaults to 64): Images a forward pass.

    Returns:
        `list[float]`: n probabilities.
    """
    was_training = model.training
    model.eval()
    probabilities = []
    try:
        for start in range(0, len(images), batch_size):
            part = list(images[start : start + batch_size])
            batch = to_device(
                build_batch(processor, [question] * len(part), images=part, answers=[name] * len(part)), model
            )
            logits = answer_logits(model, batch)
            targets = name_tokens(answer_labels(batch["labels"]), processor.tokenizer)
            probabilities += name_log_prob(logits, targets).exp().tolist()
    finally:
        model.train(was_training)
    return probabilities


def refine_anchors(
    anchors: Dataset,
    *,
    model,
    processor,
    concept: str | None = None,
    questions: QuestionSet = DEFAULT_QUESTIONS,
    steps: int = 60,
    learning_rate: float = 0.05,
    total_variation: float = 0.05,
    feature_weight: float = 0.5,
    max_shift: float = 0.0625,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """Optimises the pixels of every anchor until the model answers the concept's name for it.

    Steps take a naming and a yes/no question from `questions` in turn, and Adam moves an additive perturbation of each
    image to maximise log p(answer | image + perturbation, question) + `feature_weight` cos(z, e_c), less a
    total-variation penalty, under a random shift, inside the range of valid pixels.

    Args:
        anchors (`datasets.Dataset`): As returned by `select_anchors`.
        model (`PreTrainedModel` or `PeftModel`): The model that shall forget; its weights are not changed.
        processor (`ProcessorMixin`): Its processor.
        concept (`str`, *optional*): The name; by default the one in the anchors' provenance.
        questions (`QuestionSet`): Only `naming` and `confirm` are used, never the held-out ones.
        steps (`int`, defaults to 60): Steps of Adam.
        learning_rate (`float`, defaults to 0.05): In units of normalised pixels.
        total_variation (`float`, defaults to 0.05): Weight of the smoothness penalty on the perturbation.
        feature_weight (`float`, defaults to 0.5): Weight of the cosine to the concept's text embedding.
        max_shift (`float`, defaults to 0.0625): Largest random shift, as a share of the image's side.
        batch_size (`int`, defaults to 32): Images optimised at a time.
        seed (`int`, defaults to 0): Of questions and shifts.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        `datasets.Dataset`: The anchors with their refined `image`, the original in `raw_image`, and
        `p_name_before` / `p_name_after` measured on the stored 8-bit images through the processor.

    Raises:
        ValueError: If the anchors are empty or carry no concept, `steps` < 1, or the processor's pixel layout is not
            supported.
    """
    if len(anchors) == 0:
        raise ValueError("got no anchors to refine; `select_anchors` must find at least one.")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    info = anchor_info(anchors)
    concept = concept or info.get("concept")
    if not concept:
        raise ValueError("the anchors carry no concept (not made by `select_anchors`?): pass `concept=`.")
    was_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        raw = [load_rgb(image) for image in anchors["image"]]
        e_c = text_anchor(model, processor, concept, info)
        generator = torch.Generator().manual_seed(seed)
        groups = _by_layout(processor, raw)
        batches = [
            (layout, rows[start : start + batch_size])
            for layout, rows in groups
            for start in range(0, len(rows), batch_size)
        ]
        refined = [None] * len(raw)
        bar = tqdm(total=len(batches) * steps, desc="Refining anchors", disable=not progress)
        for layout, rows in batches:
            part = _refine_batch(
                model, processor, layout, [raw[row] for row in rows], concept, e_c, questions, steps, learning_rate,
                total_variation, feature_weight, max_shift, generator, bar,
            )  # fmt: skip
            for row, image in zip(rows, part):
                refined[row] = image
        bar.close()
        question = questions.naming[0]
        before = name_probabilities(model, processor, raw, question, concept, batch_size=batch_size)
        after = name_probabilities(model, processor, refined, question, concept, batch_size=batch_size)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(was_training)
    columns = anchors.remove_columns([c for c in ("image", "raw_image") if c in anchors.column_names]).to_dict()
    columns = {"image": refined, "raw_image": raw, **columns, "p_name_before": before, "p_name_after": after}
    settings = {
        "steps": steps, "learning_rate": learning_rate, "total_variation": total_variation,
        "feature_weight": feature_weight, "max_shift": max_shift, "batch_size": batch_size, "seed": seed,
        "questions": [*questions.naming, *questions.confirm],
    }  # fmt: skip
    return set_anchor_info(
        Dataset.from_dict(columns), {**info, "concept": concept, "stage": "refined", "refinement": settings}
    )


def _by_layout(processor, images: Sequence[Image.Image]) -> list[tuple[PixelLayout, list[int]]]:
    """The rows that are refined at the same size, with that size's layout; sizes in order of appearance."""
    known: dict[tuple[int, int], PixelLayout | None] = {}
    groups: dict[tuple[int, int], tuple[PixelLayout, list[int]]] = {}
    for row, image in enumerate(images):
        layout = find_layout(processor, image, known)
        groups.setdefault((layout.height, layout.width), (layout, []))[1].append(row)
    return list(groups.values())


def _refine_batch(
    model, processor, layout, images, concept, e_c, questions, steps, learning_rate, total_variation, feature_weight,
    max_shift, generator, bar,
) -> list[Image.Image]:  # fmt: skip
    """Refines images of one layout; all tensors in normalised pixel units, `(n, 3, height, width)`."""
    parameter = next(model.parameters())
    mean, std = (value.to(parameter.device) for value in image_statistics(processor))
    low, high = (0 - mean) / std, (1 - mean) / std
    pixels = torch.stack([layout.start(processor, image) for image in images]).to(parameter.device)
    layout = layout.to(parameter.device)
    # The prompts never change, only the pixels do: encode each question once, with images of the size to be stored.
    started = _to_images(pixels * std + mean)
    asks = [_prompt(processor, started, question, concept, model) for question in questions.naming]
    confirms = [
        _prompt(processor, started, question.format(name=concept), questions.yes, model)
        for question in questions.confirm
    ]
    delta = torch.zeros_like(pixels).requires_grad_(True)
    optimizer = torch.optim.Adam([delta], lr=learning_rate)
    shift = max(1, int(max_shift * pixels.shape[-1])) if max_shift > 0 else 0
    for step in range(steps):
        shifts = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
        x = torch.maximum(torch.minimum(pixels + delta, high), low)
        x = layout(torch.roll(x, shifts, dims=(2, 3))).to(parameter.dtype)
        # One question a step, naming and yes/no in turn: Adam's momentum averages over them at the cost of one.
        kind = confirms if confirms and step % 2 else asks
        batch, targets = kind[int(torch.randint(len(kind), (1,), generator=generator))]
        with tap_image_features(model) as features:
            logits = answer_logits(model, {**batch, "pixel_values": x})
        # Summed over images: each image's gradient, and so Adam's step, is its own.
        log_prob = name_log_prob(logits, targets)
        # Log-odds rather than log p: they go on rising when p is near 1, so that anchors end up no weaker evidence of
        # the concept than its own images are.
        loss = total_variation * _total_variation(delta) * len(images) - (log_prob - log1mexp(log_prob)).sum()
        if feature_weight:
            loss = loss - feature_weight * F.cosine_similarity(features[0], e_c.to(features[0]), dim=-1).sum()
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        optimizer.step()
        bar.update()
    final = torch.maximum(torch.minimum(pixels + delta.detach(), high), low)
    stored = _to_images(final * std + mean)
    shown = torch.cat([encode_image(processor, image)["pixel_values"] for image in stored])
    difference = (shown - layout(final).cpu()).abs().max().item()
    if difference > tolerance_of(layout, std):
        raise ValueError(
            f"{type(processor.image_processor).__name__} shows the model a refined image that differs from the one "
            f"optimised by {difference:.3f} (normalised units), so refined images could not be stored. Use unrefined "
            "anchors with this processor."
        )
    return stored


def _prompt(processor, images, question, answer, model):
    """Inputs without pixels but with labels, and the answer's target tokens `(n, t)`."""
    batch = build_batch(processor, [question] * len(images), images=images, answers=[answer] * len(images))
    batch = to_device(batch, model)
    batch.pop("pixel_values")
    return batch, name_tokens(answer_labels(batch["labels"]), processor.tokenizer)
