"""One model asked one split of a suite."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..evaluation.probes import _image_key
from .answers import Prompt, TokenScores, ask, score
from .extras import require_all
from .report import SuiteReport
from .schema import IMAGE_TEXT, Protocol, Subject, Suite, SuiteQuestion
from .scoring import PARAPHRASED, answered, figures, likelihoods


@dataclass(frozen=True)
class Item:
    """One question as it is asked: which wording, about which picture.

    Args:
        subject (`str`): The subject's id.
        question ([`SuiteQuestion`]): The question.
        prompt ([`Prompt`]): What the model gets.
        picture (`int`, *optional*): Number of the subject's picture that is shown.
        wording (`int`, *optional*): Number of the paraphrase that is asked.
    """

    subject: str
    question: SuiteQuestion
    prompt: Prompt
    picture: int | None = None
    wording: int | None = None

    @property
    def task(self) -> str:
        return self.question.task + ("" if self.wording is None else PARAPHRASED)

    def identity(self, keys: dict[int, str | None]) -> list:
        """What tells it from others: what is asked, of which picture, and what counts as right."""
        q = self.question
        asked = [(self.prompt, None), *self.prompt.shots]
        return [
            *(self.subject, self.task, q.kind, q.modality, self.picture, q.answer, q.options),
            *(q.paraphrased_answers, q.perturbed_answers, q.keywords),
            [(prompt.text, _picture_key(prompt, keys), said) for prompt, said in asked],
        ]


def items_of(subjects: Sequence[Subject], protocol: Protocol, seed: int) -> list[Item]:
    """Every question of every subject, with its picture drawn by the seed, whatever else is asked.

    Args:
        subjects (`list[Subject]`): Of one split.
        protocol ([`Protocol`]): Of the suite.
        seed (`int`): Of which picture is shown, where the suite does not say, and of whose questions are examples.

    Raises:
        ValueError: If everybody would be an example.
    """
    items = []
    for subject in subjects:
        for number, question in enumerate(subject.questions):
            picture = image = None
            if question.modality == IMAGE_TEXT:
                # Of the question, not of a running generator: leaving out others changes nothing here.
                draw = random.Random(f"{seed}/{subject.id}/{number}").randrange(len(subject.images))
                picture = draw if question.image is None else question.image
                image = subject.images[picture]
            wordings: list[int | None] = [None]
            if protocol.paraphrases and question.kind != "classification":
                wordings += range(len(question.paraphrases))
            for wording in wordings:
                text = protocol.prompt(question, None if wording is None else question.paraphrases[wording])
                items.append(Item(subject.id, question, Prompt(text, image, question.where), picture, wording))
    for kind, people in protocol.shots.items():
        items = _with_shots(items, kind, people, protocol, seed)
    return items


def _with_shots(items: list[Item], kind: str, people: int, protocol: Protocol, seed: int) -> list[Item]:
    """The questions of a kind after those of some people with their answers, who are not asked themselves."""
    asked = list(dict.fromkeys(item.subject for item in items if item.question.kind == kind))
    if not asked:
        return items
    if len(asked) <= people:
        raise ValueError(
            f"{people} people are to be examples of kind {kind!r}, and only {len(asked)} have such questions: nobody is left "
            "to be asked. Use fewer `shots`, or more people."
        )
    shown = set(random.Random(f"{seed}/{kind}").sample(asked, people))
    shots: dict[str, tuple] = {}  # by modality
    for item in items:
        if item.question.kind == kind and item.subject in shown and item.wording is None:
            before = shots.get(item.question.modality, ())
            shots[item.question.modality] = (*before, (item.prompt, protocol.said(item.question)))
    return [
        item
        if item.question.kind != kind
        else replace(item, prompt=replace(item.prompt, shots=shots.get(item.question.modality, ())))
        for item in items
        if item.question.kind != kind or item.subject not in shown
    ]


def fingerprint_of(items: Sequence[Item]) -> str:
    """A hash of everything that is asked, shown and expected, in order.

    Raises:
        ValueError: If a picture does not open.
    """
    keys: dict[int, str | None] = {}
    content = json.dumps([item.identity(keys) for item in items], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _picture_key(prompt: Prompt, keys: dict[int, str | None]) -> str | None:
    """A hash of what a picture shows; of each that the suite holds, once."""
    if prompt.image is None:
        return None
    if id(prompt.image) not in keys:
        try:
            keys[id(prompt.image)] = _image_key(prompt.opened())
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from error
    return keys[id(prompt.image)]


def evaluate_suite(
    model,
    processor,
    suite: Suite,
    split: str,
    *,
    before: SuiteReport | None = None,
    reference: SuiteReport | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> SuiteReport:
    """Asks a model every question of a split and scores what it says and how likely it finds the right answers.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model; nothing is trained.
        processor (`ProcessorMixin`): Its processor.
        suite ([`Suite`]): See `load_suite`.
        split (`str`): Which of its splits.
        before ([`SuiteReport`], *optional*): Of the model before anything was unlearned. With it, `kept` and `forgotten` are
            reported: of what that model knew, the share that is still right, and that is wrong without a refusal.
        reference ([`SuiteReport`], *optional*): Of a retain-only model, for forget quality, which is None without one.
        batch_size (`int`, defaults to 16): Questions a forward pass.
        seed (`int`, defaults to 0): Of which picture is shown where a subject has several, and of whose questions are
            examples.
        progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        [`SuiteReport`]

    Raises:
        ImportError: If `rouge-score`, `nltk` or `scipy` is missing.
        ValueError: If the suite has no such split, a picture does not open, or `before` or `reference` is a report of other
            questions.
    """
    require_all()
    start = time.perf_counter()
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    items = items_of(suite.split(split), suite.protocol, seed)
    fingerprint = fingerprint_of(items)
    for what, report in (("before", before), ("reference", reference)):
        if report is not None:
            report.check_same(fingerprint, what)
    rows = rows_of(model, processor, items, suite.protocol, batch_size=batch_size, progress=progress)
    if before is not None:
        for row, old in zip(rows, before.rows, strict=True):
            if old["known"]:
                row["kept"] = bool(row["known"])
                row["forgotten"] = not row["known"] and not row.get("refused", False)
    return SuiteReport(
        suite.name,
        split,
        fingerprint,
        rows,
        figures(rows, split, None if reference is None else reference.rows),
        seed=seed,
        settings={"source": suite.source, "protocol": _settings(suite.protocol), "batch_size": batch_size},
        seconds=time.perf_counter() - start,
        notes=list(suite.notes),
    )


def _settings(protocol: Protocol) -> dict[str, Any]:
    return {
        "prompts": dict(protocol.prompts),
        "labels": list(protocol.labels),
        "choose": protocol.choose,
        "max_new_tokens": protocol.max_new_tokens,
        "rouge": protocol.rouge,
        "paraphrases": protocol.paraphrases,
        "shots": dict(protocol.shots),
    }


def rows_of(
    model, processor, items: Sequence[Item], protocol: Protocol, *, batch_size: int, progress: bool
) -> list[dict]:
    """Asks every item and scores its answers: one row each; see `space_peft.suites.scoring`."""
    by_probability = [item.question.kind == "classification" and protocol.choose == "probability" for item in items]
    spoken = [i for i in range(len(items)) if not by_probability[i]]
    said = dict(
        zip(
            spoken,
            ask(
                model,
                processor,
                [items[i].prompt for i in spoken],
                batch_size=batch_size,
                max_new_tokens=protocol.max_new_tokens,
                progress=progress,
            ),
            strict=True,
        )
    )
    # What is scored: (item, part, number) -> an answer that the model did not give itself.
    wanted: dict[tuple[int, str, int], str] = {}
    for i, item in enumerate(items):
        question = item.question
        if question.kind == "classification":
            texts = {"label": protocol.labels[: len(question.options)] if by_probability[i] else ()}
        else:
            texts = {
                "right": (question.answer,),
                "paraphrased": question.paraphrased_answers if question.perturbed_answers else (),
                "wrong": question.perturbed_answers,
            }
        if item.wording is None:
            wanted |= {(i, part, n): text for part, given in texts.items() for n, text in enumerate(given)}
    scored = score(
        model,
        processor,
        [items[i].prompt for i, _, _ in wanted],
        list(wanted.values()),
        batch_size=batch_size,
        progress=progress,
    )
    scores: dict[tuple[int, str], list[TokenScores]] = {}
    for (i, part, _), tokens in zip(wanted, scored, strict=True):
        scores.setdefault((i, part), []).append(tokens)
    rows = [_row(item, said.get(i), i, scores, protocol) for i, item in enumerate(items)]
    return _any_wording(items, rows)


def _any_wording(items: Sequence[Item], rows: list[dict]) -> list[dict]:
    """Says of a question with other wordings whether it is answered right in any: the worst case of what was asked."""
    facts: dict[tuple[str, int], list[dict]] = {}
    for item, row in zip(items, rows, strict=True):
        facts.setdefault((item.subject, id(item.question)), []).append(row)
    for wordings in facts.values():
        if len(wordings) > 1:
            # The question itself comes first.
            wordings[0]["any_wording"] = any(row["known"] for row in wordings)
    return rows


def _row(item: Item, answer: str | None, i: int, scores: Mapping, protocol: Protocol) -> dict:
    question, chosen = item.question, None
    if labels := scores.get((i, "label")):
        # All labels are one token in most vocabularies; the mean makes them comparable in others.
        chosen = min(range(len(labels)), key=lambda n: labels[n].loss)
    row = {
        "subject": item.subject,
        "task": item.task,
        "kind": question.kind,
        "modality": question.modality,
        "asked": item.prompt.text,
        "picture": item.picture,
        "expected": question.answer,
        **answered(question, answer, chosen, protocol),
    }
    if right := scores.get((i, "right")):
        row |= likelihoods(right[0], scores.get((i, "paraphrased"), []), scores.get((i, "wrong"), []))
    return row
