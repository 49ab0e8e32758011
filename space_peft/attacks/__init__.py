"""Erased, not muted: attacks that try to get a concept back out of an erased model.

Each is a plain function that works with any multimodal model of transformers and returns an `AttackResult`;
`AttackReport` holds several, as a table, a picture and JSON. Names are imported when first used.
"""

from .._lazy import lazy_exports


_EXPORTS = {
    "AttackReport": "report",
    "AttackResult": "results",
    "AuditResult": "audit",
    "Search": "audit",
    "audit_concept": "audit",
    "ConfirmationResult": "confirmation",
    "confirmation_attack": "confirmation",
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
    "plot_attacks": "report",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
