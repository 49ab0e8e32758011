"""Erased, not muted: attacks that try to get a concept back out of an erased model.

Each is a plain function that works with any multimodal model of transformers and returns an `AttackResult`;
`AttackReport` holds several, as a table, a picture and JSON. Names are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports


_EXPORTS = {
    "AttackReport": "report",
    "AttackResult": "results",
    "AuditResult": "audit",
    "Search": "audit",
    "audit_concept": "audit",
    "ConfirmationResult": "confirmation",
    "confirmation_attack": "confirmation",
    "HINTS": "hints",
    "HintResult": "hints",
    "hint_attack": "hints",
    "LayerProbe": "linear_probe",
    "LinearProbeResult": "linear_probe",
    "linear_probes": "linear_probe",
    "PERTURBATIONS": "perturbation",
    "PerturbationResult": "perturbation",
    "perturbation_attack": "perturbation",
    "QuantizationResult": "quantization",
    "quantization_attack": "quantization",
    "quantize_weights": "quantization",
    "round_to_nearest": "quantization",
    "RelearningPoint": "relearning",
    "RelearningResult": "relearning",
    "relearning_curve": "relearning",
    "SoftPromptResult": "soft_prompt",
    "SoftSearch": "soft_prompt",
    "soft_prompt_attack": "soft_prompt",
    "plot_attacks": "report",
}


if TYPE_CHECKING:
    from .audit import AuditResult as AuditResult
    from .audit import Search as Search
    from .audit import audit_concept as audit_concept
    from .confirmation import ConfirmationResult as ConfirmationResult
    from .confirmation import confirmation_attack as confirmation_attack
    from .hints import HINTS as HINTS
    from .hints import HintResult as HintResult
    from .hints import hint_attack as hint_attack
    from .linear_probe import LayerProbe as LayerProbe
    from .linear_probe import LinearProbeResult as LinearProbeResult
    from .linear_probe import linear_probes as linear_probes
    from .perturbation import PERTURBATIONS as PERTURBATIONS
    from .perturbation import PerturbationResult as PerturbationResult
    from .perturbation import perturbation_attack as perturbation_attack
    from .quantization import QuantizationResult as QuantizationResult
    from .quantization import quantization_attack as quantization_attack
    from .quantization import quantize_weights as quantize_weights
    from .quantization import round_to_nearest as round_to_nearest
    from .relearning import RelearningPoint as RelearningPoint
    from .relearning import RelearningResult as RelearningResult
    from .relearning import relearning_curve as relearning_curve
    from .report import AttackReport as AttackReport
    from .report import plot_attacks as plot_attacks
    from .results import AttackResult as AttackResult
    from .soft_prompt import SoftPromptResult as SoftPromptResult
    from .soft_prompt import SoftSearch as SoftSearch
    from .soft_prompt import soft_prompt_attack as soft_prompt_attack
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
