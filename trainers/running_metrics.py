"""What a trainer logs, kept where it was computed until it is logged: reading a value makes the host wait for a card."""

from __future__ import annotations

from collections.abc import Callable

import torch


class RunningMetrics:
    """Means, by key, of all values since the last `take`. Nothing is read from a device before that, and then at once."""

    def __init__(self) -> None:
        self._values: dict[str, list[torch.Tensor | Callable[[], torch.Tensor]]] = {}

    def add(self, key: str, value: torch.Tensor | Callable[[], torch.Tensor]) -> None:
        """Adds a scalar without gradient, or a function that computes one, called by `take`."""
        self._values.setdefault(key, []).append(value)

    def take(self) -> dict[str, float]:
        """The means, in the order in which their keys came; nothing is left."""
        values, self._values = self._values, {}
        flat = [value() if callable(value) else value for several in values.values() for value in several]
        if not flat:
            return {}
        numbers = iter(torch.stack([value.to(flat[0].device, torch.float32) for value in flat]).tolist())
        return {key: sum(next(numbers) for _ in several) / len(several) for key, several in values.items()}
