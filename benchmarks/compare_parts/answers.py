"""What models answer to naming questions about the target and about others: encoded once, asked of many."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.losses import IGNORE_INDEX, answer_labels, name_log_prob
from space_peft.modeling.mention_rows import answered_with
from space_peft.modeling.prompts import answer_logits, encode_conversations

from .images import concept_data


def demo_processor():
    return load_demo_model()[1]


@functools.lru_cache(maxsize=4)
def encoded_batches(concept: str, seed: int) -> dict[str, list[dict]]:
    """Naming questions about images of the target and of others, encoded once."""
    data, processor = concept_data(concept, seed), demo_processor()

    def encode(pairs):
        rows = [answered_with(processor, DEMO_QUESTIONS.naming[0], (name,), image) for image, name in pairs]
        return [encode_conversations(processor, rows[i : i + 64]) for i in range(0, len(rows), 64)]

    return {"target": encode([(image, concept) for image in data.unseen]), "others": encode(data.others)}


@functools.lru_cache(maxsize=4)
def embedded_batches(concept: str, seed: int) -> dict[str, list[dict]]:
    """The same as the deployed vision side hands it to the language side, for adapters that leave the former alone."""

    model, seen = load_demo_model()[0], {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, inputs: seen.update(inputs_embeds=inputs["inputs_embeds"]), with_kwargs=True
    )
    embedded = {}
    with torch.no_grad():
        for key, batches in encoded_batches(concept, seed).items():
            embedded[key] = []
            for batch in batches:
                model(**{name: value for name, value in batch.items() if name != "labels"})
                embedded[key].append({**{k: batch[k] for k in ("attention_mask", "labels")}, **seen})
    hook.remove()
    return embedded


@dataclass(frozen=True)
class Answers:
    """What a model says to naming questions, a row each.

    Args:
        named (`list[bool]`): Whether the greedy answer begins with the name the row was encoded with.
        name_log_prob (`torch.Tensor`): `(n,)`, log p of that name.
        first (`torch.Tensor`): `(n, vocabulary)`, log p of the answer's first token.
    """

    named: list[bool]
    name_log_prob: torch.Tensor
    first: torch.Tensor


def answers(model, batches: list[dict]) -> Answers:
    named, log_prob, first = [], [], []
    with torch.no_grad():
        for batch in batches:
            logits = answer_logits(model, batch)
            names = answer_labels(batch["labels"])  # A row ends with its name.
            agrees = (logits[:, : names.shape[1]].argmax(dim=-1) == names) | (names == IGNORE_INDEX)
            named += agrees.all(dim=1).tolist()
            log_prob.append(name_log_prob(logits, names))
            first.append(logits[:, 0].float().log_softmax(dim=-1))
    return Answers(named, torch.cat(log_prob), torch.cat(first))


def share(hits: list[bool], counts: list[bool]) -> float:
    """Of the rows that count, how many are hits."""
    return sum(hit for hit, count in zip(hits, counts, strict=True) if count) / sum(counts)


def named(model, batches: list[dict]) -> list[bool]:
    return answers(model, batches).named


@functools.lru_cache(maxsize=4)
def answers_before(concept: str, seed: int) -> dict[str, Answers]:
    """What the deployed model answers about the target and about the others."""
    model = load_demo_model()[0]
    return {key: answers(model, own) for key, own in encoded_batches(concept, seed).items()}
