"""Evaluation of an erasure: probes (what is asked), metrics (what counts), report (JSON and tables), plots.

Names are imported when first used, so that `import space_peft.evaluation` costs neither torch nor matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports


_EXPORTS = {
    "AnswerFluency": "metrics",
    "ConfirmationRate": "metrics",
    "NamingRate": "metrics",
    "RetentionRate": "metrics",
    "is_fluent": "metrics",
    "is_refusal": "metrics",
    "normalize_answer": "metrics",
    "same_answer": "metrics",
    "Probe": "probes",
    "ProbeResults": "probes",
    "REPORT_KEYS": "keys",
    "build_probes": "probes",
    "evaluate_probes": "probes",
    "answer_perplexity": "sentence_fluency",
    "judge_sentences": "sentence_fluency",
    "repetition": "sentence_fluency",
    "ErasureReport": "report",
    "collect_versions": "report",
    "plot_anchor_grid": "plots",
    "answer_page_rows": "plots",
    "plot_answer_page": "plots",
    "plot_sentence_page": "sentence_page",
    "sentence_page_rows": "sentence_page",
    "plot_probe_bars": "plots",
    "plot_spectrum": "plots",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)


if TYPE_CHECKING:
    from .keys import REPORT_KEYS
    from .metrics import (
        AnswerFluency,
        ConfirmationRate,
        NamingRate,
        RetentionRate,
        is_fluent,
        is_refusal,
        normalize_answer,
        same_answer,
    )
    from .plots import answer_page_rows, plot_anchor_grid, plot_answer_page, plot_probe_bars, plot_spectrum
    from .probes import Probe, ProbeResults, build_probes, evaluate_probes
    from .report import ErasureReport, collect_versions
    from .sentence_fluency import answer_perplexity, judge_sentences, repetition
    from .sentence_page import plot_sentence_page, sentence_page_rows
