"""Make a deployed multimodal LLM forget a concept without a single picture of it.

Importing this package imports nothing heavy: every public name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy_exports


__version__ = "0.1.0"

_EXPORTS = {
    "SpaceLoraConfig": "config",
    "NullSpace": "null_space",
    "NullSpaceFitter": "null_space",
    "load_null_spaces": "null_space",
    "save_null_spaces": "null_space",
    "fit_null_space": "fitting",
    "Statistics": "statistics",
    "collect_statistics": "statistics",
    "load_statistics": "statistics",
    "NullSpaceCallback": "callback",
    "attach_null_space": "projection",
    "RetentionCertificate": "certificate",
    "measure_certificate": "certificate",
    "merge_adapter": "merge",
    "Dialogue": "questions",
    "QuestionSet": "questions",
    "anchor_info": "anchors",
    "refine_anchors": "anchors",
    "select_anchors": "anchors",
    "select_random_anchors": "anchors",
    "project_concept": "concept_projection",
    "retained_answers": "self_distillation",
    "retained_texts": "self_distillation",
    "ErasureCardData": "card_data",
    "load_erased": "hub_cards",
    "push_erasure": "hub_cards",
    "verify_erasure": "hub_cards",
    "CVFConfig": "trainers",
    "CVFTrainer": "trainers",
    "ErasureLedger": "trainers",
    "GradDiffConfig": "trainers",
    "GradDiffTrainer": "trainers",
    "MMUnlearnerConfig": "trainers",
    "MMUnlearnerTrainer": "trainers",
    "NPOConfig": "trainers",
    "NPOTrainer": "trainers",
    "SpaceConfig": "trainers",
    "SpaceTrainer": "trainers",
    "calibrate": "trainers",
    "EndToEnd": "end_to_end",
    "measure_end_to_end": "end_to_end",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
__all__.append("__version__")


if TYPE_CHECKING:
    from .anchors import anchor_info, refine_anchors, select_anchors, select_random_anchors
    from .callback import NullSpaceCallback
    from .card_data import ErasureCardData
    from .certificate import RetentionCertificate, measure_certificate
    from .concept_projection import project_concept
    from .config import SpaceLoraConfig
    from .end_to_end import EndToEnd, measure_end_to_end
    from .fitting import fit_null_space
    from .hub_cards import load_erased, push_erasure, verify_erasure
    from .merge import merge_adapter
    from .null_space import NullSpace, NullSpaceFitter, load_null_spaces, save_null_spaces
    from .projection import attach_null_space
    from .questions import Dialogue, QuestionSet
    from .self_distillation import retained_answers, retained_texts
    from .statistics import Statistics, collect_statistics, load_statistics
    from .trainers import (
        CVFConfig,
        CVFTrainer,
        ErasureLedger,
        GradDiffConfig,
        GradDiffTrainer,
        MMUnlearnerConfig,
        MMUnlearnerTrainer,
        NPOConfig,
        NPOTrainer,
        SpaceConfig,
        SpaceTrainer,
        calibrate,
    )
