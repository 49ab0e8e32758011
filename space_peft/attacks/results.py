"""What every attack returns: one headline figure with what it is compared to, and all the rest as details."""

from __future__ import annotations

import abc
from typing import ClassVar


class AttackResult(abc.ABC):
    """A finished attack on an erasure. In all of them a lower `value` means a deeper erasure."""

    name: ClassVar[str]
    """Key in `attacks.json`."""
    label: ClassVar[str]
    """What the value is, for the rows of tables."""
    title: ClassVar[str]
    """Of its panel in the picture of all attacks."""
    is_share: ClassVar[bool] = False
    """Whether the value is a share of `n` answers, which then has an interval; else it is a probability or an area."""
    untested: ClassVar[tuple[str, str] | None] = None
    """What a card says of an erasure on which it was not tried: a name, and what is therefore not known. `None` if the
    evaluation asks the same already."""

    @abc.abstractmethod
    def summary(self) -> dict:
        """The headline: `value`, `control` and `before` (shares in [0, 1]; the latter two may be None), `n` (what the
        value is a share or a mean of) and `meaning` (a sentence)."""

    @abc.abstractmethod
    def details(self) -> dict:
        """Everything else that was measured and chosen; JSON values only."""

    @staticmethod
    @abc.abstractmethod
    def draw(axes, details: dict) -> None:
        """Draws its panel on matplotlib axes that reach from 0 to 1, from what `details` returned."""

    def to_dict(self) -> dict:
        """The content of this attack's entry in `attacks.json`: the summary's keys and `details`."""
        return {**self.summary(), "details": self.details()}
