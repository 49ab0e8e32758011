"""What every attack returns: one headline figure with what it is compared to, and all the rest as details."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar

from .material import Material, Needs


# Below this the deployed model, which nobody has made forget anything, does not name the concept under the attack.
FOUND = 0.1


class AttackResult(abc.ABC):
    """A finished attack on an erasure. In all of them a lower `value` means a deeper erasure."""

    name: ClassVar[str]
    """Key in `attacks.json`."""
    label: ClassVar[str]
    """What the value is, for the rows of tables."""
    title: ClassVar[str]
    """Of its panel in the picture of all attacks."""
    needs: ClassVar[Needs]
    """What `make` cannot do without."""
    is_share: ClassVar[bool] = False
    """Whether the value is a share of `n` answers, which then has an interval; else it is a probability or an area."""
    stronger: ClassVar[str] = "ask about other pictures, which it does name before"
    """What to do if it says nothing, because it fails on the deployed model as well."""
    untested: ClassVar[tuple[str, str] | None] = None
    """What a card says of an erasure on which it was not tried: a name, and what is therefore not known. `None` if the
    evaluation asks the same already."""

    @classmethod
    @abc.abstractmethod
    def make(cls, model, processor, material: Material) -> AttackResult:
        """Makes the attack for `space-peft attack`, with what all are made with."""

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

    @classmethod
    def says_nothing(cls, entry: Mapping) -> bool:
        """Whether a finished attack was too weak to say anything: it fails on the deployed model, too.

        Args:
            entry (`dict`): As `to_dict` returns it, or as it was read from a file.
        """
        return entry["before"] is not None and max(entry["before"], entry["value"]) < FOUND

    def to_dict(self) -> dict:
        """The content of this attack's entry in `attacks.json`: the summary's keys and `details`."""
        return {**self.summary(), "details": self.details()}
