"""The command `space-peft`; importing it does not load torch."""

from .commands import main


__all__ = ["main"]
