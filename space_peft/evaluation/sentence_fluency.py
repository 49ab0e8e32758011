"""Whether an erased model still speaks: how natural its sentences are to the original model, and how it repeats itself."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from ..losses import answer_labels, token_log_probs
from ..modeling.layers import evaluating
from ..modeling.prompts import IGNORE_INDEX, answer_logits, conversation, encode_conversations, to_device
from .probes import Probe, ProbeResults


# The probe whose answers are sentences about the target.
_SENTENCES = "free_form"
_WORDS_IN_A_ROW = 3


def repetition(answers: Sequence[str]) -> float | None:
    """Share of the runs of three words that stood earlier in the same answer, over all answers.

    It is seq-rep-n of Welleck et al., 2020 (arXiv 1908.04319) with n = 3, because answers are short.

    Args:
        answers (`list[str]`): Answers; case does not count.

    Returns:
        `float`: In [0, 1); `None` if no answer has three words.
    """
    runs, repeated = 0, 0
    for answer in answers:
        words = re.findall(r"\w+", answer.casefold())
        own = [tuple(words[i : i + _WORDS_IN_A_ROW]) for i in range(len(words) - _WORDS_IN_A_ROW + 1)]
        runs += len(own)
        repeated += len(own) - len(set(own))
    return repeated / runs if runs else None


@torch.no_grad()
def answer_perplexity(
    model, processor, questions: Sequence, answers: Sequence[str], batch_size: int = 64
) -> float | None:
    """Perplexity of answers as a model sees them that is asked the same questions and shown no picture.

    Without the picture, because an erased model's sentence is untrue of it by intent: what is measured is whether the
    sentence is one that somebody would say.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The deployed model.
        processor (`ProcessorMixin`): Its processor.
        questions (`list[str or Dialogue]`): n questions.
        answers (`list[str]`): n answers; empty ones are left out.
        batch_size (`int`, defaults to 64): Rows a forward pass.

    Returns:
        `float`: exp of the mean negative log-likelihood of a token, end of turn included; `None` without answers.
    """
    rows = [
        conversation(question, answer=answer)
        for question, answer in zip(questions, answers, strict=True)
        if answer.strip()
    ]
    total, tokens = 0.0, 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = to_device(encode_conversations(processor, rows[start : start + batch_size]), model)
            targets = answer_labels(batch["labels"])
            total -= token_log_probs(answer_logits(model, batch), targets).sum(dtype=torch.float64).item()
            tokens += int((targets != IGNORE_INDEX).sum())
    return math.exp(total / tokens) if tokens else None


def judge_sentences(
    results: ProbeResults, probes: Sequence[Probe], deployed, processor, batch_size: int = 64
) -> ProbeResults:
    """Adds to the `free_form` score how natural and how repetitive the sentences are.

    Args:
        results (`ProbeResults`): Of the original or the erased model.
        probes (`list[Probe]`): The probes they are of.
        deployed (`PreTrainedModel` or `PeftModel`): The original model, which judges (an adapter must be off).
        processor (`ProcessorMixin`): Its processor.
        batch_size (`int`, defaults to 64): Rows a forward pass.

    Returns:
        `ProbeResults`: With `perplexity` (see `answer_perplexity`) and `repetition` in `scores["free_form"]`; unchanged
        without such a probe, or if it has no rows.
    """
    questions, answers = [], []
    for probe in probes:
        if probe.name == _SENTENCES:
            questions += [probe.rows[i]["question"] for i in range(len(probe.rows))]
            answers += [record["answer"] for record in results.rows(probe.name, probe.part)]
    if not answers:
        return results
    score = {
        **results.scores[_SENTENCES],
        "perplexity": answer_perplexity(deployed, processor, questions, answers, batch_size),
        "repetition": repetition(answers),
    }
    return ProbeResults({**results.scores, _SENTENCES: score}, results.records, results.seconds)
