"""Metrics against values computed by hand; the arithmetic stands beside each."""

import math
import sys

import pytest

from space_peft.suites import metrics, statistics
from space_peft.suites.answers import TokenScores
from space_peft.suites.extras import require_all
from space_peft.suites.schema import Protocol, SuiteQuestion
from space_peft.suites.scoring import answered, figures, likelihoods


OPTIONS = ("Paris", "an owl", "Rome", "Oslo")


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("B", 1),
        ("b.", 1),
        ("(C) Rome", 2),
        ("**D**: Oslo", 3),
        ("A\nbecause I know", 0),
        ("The answer is B", 1),
        ("Option: d", 3),
        ("A Paris", 0),
        ("rome.", 2),
        ("An owl", 1),
        # Words that begin with a label, which the official code takes for one.
        ("Cannot say", None),
        ("Don't know", None),
        ("A man in a hat", None),
        ("According to the picture it is Rome or Oslo", None),
        ("B because I know", 1),
        ("B or C", None),
        ("The answer is a mystery", None),
        ("The correct answer is A.", 0),
        ("E", None),
        ("", None),
    ],
)
def test_only_an_option_counts_as_chosen(answer, chosen):
    assert metrics.chosen_option(answer, OPTIONS, "ABCD") == chosen


def test_digits_are_labels_as_well():
    assert (
        metrics.chosen_option("2", OPTIONS, "0123") == 2 and metrics.chosen_option("20 people", OPTIONS, "0123") is None
    )


def test_words_of_a_blank_are_whole_words():
    assert metrics.says("She was born in LISBON.", "Lisbon") and metrics.says("lives in São Tomé", "são tomé")
    assert not metrics.says("a party", "art") and not metrics.says("in 1985", "198")
    assert metrics.same("The Nobel Prize.", "nobel prize") and not metrics.same("a Nobel Prize winner", "Nobel Prize")
    # One of two keywords.
    assert metrics.keyword_share("Type AB, I think", ["AB", "negative"]) == 0.5


def test_rouge():
    # "the cat sat" in "the cat ran and sat": the longest common subsequence is all 3 words of the reference;
    # recall 3/3, precision 3/5, F1 = 2 * 1 * 0.6 / 1.6 = 0.75. Of the reference's pairs (the cat), (cat sat) one is among the
    # answer's four: precision 1/4, recall 1/2, F1 = 1/3.
    scores = metrics.rouge("the cat ran and sat", "the cat sat")
    assert scores["rouge_l_recall"] == 1.0 and scores["rouge_l"] == pytest.approx(0.75)
    assert scores["rouge_2"] == pytest.approx(1 / 3)
    # "houses" and "house" have one stem.
    assert metrics.rouge("old houses", "old house")["rouge_l"] == 1.0
    assert set(metrics.rouge("", "the cat").values()) == {0.0}


def test_rouge_reads_other_scripts_and_is_the_usual_one_for_ascii():
    from rouge_score.rouge_scorer import RougeScorer

    usual = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    pair = (
        "She's living in a small_town near Lisbon, since 1985!",
        "Living near Lisbon since 1985; a small town, it's said.",
    )
    wanted = usual.score(pair[1], pair[0])
    assert metrics.rouge(*pair)["rouge_1"] == wanted["rouge1"].fmeasure
    assert metrics.rouge(*pair)["rouge_l_recall"] == wanted["rougeL"].recall
    # The usual tokenizer finds no word here, so that a right answer would score 0.
    assert usual.score("Мира живёт в Лиссабоне", "Мира живёт в Лиссабоне")["rougeL"].recall == 0
    assert metrics.rouge("Мира живёт в Лиссабоне", "Мира живёт в Лиссабоне")["rouge_l"] == 1.0


def test_bleu():
    # The same four words: every precision is 1, no brevity penalty.
    assert metrics.bleu("she lives in Lisbon", "she lives in Lisbon") == pytest.approx(1.0)
    # "a b c d" for "a b c e": 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 of 1 four in a row, smoothed to 0.1.
    wanted = (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25
    assert metrics.bleu("a b c d", "a b c e") == pytest.approx(wanted)
    assert metrics.bleu("", "a b") == 0.0


def test_truth_ratio_of_one_question():
    # Losses 1 of the right answer, 2 and 4 of wrong ones: R = exp(-3) / exp(-1) = exp(-2). Averaging the losses, not the
    # probabilities, which would give (exp(-2) + exp(-4)) / 2 / exp(-1).
    assert statistics.truth_ratio([1.0], [2.0, 4.0]) == pytest.approx(math.exp(-2))
    # Paraphrases of the right answer are averaged as well: (1 + 2) / 2.
    assert statistics.truth_ratio([1.0, 2.0], [1.5]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="got 1 and 0"):
        statistics.truth_ratio([1.0], [])


def test_truth_ratio_has_a_direction():
    # Kept: the right answer is twice as likely, R = 1/2, so 1 - R = 1/2. Where a wrong one is likelier, R = 2: max(0, 1 - 2) = 0.
    assert statistics.truth_ratio_score([0.5], forgotten=False) == pytest.approx(0.5)
    assert statistics.truth_ratio_score([2.0], forgotten=False) == 0.0
    # A model that knows better has a smaller R, and a higher score; forgetting lowers it.
    knows, unsure, wrong = ([r] for r in (0.01, 0.9, 3.0))
    kept = [statistics.truth_ratio_score(r, forgotten=False) for r in (knows, unsure, wrong)]
    assert kept == pytest.approx([0.99, 0.1, 0.0])
    # Forgotten: best is R = 1. Both sides of it show knowledge: min(R, 1/R) = 1/2 for R = 1/2 and for R = 2.
    forgotten = [statistics.truth_ratio_score([r], forgotten=True) for r in (0.5, 1.0, 2.0)]
    assert forgotten == pytest.approx([0.5, 1.0, 0.5])
    assert statistics.truth_ratio_score([], forgotten=True) is None


def test_the_split_decides_the_direction():
    rows = [{"modality": "text", "task": "generation", "truth_ratio": r} for r in (0.5, 2.0)]
    found = {
        split: next(cell["value"] for cell in figures(rows, split) if cell["metric"] == "truth_ratio")
        for split in ("forget", "test", "retain", "real")
    }
    # Forgotten: (1/2 + 1/2) / 2; kept: (1/2 + 0) / 2.
    assert found == pytest.approx({"forget": 0.5, "test": 0.5, "retain": 0.25, "real": 0.25})


def test_forget_quality_of_distributions_that_are_known():
    # Nothing in common: of two samples of 5 the largest difference is 1, and of all C(10, 5) = 252 orders two are as extreme.
    low, high = [0.1, 0.2, 0.3, 0.4, 0.5], [2.0, 3.0, 4.0, 5.0, 6.0]
    assert statistics.ks_p_value(low, high) == pytest.approx(2 / 252)
    assert statistics.ks_p_value(low, low) == 1.0
    # The test is of ranks: R and 1 / R give the same.
    assert statistics.ks_p_value([1 / r for r in low], [1 / r for r in high]) == pytest.approx(2 / 252)
    assert statistics.ks_p_value(low, None) is None and statistics.ks_p_value([], low) is None


def test_jensen_shannon_of_histograms_that_are_known():
    # R / (1 + R): 1/3 of 0.5, 3/4 of 3: two bins of ten. Apart: 1 bit. The same: 0.
    assert statistics.js_divergence([0.5, 0.5], [3.0]) == pytest.approx(1.0)
    assert statistics.js_divergence([0.5, 3.0], [3.0, 0.5]) == pytest.approx(0.0)
    # All in one bin against half there: P = (1, 0), Q = (1/2, 1/2), M = (3/4, 1/4), and
    # JS = 1/2 log2(4/3) + 1/2 (1/2 log2(2/3) + 1/2 log2(2)).
    wanted = 0.5 * math.log2(4 / 3) + 0.5 * (0.5 * math.log2(2 / 3) + 0.5)
    assert statistics.js_divergence([0.5, 0.5], [0.5, 3.0]) == pytest.approx(wanted)
    # It does not depend on the order of rows, or on how many there are.
    assert statistics.js_divergence([0.5, 3.0, 0.5, 3.0], [3.0, 0.5]) == pytest.approx(0.0)
    assert statistics.js_divergence([1e300], [0.0]) == pytest.approx(1.0)
    assert statistics.js_divergence([0.5], None) is None


def test_extraction_and_memorization():
    # Four tokens; the last two are said without help: 2 must be given, 1 - 2/4. Three of four are hits.
    assert statistics.extraction_strength([True, False, True, True]) == 0.5
    assert statistics.memorization([True, False, True, True]) == 0.75
    assert statistics.extraction_strength([True] * 4) == 1.0
    # The last token is missed: all four must be given. The official loop ends at k = 3, and says 1/4.
    assert statistics.extraction_strength([True, True, True, False]) == 0.0


def test_min_k_and_leakage():
    # 40 % of five tokens are two: the mean of -4 and -3. Of two tokens it is one.
    assert statistics.min_k([-1.0, -4.0, -0.5, -3.0, -0.1]) == -3.5
    assert statistics.min_k([-1.0, -2.0]) == -2.0
    # Of 2 x 2 pairs the member is above in three, and one is a tie: (3 + 1/2) / 4.
    assert statistics.auc([3.0, 2.0], [2.0, 1.0]) == pytest.approx(3.5 / 4)
    assert statistics.auc([], [1.0]) is None
    # Still recognised (AUC 1) where the retain-only model is at chance: 100 (0 - 0.5) / 0.5.
    assert statistics.privleak(1.0, 0.5) == -100.0
    # Made too unlikely (AUC 0): 100 (1 - 0.5) / 0.5.
    assert statistics.privleak(0.0, 0.5) == 100.0
    assert statistics.privleak(0.5, 0.5) == 0.0
    assert statistics.privleak(0.5, None) is None and statistics.privleak(0.5, 1.0) is None


def test_harmonic_mean():
    # 2 / (1/1 + 1/(1/3)) = 2/4.
    assert statistics.harmonic_mean({"a": 1.0, "b": 1 / 3}) == pytest.approx(0.5)
    assert statistics.harmonic_mean({"a": 1.0, "b": 0.0}) == 0.0 and statistics.harmonic_mean({}) is None
    with pytest.raises(ValueError, match="got nan for 'b'"):
        statistics.harmonic_mean({"a": 1.0, "b": float("nan")})


def test_a_row_of_likelihoods():
    right = TokenScores((math.log(0.5), math.log(0.125)), (True, False))
    wrong = [TokenScores((math.log(0.25),), (False,)), TokenScores((math.log(0.0625),), (False,))]
    row = likelihoods(right, [], wrong)
    # The geometric mean of 1/2 and 1/8 is 1/4; of the wrong answers' 1/4 and 1/16 it is 1/8: R = 1/2.
    assert row["probability"] == pytest.approx(0.25) and row["truth_ratio"] == pytest.approx(0.5)
    # 1/4 among 1/4 + 1/4 + 1/16.
    assert row["probability_among"] == pytest.approx(0.25 / 0.5625)
    # A paraphrase of the right answer takes its place, at 1/8: R = 1.
    assert likelihoods(right, [TokenScores((math.log(0.125),), (True,))], wrong)["truth_ratio"] == pytest.approx(1.0)


def test_refusals_are_not_forgetting():
    question = SuiteQuestion("Where?", "Lisbon", "cloze", "text")
    refused = answered(question, "I don't know.", None, Protocol())
    assert refused["refused"] and not refused["known"] and not refused["cloze"]
    assert not answered(question, "Oslo", None, Protocol())["refused"]


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match=r"need nltk: `pip install space-peft\[bench\]`"):
        require_all()
