"""Make a deployed multimodal LLM forget a concept without a single picture of it.

Importing this package imports nothing heavy: every public name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy_exports
from ._version import __version__ as __version__


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
    "AdapterArguments": "arguments",
    "Erasure": "erasing",
    "erase": "erasing",
    "get_space_config": "arguments",
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
    "Erasures": "several",
    "erase_several": "several",
}


if TYPE_CHECKING:
    from .anchors import anchor_info as anchor_info
    from .anchors import refine_anchors as refine_anchors
    from .anchors import select_anchors as select_anchors
    from .anchors import select_random_anchors as select_random_anchors
    from .arguments import AdapterArguments as AdapterArguments
    from .arguments import get_space_config as get_space_config
    from .config import SpaceLoraConfig as SpaceLoraConfig
    from .data.questions import Dialogue as Dialogue
    from .data.questions import QuestionSet as QuestionSet
    from .erasing import Erasure as Erasure
    from .erasing import erase as erase
    from .hub_cards import load_erased as load_erased
    from .hub_cards import push_erasure as push_erasure
    from .hub_cards import push_statistics as push_statistics
    from .hub_cards import verify_erasure as verify_erasure
    from .hub_cards.merge import merge_adapter as merge_adapter
    from .null_space import NullSpace as NullSpace
    from .null_space import NullSpaceFitter as NullSpaceFitter
    from .null_space import load_null_spaces as load_null_spaces
    from .null_space import save_null_spaces as save_null_spaces
    from .null_space.base_statistics import Statistics as Statistics
    from .null_space.base_statistics import load_statistics as load_statistics
    from .null_space.callback import NullSpaceCallback as NullSpaceCallback
    from .null_space.certificate import RetentionCertificate as RetentionCertificate
    from .null_space.certificate import measure_certificate as measure_certificate
    from .null_space.collecting import collect_statistics as collect_statistics
    from .null_space.fitting import fit_null_space as fit_null_space
    from .null_space.projection import attach_null_space as attach_null_space
    from .records.card_data import ErasureCardData as ErasureCardData
    from .retained.end_to_end import EndToEnd as EndToEnd
    from .retained.end_to_end import measure_end_to_end as measure_end_to_end
    from .retained.self_distillation import retained_answers as retained_answers
    from .retained.self_distillation import retained_texts as retained_texts
    from .several import Erasures as Erasures
    from .several import erase_several as erase_several
    from .trainers import CVFConfig as CVFConfig
    from .trainers import CVFTrainer as CVFTrainer
    from .trainers import ErasureLedger as ErasureLedger
    from .trainers import GradDiffConfig as GradDiffConfig
    from .trainers import GradDiffTrainer as GradDiffTrainer
    from .trainers import MMUnlearnerConfig as MMUnlearnerConfig
    from .trainers import MMUnlearnerTrainer as MMUnlearnerTrainer
    from .trainers import NPOConfig as NPOConfig
    from .trainers import NPOTrainer as NPOTrainer
    from .trainers import SpaceConfig as SpaceConfig
    from .trainers import SpaceTrainer as SpaceTrainer
    from .trainers import calibrate as calibrate
    from .trainers.concept_projection import project_concept as project_concept
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
    __all__.append("__version__")
