"""Which weights a forget gradient may move: those that matter more to what is forgotten than to what is preserved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn


def squared_gradients(
    weights: Sequence[nn.Parameter], batches: Iterable[dict], loss: Callable[[dict], torch.Tensor]
) -> list[torch.Tensor]:
    """The diagonal of the Fisher information, as estimated from batches: mean over them of (dL / dtheta)^2.

    Args:
        weights (`list[nn.Parameter]`): theta.
        batches (iterable of `dict[str, torch.Tensor]`): What `loss` takes.
        loss (`Callable`): Gives the loss of a batch.

    Returns:
        `list[torch.Tensor]`: Float32, of the weights' shapes.

    Raises:
        ValueError: If there are no batches.
    """
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    count = 0
    for batch in batches:
        # A batch of text alone does not pass through the vision tower.
        gradients = torch.autograd.grad(loss(batch), weights, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total += gradient.float().square()
        count += 1
    if count == 0:
        raise ValueError("got no batches to measure the saliency of the weights on; expected at least one.")
    return [total / count for total in sums]


def saliency_mask(
    forget: torch.Tensor, preserve: torch.Tensor, threshold: float = 1.0, eps: float = 1e-15
) -> torch.Tensor:
    """m = 1[(S_forget + eps) / (S_preserve + eps) >= threshold] (MMUnlearner, arXiv 2502.11051).

    Args:
        forget (`torch.Tensor`): S_forget, from `squared_gradients`.
        preserve (`torch.Tensor`): S_preserve, of the same shape.
        threshold (`float`, defaults to 1.0): Least ratio.
        eps (`float`, defaults to 1e-15): As published.

    Returns:
        `torch.Tensor`: Boolean, of that shape.
    """
    return (forget + eps) / (preserve + eps) >= threshold
