"""Evaluation of an erasure: probes (what is asked), metrics (what counts), report (JSON and tables), plots.

Names are imported when first used, so that `import space_peft.evaluation` costs neither torch nor matplotlib.
"""

import importlib


_EXPORTS = {
    "AnswerFluency": "metrics",
    "ConfirmationRate": "metrics",
    "NamingRate": "metrics",
    "RetentionRate": "metrics",
    "is_fluent": "metrics",
    "is_refusal": "metrics",
    "normalize_answer": "metrics",
    "Probe": "probes",
    "ProbeResults": "probes",
    "REPORT_KEYS": "probes",
    "build_probes": "probes",
    "evaluate_probes": "probes",
    "ErasureReport": "report",
    "collect_versions": "report",
    "plot_anchor_grid": "plots",
    "answer_page_rows": "plots",
    "plot_answer_page": "plots",
    "plot_probe_bars": "plots",
    "plot_spectrum": "plots",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
