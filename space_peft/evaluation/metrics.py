"""What counts as naming, confirming, keeping and answering sensibly; each rule as an `evaluate.Metric`.

The metrics are plain classes: `NamingRate().compute(predictions=[...], references=[...])` needs no hub, no network and,
with the default `keep_in_memory=True`, writes no file and takes no lock. `evaluate_probes` uses these very classes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import datasets
import evaluate

from ..data.names import MAX_NAME_LENGTH, check_aliases, check_concept, find_mentions, fold, mentions, word_edge


# How an answer declines, in normalised form; an answer that starts with one of these is a refusal.
REFUSALS = (
    "i don't know",
    "i do not know",
    "i don't recognize",
    "i do not recognize",
    "i'm not sure",
    "i am not sure",
    "i can't",
    "i cannot",
    "i'm unable",
    "i am unable",
    "i'm sorry",
    "i am sorry",
    "sorry",
    "unable to",
    "unknown",
    "unsure",
    "not sure",
    "none of these",
)
_ARTICLES = re.compile(r"^(?:a|an|the)\s+(?=\S)", re.IGNORECASE)
_ENDS = " .,;:!?\"'`*()[]{}<>-_"
_LEFTOVER = re.compile(r"<\|?/?[\w ]{1,30}\|?>|\[(?:unk|pad|cls|sep|mask|inst)\]")
_REPEATED_WORDS = re.compile(r"\b(\w+(?:\W+\w+){0,3}?)(?:\W+\1\b){2,}")
_REPEATED_CHARACTER = re.compile(r"([^\d\s])\1{4,}")


def normalize_answer(text: str) -> str:
    """Brings an answer to the form in which two answers are compared.

    Unicode NFKC, case folded, curly apostrophes straightened, blanks collapsed, punctuation at both ends and one
    leading English article removed: `" A  Wolf. "` becomes `"wolf"`.

    Args:
        text (`str`): The answer.

    Returns:
        `str`: The normalised answer, possibly empty.
    """
    return _ARTICLES.sub("", fold(text).strip(_ENDS))


def same_answer(answer: str, reference: str) -> bool:
    """Whether an answer is the reference and nothing else, by the rule that says whether it names it.

    Equal after `normalize_answer`, or the reference in another way to write it, of all those that `mentions` knows: "t - shirt"
    and "T-shirts" are the answer "t-shirt", "a red t-shirt" is not.

    Args:
        answer (`str`): What the model said.
        reference (`str`): What it is compared with.

    Returns:
        `bool`: True if they are the same.
    """
    said, wanted = normalize_answer(answer), normalize_answer(reference)
    if said == wanted or not said or not wanted:
        return said == wanted
    # In its own case: "Paris" is no plural.
    name = _ARTICLES.sub("", " ".join(reference.split()).strip(_ENDS))
    return len(name) <= MAX_NAME_LENGTH and find_mentions(said, [name]) == [(0, len(said))]


def confirms(answer: str, yes: str = "yes") -> bool:
    """Whether an answer starts with the word `yes`, whatever the case."""
    words, start = normalize_answer(answer), normalize_answer(yes)
    return re.match(re.escape(start) + (rf"(?!{edge})" if (edge := word_edge(start[-1])) else ""), words) is not None


def is_refusal(answer: str) -> bool:
    """Whether an answer starts by declining (see `REFUSALS`)."""
    text = normalize_answer(answer)
    return any(re.match(re.escape(start) + r"(?!\w)", text) for start in REFUSALS)


def is_fluent(answer: str) -> bool:
    """Whether an answer from an open vocabulary reads as language and not as garbage.

    It must hold a letter or digit; have no replacement, control, private-use or unassigned character and no special
    token (`<unk>`, `<|...|>`, `[PAD]`); repeat no character other than a digit five times running, and no group of one
    to four words three times running; and at least half of its non-blank characters must be letters, marks or digits.
    The rule is about form only: it does not ask whether the answer is true.

    Args:
        answer (`str`): The answer.

    Returns:
        `bool`: True if it passes all of them.
    """
    text = unicodedata.normalize("NFKC", answer).casefold().strip()
    solid = [c for c in text if not c.isspace()]
    if not any(c.isalnum() for c in solid) or "\ufffd" in text:
        return False
    if any(unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") for c in solid):
        return False
    if _LEFTOVER.search(text) or _REPEATED_CHARACTER.search(text) or _REPEATED_WORDS.search(text):
        return False
    return 2 * sum(unicodedata.category(c)[0] in "LMN" for c in solid) >= len(solid)


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if len(hits) else None


class _AnswerMetric(evaluate.Metric):
    """Common to all: string columns, and no files unless asked for.

    Args:
        keep_in_memory (`bool`, defaults to `True`): Keep the answers in memory. Set it to `False` for distributed use
            (`num_process > 1`); `evaluate` then writes Arrow files to its cache.
        kwargs (*optional*): Passed to `evaluate.Metric`.
    """

    columns: tuple[str, ...] = ("predictions", "references")

    def __init__(self, config_name=None, keep_in_memory: bool = True, **kwargs):
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _build_data_dir(self):
        # evaluate creates its cache folder even for metrics that never write: a read-only home would be an error.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions and references: lists of str, one an answer.",
            features=datasets.Features({column: datasets.Value("string") for column in self.columns}),
        )

    def compute(self, *, predictions=None, references=None, **kwargs):
        """`evaluate.Metric.compute`, after a check of the columns (strings, of one length; empty ones are allowed)."""
        columns = {"predictions": predictions, "references": references, **kwargs}
        given = {name: columns[name] for name in self.columns if columns.get(name) is not None}
        if len({len(values) for values in given.values()}) > 1:
            lengths = ", ".join(f"{len(values)} {name}" for name, values in given.items())
            raise ValueError(f"got {lengths}; expected the same number of each, one an answer.")
        for name, values in given.items():
            for i, value in enumerate(values):
                if not isinstance(value, str):
                    raise TypeError(f"`{name}` must be strings, got {value!r} at position {i}.")
        if not given and self.writer is None:
            raise ValueError(f"there is nothing to score: pass {', '.join(self.columns)}, or call `add_batch` first.")
        if given and len(next(iter(given.values()))) == 0 and self.writer is None:
            # evaluate cannot infer the features of an empty batch; nothing asked is a result too: n = 0.
            rules = {key: value for key, value in kwargs.items() if key not in self.columns}
            return self._compute(**{name: [] for name in self.columns}, **rules)
        return super().compute(predictions=predictions, references=references, **kwargs)


def _result(key: str, hits: Sequence[bool], return_hits: bool) -> dict:
    return {key: _share(hits), "n": len(hits), **({"hits": list(hits)} if return_hits else {})}


class NamingRate(_AnswerMetric):
    """Share of answers that name the concept (see `space_peft.data.names.mentions`): what an erasure brings to 0.

    `compute(predictions=answers, references=concept names, aliases=(), others=(), other_forms=False)` returns
    `{"naming_rate": float or None, "n": int}`; None without answers. `aliases` are further names of every reference.
    With `other_forms`, an answer counts that names the concept otherwise than literally: "Foxes" for "fox".
    """

    def _compute(self, predictions, references, aliases=(), others=(), other_forms=False, return_hits=False):
        def counts(answer: str, names: tuple[str, ...]) -> bool:
            if not other_forms:
                return mentions(answer, names, others)
            return any(answer[start:end] not in names for start, end in find_mentions(answer, names, others))

        # A blank name is in no answer: everything would count as forgotten.
        checked = {name: check_concept(name) for name in set(references)}
        aliases, others = check_aliases(aliases), check_aliases(others, what="others")
        hits = [counts(answer, (checked[name], *aliases)) for answer, name in zip(predictions, references, strict=True)]
        return _result("naming_rate", hits, return_hits)


class ConfirmationRate(_AnswerMetric):
    """Share of answers that start with yes: `references` hold the word for it, one an answer.

    `compute(predictions=answers, references=["yes", ...])` returns `{"confirmation_rate": float or None, "n": int}`.
    """

    def _compute(self, predictions, references, return_hits=False):
        hits = [confirms(answer, yes) for answer, yes in zip(predictions, references, strict=True)]
        return _result("confirmation_rate", hits, return_hits)


class RetentionRate(_AnswerMetric):
    """Share of the questions the original model answered correctly that are still answered correctly.

    A model that is right about 65 % of the images of an unseen style cannot be judged by raw accuracy: an erasure
    that changes nothing would score 0.65. Only the *known* rows count, those whose `baselines` (answers of the original
    model) equal the `references` (see `same_answer`); the accuracy over all rows is returned beside it.

    `compute(predictions=answers, references=expected, baselines=original answers, anywhere=False)` returns
    `{"retention_rate": float or None, "n": number of known rows, "accuracy": float or None, "accuracy_n": number of
    rows}`. No known row: None. With `anywhere`, an answer is right if it names the reference, in any form at any place
    (see `space_peft.data.names.mentions`): for answers in sentences.
    """

    columns = ("predictions", "references", "baselines")

    def _compute(self, predictions, references, baselines, anywhere=False, return_hits=False):
        def right(answer: str, reference: str) -> bool:
            return mentions(answer, [reference]) if anywhere else same_answer(answer, reference)

        hits = [right(answer, reference) for answer, reference in zip(predictions, references, strict=True)]
        known = [right(answer, reference) for answer, reference in zip(baselines, references, strict=True)]
        kept = [hit for hit, was_known in zip(hits, known, strict=True) if was_known]
        result = {"retention_rate": _share(kept), "n": len(kept), "accuracy": _share(hits), "accuracy_n": len(hits)}
        return {**result, "hits": hits, "known": known} if return_hits else result


class AnswerFluency(_AnswerMetric):
    """Share of sensible answers: a valid one or a refusal; without a list of valid ones, well-formed language.

    `compute(predictions=answers, valid_answers=None)` returns `{"fluency": float or None, "n": int}`. With
    `valid_answers` (closed vocabulary) an answer is sensible if it equals one of them (see `same_answer`), or
    is a well-formed refusal; without, if `is_fluent`.
    """

    columns = ("predictions",)

    def _compute(self, predictions, valid_answers=None, return_hits=False):
        if valid_answers is None:
            hits = [is_fluent(answer) for answer in predictions]
        else:
            if isinstance(valid_answers, (str, bytes)):
                raise TypeError(f"`valid_answers` must be a list of answers, got the single string {valid_answers!r}.")
            valid = {normalize_answer(answer) for answer in valid_answers}
            hits = [
                normalize_answer(answer) in valid
                or (is_refusal(answer) and is_fluent(answer))
                or any(same_answer(answer, other) for other in valid_answers)
                for answer in predictions
            ]
        return _result("fluency", hits, return_hits)
