"""Text-guided proxy anchor selection (stage 1 of the method) and anchor refinement (stage 1b)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports


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


if TYPE_CHECKING:
    from .encoders import CaptionEncoder as CaptionEncoder
    from .encoders import DualEncoder as DualEncoder
    from .encoders import Encoder as Encoder
    from .encoders import OwnSpaceEncoder as OwnSpaceEncoder
    from .info import anchor_info as anchor_info
    from .info import set_anchor_info as set_anchor_info
    from .refine import refine_anchors as refine_anchors
    from .select import concept_embedding as concept_embedding
    from .select import select_anchors as select_anchors
    from .select import select_random_anchors as select_random_anchors
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
