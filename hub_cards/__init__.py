"""Model cards of erased adapters."""

from .card import erasure_card, write_card


__all__ = ["erasure_card", "write_card"]
