"""Probes: what a model is asked before and after an erasure, and what share of the answers counts.

The score of a probe is `{"value": share in [0, 1] or None, "n": rows it is a share of}`; `n` 0 goes with None (JSON's
null), never with NaN. Four keys (`retain`, `retain_sentences`, `retain_unseen_style`, `siblings`) are *kept shares*: they count only rows
the original model answers correctly, so they are 1.0 before an erasure by construction. An erasure cannot be judged by
raw accuracy where the model is right only 65 % of the time to begin with; raw accuracy stands beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from datasets import Dataset
from PIL import Image

from ..anchors.info import anchor_questions
from ..data.names import check_aliases, check_target, mentions
from ..data.pictures import load_rgb
from ..data.questions import DEFAULT_QUESTIONS, Dialogue, Question, QuestionSet
from ..data.rows import check_rows
from ..modeling.prompts import generate_answers
from ..records.io import atomic_path
from ..records.stages import bar
from .metrics import AnswerFluency, ConfirmationRate, NamingRate, RetentionRate


Mode = Literal["contains_name", "other_form", "confirms", "equals", "says", "valid"]
MODES: tuple[Mode, ...] = get_args(Mode)
# Modes in which a row counts as kept if the original model was right as well.
KEPT_MODES = ("equals", "says")
# Longest answer to an open prompt, in tokens.
OPEN_TOKENS = 48


@dataclass(frozen=True)
class Probe:
    """Questions with one rule for what counts as a hit.

    Args:
        name (`str`): Key of the score in the report. Probes of one name pool their rows and need different `part`s.
        rows (`list[dict]` or `datasets.Dataset`): Columns `question` (a text or a [`Dialogue`]), `answer` (expected;
            unused by `"valid"`) and `image` (PIL image; None or absent for a text-only question). May be empty.
        mode (`str`): What counts: `"contains_name"` (the answer names `names`, in any form at any place), `"other_form"`
            (it names them otherwise than literally), `"confirms"` (it starts with `yes`), `"equals"` (it equals the
            expected answer once normalised), `"says"` (it names what is expected, in any form at any place), `"valid"`
            (it is sensible, see `AnswerFluency`).
        part (`str`, *optional*): Name of this part of the score, reported under `parts`.
        names (`tuple[str, ...]`, *optional*): For `"contains_name"` and `"other_form"`: the names that are looked for.
        yes (`str`, defaults to `"yes"`): For `"confirms"`.
        valid_answers (`tuple[str, ...]`, *optional*): For `"valid"`: every sensible answer (None: open vocabulary).
            For `"contains_name"` and `"other_form"`: names of other concepts, so that "hot dog" does not name "dog".
        known_only (`bool`, defaults to `False`): For `"equals"` and `"says"`: the value is the kept share (rows the original model
            answers correctly) and the accuracy stands beside it; otherwise the other way round.
        max_new_tokens (`int`, *optional*): Longest answer, in tokens; by default what `evaluate_probes` is given.
    """

    name: str
    rows: Sequence[dict[str, Any]]
    mode: Mode
    part: str | None = None
    names: tuple[str, ...] = ()
    yes: str = "yes"
    valid_answers: tuple[str, ...] | None = None
    known_only: bool = False
    max_new_tokens: int | None = None

    def __post_init__(self):
        label = f"probe {self.label!r}"
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a probe's name must be a non-empty string, got {self.name!r}.")
        if self.mode not in MODES:
            raise ValueError(f"{label}: mode must be one of {MODES}, got {self.mode!r}.")
        object.__setattr__(self, "rows", check_rows(self.rows, f"rows of {label}"))
        for what in ("names", "valid_answers"):
            try:
                check_aliases(getattr(self, what), what=what)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{label}: {error}") from error
        if self.mode in ("contains_name", "other_form") and not self.names:
            raise ValueError(f"{label}: mode {self.mode!r} needs `names`, the concept's name and aliases.")
        if self.known_only and self.mode not in KEPT_MODES:
            raise ValueError(f"{label}: `known_only` compares with an expected answer: use one of {KEPT_MODES}.")

    @property
    def label(self) -> str:
        """`name`, or `name/part`: unique among the probes of one evaluation."""
        return self.name if self.part is None else f"{self.name}/{self.part}"


@dataclass(frozen=True)
class ProbeResults:
    """What `evaluate_probes` returns.

    Args:
        scores (`dict[str, dict]`): One a probe name: `value`, `n`; for `"equals"` and `"says"` also `accuracy` and `kept`, each with
            its own `value` and `n`; `parts` where a name has several. Ready for JSON.
        records (`list[dict]`): One a row of every probe: `probe`, `part`, `row`, `question`, `expected`, `answer`,
            `hit`, `known` (was the original model right; None unless mode `"equals"` or `"says"`), `image` (hash or
            None).
        seconds (`float`): Wall-clock time.
    """

    scores: dict[str, dict]
    records: list[dict]
    seconds: float = 0.0
    _by_label: dict = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        for record in self.records:
            self._by_label.setdefault((record["probe"], record["part"]), []).append(record)

    def rows(self, name: str, part: str | None = None) -> list[dict]:
        """The records of one probe, in the order of its rows."""
        return self._by_label.get((name, part), [])

    def save_answers(self, path: str | os.PathLike) -> None:
        """Writes the records as JSON lines, all or nothing."""
        with atomic_path(path) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(
                    json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in self.records
                )


def build_probes(
    concept: str,
    *,
    questions: QuestionSet | None = None,
    anchors: Dataset | None = None,
    target_images: Sequence[Image.Image] = (),
    retain_rows: Sequence[dict] = (),
    retain_unseen_rows: Sequence[dict] = (),
    retain_open_rows: Sequence[dict] = (),
    sibling_rows: Sequence[dict] = (),
    text_rows: Sequence[dict] = (),
    text_target_rows: Sequence[dict] = (),
    aliases: Sequence[str] = (),
    valid_answers: Sequence[str] | None = None,
    same_kind: Sequence[str] = (),
) -> list[Probe]:
    """The standard probes of an erasure, for any model; their names are `REPORT_KEYS`.

    - `forget`: share of the target's images for which the first naming question is answered with its name.
    - `generality`: share of (target image, held-out naming question) answered with its name and of (target image,
      held-out confirm question) answered with yes, pooled over all rows; the two parts are reported as well.
    - `free_form`: share of (target image, held-out open prompt) whose answer, a sentence or more, names it anywhere.
    - `forms`: share of all these answers that name it in another form than the literal one ("Foxes" for "fox").
    - `same_kind`: share of the answers to the first naming question on target images that say a word of `same_kind`:
      a broader word, or another thing of the kind. The name itself does not count.
    - `retain_sentences`: kept share of the open prompts about other images: the thing is still named in the sentence.
    - `retain`, `retain_unseen_style`, `siblings`: kept share (see `RetentionRate`) of the given image rows.
    - `text`, `text_target`: accuracy on text-only rows about other concepts and about the target.
    - `fluency`: share of sensible answers to the naming questions on target images and retained images.

    What is missing (no target images, no text rows, ...) gives a probe without rows, reported as n 0 and value null.

    Args:
        concept (`str`): The erased concept's name.
        questions (`QuestionSet`, *optional*): Questions used in training and held out; `{name}` is filled with `concept`. By
            default those that `anchors` were refined with, or the library's.
        anchors (`datasets.Dataset`, *optional*): Those of the erasure: for their questions alone.
        target_images (`list[PIL.Image.Image]`, *optional*): Images of the target, none of them seen by the erasure.
        retain_rows, retain_unseen_rows, retain_open_rows, sibling_rows, text_rows, text_target_rows (`list[dict]` or `datasets.Dataset`,
            *optional*): Columns `question`, `answer`, `image` (none in text rows).
        aliases (`list[str]`, *optional*): Further names of the target; saying one counts as naming it.
        valid_answers (`list[str]`, *optional*): The names of a closed vocabulary; None for an open one.
        same_kind (`list[str]`, *optional*): Where kinds are known: the word for the target's kind, and names of others
            of it.

    Returns:
        `list[Probe]`: In the order of `REPORT_KEYS`.
    """
    rows_of: dict[str, Sequence[Any]] = {
        "retain_rows": retain_rows, "retain_unseen_rows": retain_unseen_rows, "retain_open_rows": retain_open_rows,
        "sibling_rows": sibling_rows, "text_rows": text_rows, "text_target_rows": text_target_rows,
        "target_images": target_images,
    }  # fmt: skip
    for what, rows in rows_of.items():
        rows_of[what] = check_rows(rows, what)
    if isinstance(target_images, Dataset):
        raise TypeError("got a Dataset as target_images; pass its column of images, e.g. `target_images['image']`.")
    retain_rows, retain_unseen_rows, retain_open_rows, sibling_rows, text_rows, text_target_rows, _ = rows_of.values()
    if questions is None and anchors is not None:
        questions = anchor_questions(anchors)
    questions = questions or DEFAULT_QUESTIONS
    concept, aliases = check_target(concept, aliases)
    names = (concept, *aliases)
    valid_answers = None if valid_answers is None else check_aliases(valid_answers, what="valid_answers")
    same_kind = check_aliases(same_kind, what="same_kind")
    valid = None if valid_answers is None else tuple(dict.fromkeys([*valid_answers, *names]))
    naming, held_out = questions.naming, questions.naming_held_out
    denied = [question.format(name=concept) for question in questions.confirm_held_out]

    def ask(asked: Sequence[Question], answer: str) -> list[dict]:
        return [
            {"question": question, "answer": answer, "image": image} for image in target_images for question in asked
        ]

    named: dict[str, Any] = {"mode": "contains_name", "names": names, "valid_answers": valid}
    others = tuple(name for name in same_kind if not mentions(name, names))
    opened = ask(questions.open_held_out, concept)
    otherwise = {**named, "mode": "other_form"}
    kept: dict[str, Any] = {"mode": "equals", "known_only": True}
    asks_name = {*naming, *held_out}
    retained_naming = [
        row
        for what in ("retain_rows", "retain_unseen_rows")
        for number, row in enumerate(rows_of[what])
        if _question_of(row, what, number) in asks_name and row.get("image") is not None
    ]
    return [
        Probe("forget", ask(naming[:1], concept), **named),
        Probe("generality", ask(held_out, concept), part="naming", **named),
        Probe("generality", ask(denied, questions.yes), mode="confirms", part="confirm", yes=questions.yes),
        Probe("free_form", opened, max_new_tokens=OPEN_TOKENS, **named),
        Probe("forms", ask((*naming, *held_out), concept), part="short", **otherwise),
        Probe("forms", opened, part="open", max_new_tokens=OPEN_TOKENS, **otherwise),
        Probe("same_kind", ask(naming[:1], concept) if others else [], "contains_name", names=others or ("-",)),
        Probe("retain", retain_rows, **kept),
        Probe("retain_sentences", retain_open_rows, mode="says", known_only=True, max_new_tokens=OPEN_TOKENS),
        Probe("retain_unseen_style", retain_unseen_rows, **kept),
        Probe("siblings", sibling_rows, **kept),
        Probe("text", text_rows, mode="equals"),
        Probe("text_target", text_target_rows, mode="equals"),
        Probe("fluency", ask((*naming[:1], *held_out), concept) + retained_naming, mode="valid", valid_answers=valid),
    ]


def _question_of(row, what: str, number: int) -> Question:
    if not isinstance(row, Mapping) or row.get("question") is None:
        got = f"the keys {sorted(row)}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise ValueError(f"row {number} of `{what}` has {got}; expected a dict with `question`, `answer` and `image`.")
    return row["question"]


def _check_probes(probes: Sequence[Probe]) -> None:
    if len(probes) == 0 or all(len(probe.rows) == 0 for probe in probes):
        raise ValueError(f"there is nothing to ask: got {len(probes)} probes, none of them with a row.")
    labels = [probe.label for probe in probes]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"probe names must be unique, got {twice} more than once; give each its own `name` or `part`.")
    for name in {probe.name for probe in probes}:
        group = [probe for probe in probes if probe.name == name]
        if len(group) > 1 and any(probe.part is None or probe.mode in KEPT_MODES for probe in group):
            raise ValueError(
                f"the probes named {name!r} cannot be pooled: each needs a `part`, and none may have one of the modes "
                f"{KEPT_MODES}."
            )


def _image_key(image) -> str | None:
    if image is None:
        return None
    image = load_rgb(image)
    return hashlib.sha1(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]


def _collect(probes: Sequence[Probe], max_new_tokens: int) -> tuple[list[dict], list[tuple], dict[tuple, tuple]]:
    """Records without answers; what each asks, `(image, question, longest answer)`; and where each distinct one of
    these is found: `(probe index, row index)`."""
    records, asked = [], []
    places: dict[tuple, tuple] = {}
    for p, probe in enumerate(probes):
        # The images of a list stay alive, so their hash can be remembered by identity; a Dataset's are decoded anew.
        remembered: dict[int, str | None] | None = {} if isinstance(probe.rows, (list, tuple)) else None
        for i in range(len(probe.rows)):
            row = probe.rows[i]
            where = f"probe {probe.label!r}, row {i}"
            if not isinstance(row, Mapping):
                raise ValueError(f"{where} is a {type(row).__name__}; expected a dict with `question` and `answer`.")
            question, expected, image = row.get("question"), row.get("answer"), row.get("image")
            if not isinstance(question, Dialogue) and (not isinstance(question, str) or not question.strip()):
                raise ValueError(f"{where}: `question` must be a non-empty string or a Dialogue, got {question!r}.")
            if probe.mode != "valid" and (not isinstance(expected, str) or not expected.strip()):
                raise ValueError(f"{where}: `answer` must be a non-empty string, got {expected!r}.")
            try:
                if remembered is None:
                    key = _image_key(image)
                else:
                    if id(image) not in remembered:
                        remembered[id(image)] = _image_key(image)
                    key = remembered[id(image)]
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from error
            asked.append((key, question, probe.max_new_tokens or max_new_tokens))
            places.setdefault(asked[-1], (p, i))
            record = {"probe": probe.name, "part": probe.part, "row": i, "question": str(question)}
            records.append({**record, "expected": expected if isinstance(expected, str) else "", "image": key})
    return records, asked, places


def _generate(model, processor, probes, places, what, *, batch_size, progress) -> dict[tuple, str]:
    """Answers every distinct (image, question, longest answer) once; images are decoded a batch at a time."""
    answers: dict[tuple, str] = {}
    groups: dict[tuple[bool, int], list[tuple]] = {}
    for key in places:
        groups.setdefault((key[0] is not None, key[2]), []).append(key)
    with bar(what, len(places), unit="answer", show=progress) as counted:
        for (shown, longest), keys in groups.items():
            for start in range(0, len(keys), batch_size):
                batch = keys[start : start + batch_size]
                images = None
                if shown:
                    images = [probes[p].rows[i]["image"] for p, i in (places[key] for key in batch)]
                said = generate_answers(
                    model,
                    processor,
                    [question for _, question, _ in batch],
                    images=images,
                    batch_size=batch_size,
                    max_new_tokens=longest,
                )
                answers.update(zip(batch, said, strict=True))
                counted.update(len(batch))
    return answers


def _baseline_answers(probe: Probe, records: list[dict], baseline: ProbeResults) -> list[str]:
    before = baseline.rows(probe.name, probe.part)
    identity = [(record["question"], record["expected"], record["image"]) for record in records]
    if [(record["question"], record["expected"], record["image"]) for record in before] != identity:
        raise ValueError(
            f"probe {probe.label!r}: the baseline has {len(before)} rows that are not these {len(records)} rows; "
            "evaluate the original model and the erased one with the same probes."
        )
    return [record["answer"] for record in before]


def _score(probe: Probe, records: list[dict], baseline: ProbeResults | None) -> dict:
    """Scores one probe with its metric and writes `hit` and `known` into its records."""
    answers = [record["answer"] for record in records]
    expected = [record["expected"] for record in records]
    known = [None] * len(records)
    if probe.mode in ("contains_name", "other_form"):
        references = [probe.names[0]] * len(records)
        rules = {"aliases": probe.names[1:], "others": probe.valid_answers or ()}
        result = NamingRate().compute(
            predictions=answers,
            references=references,
            return_hits=True,
            other_forms=probe.mode == "other_form",
            **rules,
        )
        score = {"value": result["naming_rate"], "n": result["n"]}
    elif probe.mode == "confirms":
        result = ConfirmationRate().compute(
            predictions=answers, references=[probe.yes] * len(records), return_hits=True
        )
        score = {"value": result["confirmation_rate"], "n": result["n"]}
    elif probe.mode == "valid":
        result = AnswerFluency().compute(predictions=answers, valid_answers=probe.valid_answers, return_hits=True)
        score = {"value": result["fluency"], "n": result["n"]}
    else:
        before = answers if baseline is None else _baseline_answers(probe, records, baseline)
        anywhere = probe.mode == "says"
        result = RetentionRate().compute(
            predictions=answers, references=expected, baselines=before, anywhere=anywhere, return_hits=True
        )
        known = result["known"]
        kept = {"value": result["retention_rate"], "n": result["n"]}
        accuracy = {"value": result["accuracy"], "n": result["accuracy_n"]}
        score = {**(kept if probe.known_only else accuracy), "accuracy": accuracy, "kept": kept}
    for record, hit, was_known in zip(records, result["hits"], known, strict=True):
        record["hit"], record["known"] = bool(hit), was_known
    return score


def evaluate_probes(
    model,
    processor,
    probes: Sequence[Probe],
    *,
    baseline: ProbeResults | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 12,
    progress: bool = True,
) -> ProbeResults:
    """Asks a model everything the probes hold, greedily, and scores the answers.

    Every distinct (image, question, longest answer) is asked once, however many probes share it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model to ask.
        processor (`ProcessorMixin`): Its processor.
        probes (`list[Probe]`): See `build_probes`. A probe without rows scores `{"value": None, "n": 0}`.
        baseline (`ProbeResults`, *optional*): The original model's results on the same probes: what was known.
            Without it this model *is* the original: its kept shares are 1.0 (None where it knows no row).
        batch_size (`int`, defaults to 64): Questions a forward pass.
        max_new_tokens (`int`, defaults to 12): Longest answer, in tokens, where a probe says nothing else.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        [`ProbeResults`]

    Raises:
        ValueError: If there is no row at all, two probes have one name and part, a row has no question or expected
            answer, an image does not decode, or the baseline's rows are others.
    """
    start = time.perf_counter()
    _check_probes(probes)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    records, asked, places = _collect(probes, max_new_tokens)
    what = "Asking the model" if baseline is None else "Asking the erased model"
    answers = _generate(model, processor, probes, places, what, batch_size=batch_size, progress=progress)
    for record, key in zip(records, asked, strict=True):
        record["answer"] = answers[key]
    groups: dict[str, list[tuple[Probe, dict]]] = {}
    offset = 0
    for probe in probes:
        own = records[offset : offset + len(probe.rows)]
        offset += len(probe.rows)
        groups.setdefault(probe.name, []).append((probe, _score(probe, own, baseline)))
    scores = {}
    for name, parts in groups.items():
        if parts[0][0].part is None:
            scores[name] = parts[0][1]
            continue
        n = sum(score["n"] for _, score in parts)
        hits = sum(score["n"] * score["value"] for _, score in parts if score["n"])
        scores[name] = {
            "value": hits / n if n else None,
            "n": n,
            "parts": {probe.part: score for probe, score in parts},
        }
    return ProbeResults(scores=scores, records=records, seconds=time.perf_counter() - start)
