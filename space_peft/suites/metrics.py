"""How one answer is scored: by letter, by the words of a blank, by keywords, by overlap with the right one."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from ..data.names import fold
from ..evaluation.metrics import normalize_answer
from .extras import require


_CALLED = r"\b(?:answer|option|choice|letter)\b(?:\s+(?:is|would be))?\s*[:\-]?\s*[\"'(\[*]*"
# Labels that are words as well: "a man", "I see".
_WORDY = ("a", "i")
_WORDS = re.compile(r"[^\W_]+")


def chosen_option(answer: str, options: Sequence[str], labels: Sequence[str]) -> int | None:
    """Which option an answer gives.

    A label counts that stands alone at the start ("B", "(b).", "B: Paris"), or after "answer", "option" or "choice"; so does
    the text of exactly one option, alone. A word that only begins with a label does not: "Cannot say" is not option C.

    Args:
        answer (`str`): As the model said it.
        options (`list[str]`): Their texts, in order.
        labels (`list[str]`): Their labels, in order.

    Returns:
        `int`: The option's number; None if the answer gives none.
    """
    labels = [label.lower() for label in labels[: len(options)]]
    folded = fold(answer).strip()
    # A label alone on the first line; folded, the lines are one.
    first = fold(answer.strip().partition("\n")[0]).strip(" .,:;()[]*\"'")
    if first in labels:
        return labels.index(first)
    one = "|".join(re.escape(label) for label in labels)
    start = re.match(rf"[\"'(\[*]*({one})(?=[.):,;\]\"'*])", folded)
    if start is None and (spaced := re.match(rf"({one})\s+(?!or\b|and\b)(.+)", folded)):
        # "A Paris" gives option A if it is Paris; "A man" is an article.
        text = options[labels.index(spaced[1])]
        start = spaced if spaced[1] not in _WORDY or normalize_answer(spaced[2]) == normalize_answer(text) else None
    for called in re.finditer(rf"{_CALLED}({one})(?!\w)(?P<more>\s+\w)?", folded) if start is None else ():
        if called[1] not in _WORDY or not called["more"]:
            start = called
            break
    if start is not None:
        return labels.index(start[1])
    said = [number for number, option in enumerate(options) if normalize_answer(option) == normalize_answer(answer)]
    return said[0] if len(said) == 1 else None


def says(answer: str, text: str) -> bool:
    """Whether an answer holds a text as whole words, whatever the case: "art" is not in "party"."""
    wanted = normalize_answer(text) or fold(text).strip()
    start, end = (r"(?<!\w)" if wanted[0].isalnum() else ""), (r"(?!\w)" if wanted[-1].isalnum() else "")
    return re.search(start + re.escape(wanted) + end, fold(answer)) is not None


def same(answer: str, text: str) -> bool:
    """Whether an answer is a text and nothing else, up to case, punctuation at its ends and an article."""
    return normalize_answer(answer) == normalize_answer(text)


def keyword_share(answer: str, keywords: Sequence[str]) -> float:
    """Share of the keywords that an answer holds as whole words."""
    return sum(says(answer, keyword) for keyword in keywords) / len(keywords)


class _Words:
    """`rouge-score`'s own tokenizer reads a-z and 0-9 only, and gives a name in other letters a ROUGE of 0.

    This one is the same for ASCII and reads letters and digits of any script.
    """

    def __init__(self):
        self._stem = functools.cache(require("nltk.stem.porter").PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        return [self._stem(word) if len(word) > 3 else word for word in _WORDS.findall(text.lower())]


@functools.cache
def _scorer():
    scorer = require("rouge_score.rouge_scorer").RougeScorer
    return scorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())


def rouge(answer: str, reference: str) -> dict[str, float]:
    """ROUGE of an answer, words stemmed.

    Returns:
        `dict`: `rouge_1`, `rouge_2`, `rouge_l` (F1) and `rouge_l_recall`.
    """
    scores = _scorer().score(reference, answer)
    return {
        "rouge_1": scores["rouge1"].fmeasure,
        "rouge_2": scores["rouge2"].fmeasure,
        "rouge_l": scores["rougeL"].fmeasure,
        "rouge_l_recall": scores["rougeL"].recall,
    }


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU of words between blanks, smoothed by method 1 (a small count where there is none)."""
    nltk_bleu = require("nltk.translate.bleu_score")
    smoothing = nltk_bleu.SmoothingFunction().method1
    return float(nltk_bleu.sentence_bleu([reference.split()], answer.split(), smoothing_function=smoothing))
