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


if TYPE_CHECKING:
    from .keys import REPORT_KEYS as REPORT_KEYS
    from .metrics import AnswerFluency as AnswerFluency
    from .metrics import ConfirmationRate as ConfirmationRate
    from .metrics import NamingRate as NamingRate
    from .metrics import RetentionRate as RetentionRate
    from .metrics import is_fluent as is_fluent
    from .metrics import is_refusal as is_refusal
    from .metrics import normalize_answer as normalize_answer
    from .metrics import same_answer as same_answer
    from .plots import answer_page_rows as answer_page_rows
    from .plots import plot_anchor_grid as plot_anchor_grid
    from .plots import plot_answer_page as plot_answer_page
    from .plots import plot_probe_bars as plot_probe_bars
    from .plots import plot_spectrum as plot_spectrum
    from .probes import Probe as Probe
    from .probes import ProbeResults as ProbeResults
    from .probes import build_probes as build_probes
    from .probes import evaluate_probes as evaluate_probes
    from .report import ErasureReport as ErasureReport
    from .report import collect_versions as collect_versions
    from .sentence_fluency import answer_perplexity as answer_perplexity
    from .sentence_fluency import judge_sentences as judge_sentences
    from .sentence_fluency import repetition as repetition
    from .sentence_page import plot_sentence_page as plot_sentence_page
    from .sentence_page import sentence_page_rows as sentence_page_rows
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
