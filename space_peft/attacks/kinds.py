"""The attacks there are, in the order in which they are made and shown. A new one is its file and an entry here."""

from __future__ import annotations

from collections.abc import Iterable

from ..choices import did_you_mean
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


def check_attacks(names: Iterable[str] | None) -> list[str]:
    """Names of attacks; all of them by default.

    Raises:
        ValueError: If there is no such attack.
    """
    names = list(KINDS if names is None else dict.fromkeys(names))
    for name in names:
        if name not in KINDS:
            hint = did_you_mean(name, KINDS) or f"expected some of {', '.join(KINDS)}."
            raise ValueError(f"there is no attack {name!r}; {hint}")
    return names
