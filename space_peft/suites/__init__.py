"""Suites: the field's unlearning protocols, and a user's own people, as one schema with one runner.

A *suite* is a set of people (or other concepts) with questions about them and the rules by which answers are scored. It is
called neither "benchmarks", which are this repository's own measurements, nor "evaluation", which probes one erasure: a suite
belongs to somebody else. `load_suite` reads one, `evaluate_suite` asks a model, `summarize` compares with a retain-only one.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_exports


_EXPORTS = {
    "Protocol": "schema",
    "Subject": "schema",
    "Suite": "schema",
    "SuiteQuestion": "schema",
    "load_suite": "load",
    "load_clear": "clear",
    "load_fiubench": "fiubench",
    "load_mllmu": "mllmu",
    "load_own": "own",
    "load_people": "people",
    "people_tables": "people",
    "PEOPLE_QUESTIONS": "people_questions",
    "load_vlm_unbench": "vlm_unbench",
    "SuiteReport": "report",
    "evaluate_suite": "runner",
    "subject_eligibility": "eligibility",
    "SuiteSummary": "summary",
    "summarize": "summary",
}


if TYPE_CHECKING:
    from .clear import load_clear as load_clear
    from .eligibility import subject_eligibility as subject_eligibility
    from .fiubench import load_fiubench as load_fiubench
    from .load import load_suite as load_suite
    from .mllmu import load_mllmu as load_mllmu
    from .own import load_own as load_own
    from .people import load_people as load_people
    from .people import people_tables as people_tables
    from .people_questions import PEOPLE_QUESTIONS as PEOPLE_QUESTIONS
    from .report import SuiteReport as SuiteReport
    from .runner import evaluate_suite as evaluate_suite
    from .schema import Protocol as Protocol
    from .schema import Subject as Subject
    from .schema import Suite as Suite
    from .schema import SuiteQuestion as SuiteQuestion
    from .summary import SuiteSummary as SuiteSummary
    from .summary import summarize as summarize
    from .vlm_unbench import load_vlm_unbench as load_vlm_unbench
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
