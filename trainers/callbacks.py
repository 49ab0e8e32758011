"""The stopping rule and the check that every adapted layer learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from space_peft.distributed.processes import gradient_norms
from space_peft.distributed.zero import gradient_norms as partitioned_gradient_norms
from space_peft.distributed.zero import zero_optimizer
from space_peft.modeling.layers import adapted_layers

from .given_adapter import ADAPTER


if TYPE_CHECKING:
    from .forget_rows import ForgetRows


class ForgottenStoppingCallback(TrainerCallback, ExportableState):
    """Stops training when the refined anchors no longer say the name.

    The rule needs nothing of the target but the anchors: a running mean of the largest p(name) of each step,
    `v <- smoothing * v + (1 - smoothing) * max p(name)` from v = 1, falls below `threshold`.

    Args:
        threshold (`float`, defaults to 0.02): In (0, 1).
        smoothing (`float`, defaults to 0.7): In [0, 1).
    """

    def __init__(self, threshold: float = 0.02, smoothing: float = 0.7):
        self.threshold = threshold
        self.smoothing = smoothing
        self.value = 1.0
        self._seen: list[torch.Tensor] = []  # of this step, where they were computed

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed run must stop at the step the uninterrupted one stops at; Trainer restores callbacks only on request.
        self.value, self._seen = 1.0, []
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step > 0 else None
        if saved:
            saved = saved[-1] if isinstance(saved, list) else saved  # the latest
            self.value = saved["attributes"]["value"]

    def observe(self, probability: torch.Tensor) -> None:
        """Takes the largest p(name) of a micro-batch; `SpaceTrainer` calls it once per forward pass."""
        self._seen.append(probability)

    def on_step_end(self, args, state, control, **kwargs):
        if self._seen:
            self.value = self.smoothing * self.value + (1 - self.smoothing) * max(map(float, self._seen))
            self._seen = []
            if self.value < self.threshold:
                control.should_training_stop = True
        return control

    def state(self) -> dict:
        # Saved with every checkpoint.
        return {
            "args": {"threshold": self.threshold, "smoothing": self.smoothing},
            "attributes": {"value": self.value},
        }


class CurrentAnswersCallback(TrainerCallback):
    """Asks the model again every `args.refresh_steps` steps: what it still says becomes a row to forget.

    Args:
        forget (`Callable`): Returns the [`ForgetRows`] of the run.
    """

    def __init__(self, forget: Callable[[], ForgetRows]):
        self._forget = forget

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.refresh_steps == 0 and state.global_step < state.max_steps:
            self._forget().refresh(state.global_step)


class GradientHealthCallback(TrainerCallback):
    """Raises if an adapted layer's `lora_B` never gets a gradient: such a layer is decoration, and hides a bug.

    Typical causes: gradient checkpointing that cuts the graph, a layer whose output the model never reads, a frozen
    adapter.

    Args:
        patience (`int`, defaults to 3): Optimiser steps without any gradient after which a layer is reported.
    """

    def __init__(self, patience: int = 3):
        self.patience = patience
        self._names: list[str] = []
        self._norms = self._largest = torch.zeros(0)  # By layer, where they were computed.
        self._seen = 0
        self._handle = None

    @property
    def norms(self) -> dict[str, float]:
        """Of every layer's gradient in the latest step; reading it makes the host wait."""
        return dict(zip(self._names, self._norms.tolist()))

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._norms, self._largest, self._seen = torch.zeros(0), torch.zeros(0), 0
        self._remove()
        if (zero := zero_optimizer(optimizer)) is not None:
            # DeepSpeed makes the step as part of backward, and has no gradients before or after.
            self._handle = zero.optimizer.register_step_pre_hook(lambda *_: self._observe(model, zero))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self._handle is None:
            self._observe(model)

    def _observe(self, model, zero=None):
        layers = adapted_layers(model, ADAPTER)
        weights = [layer.lora_B[ADAPTER].weight for layer in layers.values()]
        norms = gradient_norms(weights) if zero is None else torch.tensor(partitioned_gradient_norms(zero, weights))
        self._names, self._norms = list(layers), norms
        if self._seen < self.patience:
            self._largest = torch.maximum(self._largest, norms) if self._seen else norms
        self._seen += 1
        if self._seen == self.patience:
            self._check()

    def on_train_end(self, args, state, control, **kwargs):
        self._remove()
        if 0 < self._seen < self.patience:
            self._check()

    def _remove(self):
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _check(self):
        dead = [name for name, norm in zip(self._names, self._largest.tolist()) if norm == 0.0]
        if dead:
            raise ValueError(
                f"{len(dead)} of {len(self._names)} adapted layers got no gradient in {self._seen} steps: "
                f"{', '.join(dead[:8])}{', ...' if len(dead) > 8 else ''}. Leave them out of `target_modules` if the "
                "model does not use their output; otherwise check gradient checkpointing and frozen adapters."
            )
