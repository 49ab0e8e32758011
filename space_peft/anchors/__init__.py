"""Text-guided proxy anchor selection (stage 1 of the method) and anchor refinement (stage 1b)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "CaptionEncoder": "encoders",
    "DualEncoder": "encoders",
    "Encoder": "encoders",
    "OwnSpaceEncoder": "encoders",
    "anchor_info": "info",
    "set_anchor_info": "info",
    "concept_embedding": "select",
    "select_anchors": "select",
    "select_random_anchors": "select",
    "refine_anchors": "refine",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__


if TYPE_CHECKING:
    from .encoders import CaptionEncoder, DualEncoder, Encoder, OwnSpaceEncoder
    from .info import anchor_info, set_anchor_info
    from .refine import refine_anchors
    from .select import concept_embedding, select_anchors, select_random_anchors
