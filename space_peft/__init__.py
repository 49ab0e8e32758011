"""Make a deployed multimodal LLM forget a concept without a single picture of it.

Importing this package imports nothing heavy: every public name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy_exports
from ._version import __version__


_EXPORTS = {
    "SpaceLoraConfig": "config",
    "NullSpace": "null_space",
    "NullSpaceFitter": "null_space",
    "load_null_spaces": "null_space",
    "save_null_spaces": "null_space",
    "fit_null_space": "null_space.fitting",
    "Statistics": "null_space.base_statistics",
    "load_statistics": "null_space.base_statistics",
    "collect_statistics": "null_space.collecting",
    "NullSpaceCallback": "null_space.callback",
    "attach_null_space": "null_space.projection",
    "RetentionCertificate": "null_space.certificate",
    "measure_certificate": "null_space.certificate",
    "merge_adapter": "hub_cards.merge",
    "Dialogue": "data.questions",
    "QuestionSet": "data.questions",
    "anchor_info": "anchors",
    "refine_anchors": "anchors",
    "select_anchors": "anchors",
    "select_random_anchors": "anchors",
    "project_concept": "trainers.concept_projection",
    "retained_answers": "retained.self_distillation",
    "retained_texts": "retained.self_distillation",
    "ErasureCardData": "records.card_data",
    "AdapterArguments": "erasing",
    "Erasure": "erasing",
    "erase": "erasing",
    "get_space_config": "erasing",
    "load_erased": "hub_cards",
    "push_erasure": "hub_cards",
    "push_statistics": "hub_cards",
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
    "EndToEnd": "retained.end_to_end",
    "measure_end_to_end": "retained.end_to_end",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
__all__.append("__version__")


if TYPE_CHECKING:
    from .anchors import anchor_info, refine_anchors, select_anchors, select_random_anchors
    from .config import SpaceLoraConfig
    from .data.questions import Dialogue, QuestionSet
    from .erasing import AdapterArguments, Erasure, erase, get_space_config
    from .hub_cards import load_erased, push_erasure, push_statistics, verify_erasure
    from .hub_cards.merge import merge_adapter
    from .null_space.base_statistics import Statistics, load_statistics
    from .null_space.callback import NullSpaceCallback
    from .null_space.certificate import RetentionCertificate, measure_certificate
    from .null_space.collecting import collect_statistics
    from .null_space.fitting import fit_null_space
    from .null_space.moments import NullSpaceFitter
    from .null_space.projection import attach_null_space
    from .null_space.space import NullSpace, load_null_spaces, save_null_spaces
    from .records.card_data import ErasureCardData
    from .retained.end_to_end import EndToEnd, measure_end_to_end
    from .retained.self_distillation import retained_answers, retained_texts
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
    from .trainers.concept_projection import project_concept
