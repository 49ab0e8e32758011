"""The attacks there are, in the order in which they are shown. A new one is its file and an entry here."""

from __future__ import annotations

from .audit import AuditResult
from .confirmation import ConfirmationResult
from .hints import HintResult
from .linear_probe import LinearProbeResult
from .perturbation import PerturbationResult
from .quantization import QuantizationResult
from .relearning import RelearningResult
from .results import AttackResult
from .soft_prompt import SoftPromptResult


KINDS: dict[str, type[AttackResult]] = {
    kind.name: kind
    for kind in (
        AuditResult,
        RelearningResult,
        LinearProbeResult,
        QuantizationResult,
        ConfirmationResult,
        PerturbationResult,
        HintResult,
        SoftPromptResult,
    )
}
"""By the key in `attacks.json`."""
