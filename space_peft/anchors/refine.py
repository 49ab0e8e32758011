"""Anchor refinement: turn public images into images for which *this model* answers the concept's name.

Raw proxies barely activate the concept, and an erasure that is confined to a null space then changes nothing. The
model itself is the only source of knowledge about the concept that is left, so each anchor's pixels are optimised
until the model says the name. This stage is ours (docs/method.md, section 2), not the paper's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from datasets import Dataset
from PIL import Image

from ..choices import REFINEMENT_METHODS, RefinementMethod
from ..data.form_tree import FormTree
from ..data.names import check_concept, check_name_list
from ..data.pictures import load_rgb
from ..data.questions import DEFAULT_QUESTIONS, QuestionSet
from ..data.rows import check_kind
from ..losses import name_log_odds
from ..modeling.layers import evaluating
from ..modeling.mention_rows import add_branches, answered_with, mention_tensors, own_answers, placed
from ..modeling.prompts import answer_logits, encode_conversations, to_device
from ..records.stages import bar
from .encoders import OwnSpaceEncoder
from .info import anchor_info, set_anchor_info
from .pixel_ascent import ascend_pixels, frozen, layout_batches
from .select import concept_embedding


# Longest sentence, in tokens, whose place for the name refinement looks for.
OPEN_TOKENS = 24
# Anchors that the model calls by the name with less, on average, after refinement show that it hardly knows it.
KNOWN = 0.1


def text_anchor(model, processor, concept: str, info: dict) -> torch.Tensor:
    """e_c `(d,)` in the model's own space, from the name and the aliases and description in the anchors' provenance."""
    encoder = OwnSpaceEncoder(model, processor)
    embedding = concept_embedding(
        encoder, concept, aliases=info.get("aliases") or (), description=info.get("description")
    )
    return torch.as_tensor(embedding)


@torch.no_grad()
def name_probabilities(
    model,
    processor,
    images: Sequence[Image.Image],
    question: str,
    names: str | Sequence[str],
    *,
    batch_size: int = 64,
) -> list[float]:
    """p(the answer begins with the name, in any form | image, question) of every image.

    Summed over every token sequence with which one of the names can be written; forms that begin with a token of a
    probability below 1e-4 (relative to all that is not the name) are left out.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        processor (`ProcessorMixin`): Its processor.
        images (`list[PIL.Image.Image]`): n images.
        question (`str`): The question asked about each.
        names (`str` or `list[str]`): The name, or the name and its aliases.
        batch_size (`int`, defaults to 64): Images a forward pass.

    Returns:
        `list[float]`: n probabilities.

    Raises:
        ValueError: If the tokenizer cannot write the name.
    """
    names = check_name_list((names,) if isinstance(names, str) else names)
    trees = {names: FormTree.of(names, processor.tokenizer)}
    rows = [answered_with(processor, question, names, image) for image in images]
    return mention_probabilities(model, processor, rows, trees, batch_size=batch_size)


@torch.no_grad()
def mention_probabilities(
    model, processor, rows: Sequence[dict], trees: dict[tuple[str, ...], FormTree], *, batch_size: int = 64
) -> list[float]:
    """p(one of its names is said, in any form) at the mention of each row; what is left out: see `name_probabilities`.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        processor (`ProcessorMixin`): Its processor.
        rows (`list[dict]`): n rows with `answer_tokens`, `mention` and `says`.
        trees (`dict[tuple[str, ...], FormTree]`): By `says`.
        batch_size (`int`, defaults to 64): Rows a forward pass.

    Returns:
        `list[float]`: n probabilities.
    """
    rows = add_branches(model, processor, rows, trees, batch_size, look_into=1e-4)
    probabilities = []
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            logits = answer_logits(model, to_device(encode_conversations(processor, part), model))
            mention = {key: value.to(logits.device) for key, value in mention_tensors(part).items()}
            odds = name_log_odds(logits, mention["name"], mention["branches"], mention["shares"])
            probabilities += torch.sigmoid(odds).tolist()
    return probabilities


def refine_anchors(
    anchors: Dataset,
    *,
    model,
    processor,
    concept: str | None = None,
    questions: QuestionSet = DEFAULT_QUESTIONS,
    method: RefinementMethod = "pixels",
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

    Steps take a naming, a yes/no and an open question from `questions` in turn, and Adam moves an additive perturbation
    of each image to maximise the log-odds of the answer + `feature_weight` cos(z, e_c), less a total-variation penalty,
    under a random shift, inside the range of valid pixels. To an open question the answer is the sentence that the model
    says about the image as it is, with the name where it fits best.

    Args:
        anchors (`datasets.Dataset`): As returned by `select_anchors`.
        model (`PreTrainedModel` or `PeftModel`): The model that shall forget; its weights are not changed.
        processor (`ProcessorMixin`): Its processor.
        concept (`str`, *optional*): The name; by default the one in the anchors' provenance.
        questions (`QuestionSet`): Only `naming`, `confirm` and `open` are used, never the held-out ones. All are kept in the
            anchors' provenance, where [`SpaceTrainer`] and `build_probes` find them.
        method (`str`, defaults to `"pixels"`): What Adam moves: the pixels of what is added to an image, or its Fourier
            coefficients (`"fourier"`), which may need fewer steps; it depends on the model.
        steps (`int`, defaults to 60): Steps of Adam.
        learning_rate (`float`, defaults to 0.05): In units of normalised pixels, on average over the image.
        total_variation (`float`, defaults to 0.05): Weight of the smoothness penalty on the perturbation.
        feature_weight (`float`, defaults to 0.5): Weight of the cosine to the concept's text embedding.
        max_shift (`float`, defaults to 0.0625): Largest random shift, as a share of the image's side.
        batch_size (`int`, defaults to 32): Images optimised at a time.
        seed (`int`, defaults to 0): Of questions and shifts.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        `datasets.Dataset`: The anchors with their refined `image`, the original in `raw_image`, and
        `p_name_before` / `p_name_after` measured on the stored 8-bit images through the processor.

    Warns if the model hardly calls them by the name even so: it may not know it.

    Raises:
        ValueError: If the anchors are empty or carry no concept, `steps` < 1, or the processor's pixel layout is not
            supported.
    """
    check_kind(anchors, "anchors")
    if len(anchors) == 0:
        raise ValueError("got no anchors to refine; `select_anchors` must find at least one.")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    if method not in REFINEMENT_METHODS:
        raise ValueError(f"`method` must be one of {REFINEMENT_METHODS}, got {method!r}.")
    info = anchor_info(anchors)
    concept = check_concept(info["concept"] if concept is None else concept)
    with frozen(model):
        raw = [load_rgb(image) for image in anchors["image"]]
        e_c = text_anchor(model, processor, concept, info)
        prompts = _wanted(model, processor, raw, concept, questions, batch_size)
        generator = torch.Generator().manual_seed(seed)
        batches = layout_batches(processor, raw, batch_size)
        refined = [None] * len(raw)
        with bar("Refining anchors", len(batches) * steps, show=progress, leave=True) as shown:
            for layout, rows in batches:
                own = [[[wanted[row] for row in rows] for wanted in group] for group in prompts]
                part = ascend_pixels(
                    model, processor, layout, [raw[row] for row in rows], own, steps=steps,
                    learning_rate=learning_rate, total_variation=total_variation, max_shift=max_shift,
                    generator=generator, method=method, feature_weight=feature_weight, concept=e_c, on_step=lambda _: shown.update(),
                )  # fmt: skip
                for row, image in zip(rows, part):
                    refined[row] = image
        question = questions.naming[0]
        before = name_probabilities(model, processor, raw, question, concept, batch_size=batch_size)
        after = name_probabilities(model, processor, refined, question, concept, batch_size=batch_size)
    columns = anchors.remove_columns([c for c in ("image", "raw_image") if c in anchors.column_names]).to_dict()
    columns = {"image": refined, "raw_image": raw, **columns, "p_name_before": before, "p_name_after": after}
    settings = {
        "method": method, "steps": steps, "learning_rate": learning_rate, "total_variation": total_variation,
        "feature_weight": feature_weight, "max_shift": max_shift, "batch_size": batch_size, "seed": seed,
        "questions": questions.to_dict(),
    }  # fmt: skip
    if (found := sum(after) / len(after)) < KNOWN:
        warnings.warn(
            f"after {steps} steps of refinement the model calls the {len(after)} anchors {concept!r} with a probability of "
            f"{found:.3f} on average ({sum(before) / len(before):.3f} before). It may not know the concept by this name: ask it "
            "about a picture, try the name it answers with (or `aliases`), or more `steps`. Otherwise there is little to "
            "forget, and little to train an erasure on.",
            stacklevel=2,
        )
    return set_anchor_info(
        Dataset.from_dict(columns), {**info, "concept": concept, "stage": "refined", "refinement": settings}
    )


def known_by_anchors(anchors: Dataset) -> tuple[float, bool] | None:
    """How sure the model is of the name on refined anchors: its mean probability, and whether that shows that it knows it.

    Args:
        anchors (`datasets.Dataset`): As returned by `refine_anchors`; of others nothing is known, and `None` returned.
    """
    if "p_name_after" not in anchors.column_names or not len(anchors):
        return None
    mean = sum(anchors["p_name_after"]) / len(anchors)
    return mean, mean >= KNOWN


def _wanted(model, processor, images, concept: str, questions: QuestionSet, batch_size: int) -> list[list[list[dict]]]:
    """What the model shall say about each image, as rows: groups of naming, yes/no and open questions."""
    names = (concept,)

    def short(question, answer) -> list[dict]:
        return [answered_with(processor, question, (answer,), image) for image in images]

    naming = [short(question, concept) for question in questions.naming]
    confirm = [short(question.format(name=concept), questions.yes) for question in questions.confirm]
    opened = []
    if questions.open:
        tree = FormTree.of(names, processor.tokenizer)
        said = own_answers(model, processor, images, questions.open, batch_size=batch_size, max_new_tokens=OPEN_TOKENS)
        rows = placed(model, processor, said, names, tree, batch_size)
        for place, question in enumerate(questions.open):
            own = rows[place :: len(questions.open)]
            # An image about which the model says nothing shall bring forth the name alone.
            opened.append([row or answered_with(processor, question, names, image) for row, image in zip(own, images)])
    return [naming, confirm, opened]
