"""Model cards of erased adapters, publishing them, loading them back and checking them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from space_peft._lazy import lazy_exports


_EXPORTS = {
    "erasure_card": "card",
    "write_card": "card",
    "load_erased": "load",
    "push_anchors": "anchors_dataset",
    "push_erasure": "push",
    "push_statistics": "base_statistics",
    "VerifyReport": "verify",
    "verify_erasure": "verify",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)


if TYPE_CHECKING:
    from .anchors_dataset import push_anchors
    from .base_statistics import push_statistics
    from .card import erasure_card, write_card
    from .load import load_erased
    from .push import push_erasure
    from .verify import VerifyReport, verify_erasure
