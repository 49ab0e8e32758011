"""Who looks on while batches go through a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class BatchObserver(Protocol):
    """Entered for as long as somebody puts batches through a model, and told of every one of them."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: object) -> None: ...

    def before(self, batch: Mapping) -> dict:
        """Returns the batch as it is to be run.

        Args:
            batch (`dict[str, torch.Tensor]`): As the loader gave it, with its labels.
        """
        ...

    def after(self) -> None:
        """That batch was run. One that is not run after all is followed by the next."""
        ...
