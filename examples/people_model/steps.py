"""A stage of training that counts steps, draws each step's randomness from its number, and can go on where it stopped."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from warm_start import build_optimizer, cosine_schedule


def generator_of(name: str, seed: int, step: int) -> torch.Generator:
    """The randomness of one step: the same whether or not the run was interrupted before it."""
    return torch.Generator().manual_seed(zlib.crc32(f"{name}/{seed}/{step}".encode()))


class Stage:
    """One stage of training.

    A subclass has `name`, `model`, `parameters()` (what is trained) and `loss(step)`.

    Args:
        steps (`int`): Optimiser steps.
        lr (`float`): Peak learning rate.
        seed (`int`): Of everything random.
        more (*optional*): What else a state must have been made with to be gone on from.
    """

    name: str
    model: nn.Module

    def __init__(self, *, steps: int, lr: float, seed: int, **more):
        self.steps, self.lr, self.seed, self.more = steps, lr, seed, more

    def parameters(self) -> Iterator[nn.Parameter]:
        raise NotImplementedError

    def loss(self, step: int) -> torch.Tensor:
        raise NotImplementedError

    def settings(self) -> dict:
        """What a state must have been made with to be gone on from."""
        return {"stage": self.name, "steps": self.steps, "lr": self.lr, "seed": self.seed, **self.more}

    def run(self, state: Path, *, save_every: int = 50, log_every: int = 20, stop_after: int | None = None) -> bool:
        """Trains, from the state in a file if there is one.

        Args:
            state (`Path`): File that holds weights, optimiser and number of steps taken.
            save_every (`int`, defaults to 50): Steps between two states.
            log_every (`int`, defaults to 20): Steps between two lines.
            stop_after (`int`, *optional*): Stop after so many steps of this call, with the state written.

        Returns:
            `bool`: Whether the stage is complete.

        Raises:
            ValueError: If the state is of other settings.
        """
        parameters = list(self.parameters())
        optimizer = build_optimizer(parameters, self.lr)
        start = self._resume(state, parameters, optimizer)
        end = self.steps if stop_after is None else min(self.steps, start + stop_after)
        self.model.train()
        begun, busy = time.perf_counter(), time.process_time()
        for step in range(start, end):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * cosine_schedule(step + 1, self.steps)
            loss = self.loss(step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % log_every == 0 or step + 1 == end:
                seconds, cpu = time.perf_counter() - begun, time.process_time() - busy
                print(
                    f"{self.name} {step + 1}/{self.steps} loss {loss.item():.3f} {seconds:.0f} s, {cpu:.0f} s of cores",
                    flush=True,
                )
            if (step + 1) % save_every == 0 or step + 1 == end:
                self._save(state, step + 1, parameters, optimizer)
        self.model.eval()
        return end == self.steps

    def _save(self, state: Path, step: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        content = {
            "settings": self.settings(),
            "step": step,
            "model": self.model.state_dict(),
            "parameters": [parameter.detach() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
        }
        state.parent.mkdir(parents=True, exist_ok=True)
        scratch = state.with_suffix(".tmp")
        torch.save(content, scratch)
        scratch.replace(state)

    def _resume(self, state: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        if not state.is_file():
            return 0
        content = torch.load(state)
        if content["settings"] != self.settings():
            raise ValueError(
                f"{state} was made with {content['settings']}, expected {self.settings()}: remove it to start anew."
            )
        self.model.load_state_dict(content["model"])
        with torch.no_grad():
            # Heads that are thrown away are no part of the model.
            for parameter, stored in zip(parameters, content["parameters"], strict=True):
                parameter.copy_(stored)
        optimizer.load_state_dict(content["optimizer"])
        return content["step"]
