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

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)


if TYPE_CHECKING:
    from .audit import AuditResult, Search, audit_concept
    from .confirmation import ConfirmationResult, confirmation_attack
    from .hints import HINTS, HintResult, hint_attack
    from .linear_probe import LayerProbe, LinearProbeResult, linear_probes
    from .perturbation import PERTURBATIONS, PerturbationResult, perturbation_attack
    from .quantization import QuantizationResult, quantization_attack, quantize_weights, round_to_nearest
    from .relearning import RelearningPoint, RelearningResult, relearning_curve
    from .report import AttackReport, plot_attacks
    from .results import AttackResult
    from .soft_prompt import SoftPromptResult, SoftSearch, soft_prompt_attack
