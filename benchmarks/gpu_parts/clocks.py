"""Seconds, peak memory, synchronisations and kernels, on a card or without."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback


def timed(work: Callable[[], object], device: str) -> tuple[object, dict]:
    """What the work makes, and its seconds and the device's peak memory."""
    peak_reset(device)
    start = clock(device)
    made = work()
    return made, {"seconds": round(clock(device) - start, 4), "peak_gib": peak(device)}


class StepTimer(TrainerCallback):
    """Whole optimiser steps, from the beginning of one to that of the next, and the peak memory from the first."""

    def __init__(self, device: str):
        self._device = device
        self._start: float | None = None
        self.seconds: list[float] = []
        self.peak: float | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        now = clock(self._device)
        if self._start is None:
            peak_reset(self._device)
        else:
            self.seconds.append(now - self._start)
        self._start = now

    def on_train_end(self, args, state, control, **kwargs):
        self.peak = peak(self._device)


class CardAudit(TrainerCallback):
    """What a card itself says of the steps `first` and later: synchronisations by where, and kernels for float64.

    Args:
        first (`int`): Steps before it are not looked at.
    """

    def __init__(self, first: int):
        self.first = first
        self.own: dict[str, int] = {}
        self.doubles: dict[str, int] = {}
        self._caught = self._profiler = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step < self.first:
            return
        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profiler.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if self._caught is None:
            return
        torch.cuda.set_sync_debug_mode("default")
        self._profiler.__exit__(None, None, None)
        self._catch.__exit__(None, None, None)
        repository = str(Path(__file__).parents[2])
        for said in self._caught:
            ours = said.filename.startswith(repository) and "site-packages" not in said.filename
            if ours and "synchronizing" in str(said.message) and "benchmarks" not in said.filename:
                where = f"{Path(said.filename).name}:{said.lineno}"
                self.own[where] = self.own.get(where, 0) + 1
        for event in self._profiler.key_averages():
            if "double" in event.key or event.key.startswith(("dgemm", "cutlass_80_tensorop_d")):
                self.doubles[event.key[:120]] = self.doubles.get(event.key[:120], 0) + event.count
        self._caught = None


def clock(device: str) -> float:
    """Seconds, once the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_reset(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> float | None:
    """GiB held at most since `peak_reset`; `None` on a CPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None
