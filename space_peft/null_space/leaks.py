"""What an adapter does to retained inputs while it is trained, from the stored eigenpairs alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..distributed import processes
from ..modeling.layers import adapted_layers, lora_weights
from .space import NullSpace


@torch.no_grad()
def measure_leaks(
    model: nn.Module, null_spaces: Mapping[str, NullSpace], adapter_name: str = "default"
) -> dict[str, float]:
    """Root mean square of `||dW h||` over that of `||h||`, for the retained inputs `h`, by layer; never too small.

    Cheap enough to log at every step: no data, and nothing larger than `(r, d)` is formed. In a distributed run all
    processes must call it.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model.
        null_spaces (`dict[str, NullSpace]`): By layer name.
        adapter_name (`str`, defaults to `"default"`): The adapter.
    """
    result = {}
    for name, layer in adapted_layers(model, adapter_name).items():
        a, b, scaling = lora_weights(layer, adapter_name)
        a, b = processes.whole(a).detach().float(), processes.whole(b).detach().float()
        space = null_spaces[name]
        # ||B A x|| = ||R A x|| for any R with R^T R = B^T B, and such an R is (r, r).
        squares, axes = torch.linalg.eigh((b.T @ b).double().cpu())
        r = (squares.clamp(min=0).sqrt()[:, None] * axes.T).to(a)
        result[name] = space.change(scaling * r @ a) / (space.scale * space.dim) ** 0.5
    return result
