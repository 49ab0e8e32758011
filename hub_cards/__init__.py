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


if TYPE_CHECKING:
    from .anchors_dataset import push_anchors as push_anchors
    from .base_statistics import push_statistics as push_statistics
    from .card import erasure_card as erasure_card
    from .card import write_card as write_card
    from .load import load_erased as load_erased
    from .push import push_erasure as push_erasure
    from .verify import VerifyReport as VerifyReport
    from .verify import verify_erasure as verify_erasure
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
