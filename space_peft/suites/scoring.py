"""From a model's answers to one row a question, and from rows to figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..evaluation.metrics import is_refusal
from ..statistics.intervals import exact_interval
from . import metrics, statistics
from .answers import TokenScores
from .schema import FORGOTTEN, IMAGE_TEXT, TEXT_ONLY, Protocol, SuiteQuestion


ALL = "all"
PARAPHRASED = ", paraphrased"
# ROUGE-L recall from which a free answer counts as known to the model.
KNOWN_ROUGE = 0.5
# Figures that are a share of rows, and have an exact interval.
SHARES = ("accuracy", "cloze", "exact", "refused", "any_wording", "kept", "forgotten")
MEANS = (
    *("keywords", "rouge_l", "rouge_l_recall", "rouge_1", "rouge_2", "bleu"),
    *("probability", "probability_among", "extraction_strength", "memorization", "min_k"),
)
FORGET_QUALITY = ("forget_quality_ks", "forget_quality_js")


def answered(question: SuiteQuestion, answer: str | None, chosen: int | None, protocol: Protocol) -> dict:
    """What an answer says of a question: the part of a row that needs no likelihoods.

    Args:
        question ([`SuiteQuestion`]): The question.
        answer (`str`, *optional*): What the model said; None where it was not asked to speak.
        chosen (`int`, *optional*): The option that it finds most likely, where the protocol chooses so.
        protocol ([`Protocol`]): Of the suite.
    """
    row: dict = {"answer": answer}
    if answer is not None:
        row["refused"] = is_refusal(answer)
    if question.kind == "classification":
        if protocol.choose == "answer":
            assert answer is not None  # The model was asked to speak.
            chosen = metrics.chosen_option(answer, question.options, protocol.labels)
        row["chosen"] = None if chosen is None else question.options[chosen]
        row["accuracy"] = row["chosen"] == question.answer
        row["known"] = row["accuracy"]
        return row
    assert answer is not None  # Only a choice may be made without speaking.
    row |= metrics.rouge(answer, question.answer)
    row["bleu"] = metrics.bleu(answer, question.answer)
    row["exact"] = metrics.same(answer, question.answer)
    row["known"] = row["rouge_l_recall"] >= KNOWN_ROUGE
    if question.keywords:
        row["keywords"] = metrics.keyword_share(answer, question.keywords)
        row["known"] = row["keywords"] >= KNOWN_ROUGE
    if question.kind == "cloze":
        row["cloze"] = row["known"] = metrics.says(answer, question.answer)
    return row


def likelihoods(right: TokenScores, paraphrased: Sequence[TokenScores], wrong: Sequence[TokenScores]) -> dict:
    """What the likelihoods of right and wrong answers say of a question: the other part of a row."""
    row: dict = {
        "loss": right.loss,
        "probability": math.exp(-right.loss),
        "extraction_strength": statistics.extraction_strength(right.hits),
        "memorization": statistics.memorization(right.hits),
        "min_k": statistics.min_k(right.log_probs),
    }
    if wrong:
        row["paraphrased_losses"] = [scores.loss for scores in paraphrased]
        row["perturbed_losses"] = [scores.loss for scores in wrong]
        row["truth_ratio"] = statistics.truth_ratio(row["paraphrased_losses"] or [right.loss], row["perturbed_losses"])
        others = sum(math.exp(-scores.loss) for scores in wrong)
        row["probability_among"] = row["probability"] / (row["probability"] + others + 1e-10)
    return row


def figures(rows: Sequence[Mapping], split: str, reference: Sequence[Mapping] | None = None) -> list[dict]:
    """All figures of a split: one cell a modality, task and metric.

    Args:
        rows (`list[dict]`): One a question, as [`answered`] and [`likelihoods`] make them.
        split (`str`): Which split; it gives the truth ratio its direction.
        reference (`list[dict]`, *optional*): The same rows of a retain-only model.

    Returns:
        `list[dict]`: `modality`, `task`, `metric`, `value` (None where there is nothing to measure), `n`, and `low`, `high`
        for shares.
    """
    cells = []
    modalities = [name for name in (IMAGE_TEXT, TEXT_ONLY) if any(row["modality"] == name for row in rows)]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for modality in [*modalities, ALL] if len(modalities) > 1 else modalities:
        own = [modality == ALL or row["modality"] == modality for row in rows]
        for task in [*tasks, ALL]:
            chosen = [i for i, row in enumerate(rows) if own[i] and task in (row["task"], ALL)]
            if not chosen:
                continue
            part = [rows[i] for i in chosen]
            gold = None if reference is None else [reference[i] for i in chosen]
            measured = _of_task(part, split) if task != ALL else []
            measured += _forget_quality(part, gold) if split in FORGOTTEN else []
            cells += [{"modality": modality, "task": task, **cell} for cell in measured]
    return cells


def _of_task(rows: Sequence[Mapping], split: str) -> list[dict]:
    cells = []
    for metric in SHARES:
        if values := [row[metric] for row in rows if row.get(metric) is not None]:
            low, high = exact_interval(sum(values), len(values))
            cells.append(_cell(metric, sum(values) / len(values), len(values), low=low, high=high))
    for metric in MEANS:
        if values := [row[metric] for row in rows if row.get(metric) is not None]:
            cells.append(_cell(metric, float(np.mean(values)), len(values)))
    # Of people that no model was trained on, neither direction is better.
    if split != "holdout" and (ratios := _ratios(rows)):
        value = statistics.truth_ratio_score(ratios, forgotten=split in FORGOTTEN)
        cells.append(_cell("truth_ratio", value, len(ratios)))
    return cells


def _forget_quality(rows: Sequence[Mapping], reference: Sequence[Mapping] | None) -> list[dict]:
    ratios = _ratios(rows)
    if not ratios:
        return []
    gold = None if reference is None else _ratios(reference)
    values = (statistics.ks_p_value(ratios, gold), statistics.js_divergence(ratios, gold))
    return [_cell(metric, value, len(ratios)) for metric, value in zip(FORGET_QUALITY, values)]


def _ratios(rows: Sequence[Mapping]) -> list[float]:
    return [row["truth_ratio"] for row in rows if row.get("truth_ratio") is not None]


def _cell(metric: str, value: float | None, n: int, **interval) -> dict:
    return {"metric": metric, "value": value, "n": n, **interval}
