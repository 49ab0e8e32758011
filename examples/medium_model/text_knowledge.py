"""What the model knows without images, measured before and after an erasure."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from knowledge import KNOWLEDGE
from tasks import PASSAGE, TARGET_TEXT_HELD_OUT, WORLD, is_right

from space_peft.losses import answer_labels
from space_peft.modeling.prompts import answer_columns, build_batch, generate_answers, to_device


ANSWER_TOKENS = 24
KNOWLEDGE_TOKENS = 20


@torch.no_grad()
def perplexity(model, processor, text: str) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, without chat template, from the second token on."""
    batch = to_device(dict(processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)), model)
    logits = model(**batch).logits[0, :-1].float()
    return F.cross_entropy(logits, batch["input_ids"][0, 1:]).exp().item()


def knowledge_right(answers: list[str]) -> list[bool]:
    """Which answers to the questions of `KNOWLEDGE`, in their order, are right."""
    return [
        any(is_right(answer, form) for form in expected.split("|"))
        for (_, expected), answer in zip(KNOWLEDGE, answers, strict=True)
    ]


@torch.no_grad()
def token_agreement(model, processor, questions: list[str], answers: list[str]) -> float:
    """Share of the tokens of `answers`, fed as they are, that are the model's most likely next token.

    With the original model's greedy answers this is 1 for the original, less what rounding decides between two nearly
    equal tokens. It falls by one token for every place where the erased model would have gone on otherwise, while
    greedy texts differ from the first such place to the end.
    """
    batch = to_device(build_batch(processor, questions, answers=answers), model)
    labels = batch.pop("labels")
    logits = model(**batch, logits_to_keep=answer_columns(labels)).logits[:, :-1]
    labels = answer_labels(labels)
    # What the template adds after an answer (end of turn) is not the answer's: an answer cut off does not end there.
    special = torch.tensor(sorted(processor.tokenizer.added_tokens_decoder), device=labels.device)
    ended = torch.isin(labels, special).cumsum(dim=1) > 0
    counted = (labels != -100) & ~ended
    return (logits.argmax(-1) == labels)[counted].float().mean().item()


def measure_text(model, processor, concept: str, original: dict | None = None) -> dict:
    """Perplexity of the passage, world knowledge, and what is said about the concept in words.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model to measure.
        processor (`ProcessorMixin`): Its processor.
        concept (`str`): The concept.
        original (`dict`, *optional*): What this function returned for the original model; by default this model is it.

    Returns:
        `dict`: `perplexity`; `world_right` and `world_same` (right, and word for word the original's, of ten);
        `target_tokens` (see `token_agreement`); all `answers` by question.
    """
    world = [question for question, _ in WORLD]
    target = [question.format(name=concept) for question in TARGET_TEXT_HELD_OUT]
    said = generate_answers(model, processor, world + target, max_new_tokens=ANSWER_TOKENS)
    answers = dict(zip(world + target, said, strict=True))
    reference = answers if original is None else original["answers"]
    return {
        "perplexity": perplexity(model, processor, PASSAGE),
        "world_right": sum(is_right(answers[question], expected) for question, expected in WORLD),
        "world_same": sum(answers[question] == reference[question] for question in world),
        "target_tokens": token_agreement(model, processor, target, [reference[question] for question in target]),
        "answers": answers,
    }
