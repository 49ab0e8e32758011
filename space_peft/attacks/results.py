"""What every attack returns: one headline figure with what it is compared to, and all the rest as details."""

from __future__ import annotations

import abc
from typing import ClassVar


class AttackResult(abc.ABC):
    """A finished attack on an erasure. In all of them a lower `value` means a deeper erasure."""

    name: ClassVar[str]
    """Key in `attacks.json`."""

    @abc.abstractmethod
    def summary(self) -> dict:
        """The headline: `value`, `control` and `before` (shares in [0, 1]; the latter two may be None), `n` (what the
        value is a share or a mean of) and `meaning` (a sentence)."""

    @abc.abstractmethod
    def details(self) -> dict:
        """Everything else that was measured and chosen; JSON values only."""

    def to_dict(self) -> dict:
        """The content of this attack's entry in `attacks.json`: the summary's keys and `details`."""
        return {**self.summary(), "details": self.details()}
