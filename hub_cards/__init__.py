"""Model cards of erased adapters, publishing them, loading them back and checking them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "erasure_card": "card",
    "write_card": "card",
    "load_erased": "load",
    "push_anchors": "anchors_dataset",
    "push_erasure": "push",
    "VerifyReport": "verify",
    "verify_erasure": "verify",
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
    from .anchors_dataset import push_anchors
    from .card import erasure_card, write_card
    from .load import load_erased
    from .push import push_erasure
    from .verify import VerifyReport, verify_erasure
