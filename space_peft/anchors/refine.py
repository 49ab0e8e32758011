"""Anchor refinement: turn public images into images for which *this model* answers the concept's name.

Raw proxies barely activate the concept, and an erasure that is confined to a null space then changes nothing. The
model itself is the only source of knowledge about the concept that is left, so each anchor's pixels are optimised
until the model says the name. This stage is ours (METHOD, section 3), not the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from ..losses import answer_labels, name_log_prob
from ..prompts import answer_logits, build_batch, load_rgb, name_tokens, to_device
from ..questions import DEFAULT_QUESTIONS, QuestionSet
from .encoders import OwnSpaceEncoder
from .info import anchor_info, set_anchor_info
from .pixel_ascent import ascend_pixels, frozen, layout_batches
from .select import concept_embedding


def text_anchor(model, processor, concept: str, info: dict) -> torch.Tensor:
    """e_c `(d,)` in the model's own space, from the name and the aliases and description in the anchors' provenance."""
    encoder = OwnSpaceEncoder(model, processor)
    names = {"aliases": info.get("aliases") or (), "description": info.get("description")}
    return torch.as_tensor(concept_embedding(encoder, concept, **names))


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
    # One question a step, naming and yes/no in turn.
    prompts = [
        [(question, concept) for question in questions.naming],
        [(question.format(name=concept), questions.yes) for question in questions.confirm],
    ]
    with frozen(model):
        raw = [load_rgb(image) for image in anchors["image"]]
        e_c = text_anchor(model, processor, concept, info)
        generator = torch.Generator().manual_seed(seed)
        batches = layout_batches(processor, raw, batch_size)
        refined = [None] * len(raw)
        with tqdm(total=len(batches) * steps, desc="Refining anchors", disable=not progress) as bar:
            for layout, rows in batches:
                part = ascend_pixels(
                    model, processor, layout, [raw[row] for row in rows], prompts, steps=steps,
                    learning_rate=learning_rate, total_variation=total_variation, max_shift=max_shift,
                    generator=generator, feature_weight=feature_weight, concept=e_c, on_step=lambda _: bar.update(),
                )  # fmt: skip
                for row, image in zip(rows, part):
                    refined[row] = image
        question = questions.naming[0]
        before = name_probabilities(model, processor, raw, question, concept, batch_size=batch_size)
        after = name_probabilities(model, processor, refined, question, concept, batch_size=batch_size)
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
