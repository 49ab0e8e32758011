"""Two sides of a ratio, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call, a GPU's queue included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> dict:
    """Ratio of the times of two pieces of work: the median over rounds of both, and each side's median."""
    pairs = [(seconds(ours), seconds(theirs)) if i % 2 else _swap(ours, theirs) for i in range(repeats)]
    return {
        "ratio": round(statistics.median(a / b for a, b in pairs), 4),
        "seconds": round(statistics.median(a for a, _ in pairs), 5),
        "seconds_reference": round(statistics.median(b for _, b in pairs), 5),
        "repeats": repeats,
    }


def _swap(ours, theirs) -> tuple[float, float]:
    # Whoever comes second finds warm caches: take turns at that, too.
    b = seconds(theirs)
    return seconds(ours), b
