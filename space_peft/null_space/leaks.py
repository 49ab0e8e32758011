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
    scaled: dict[str, torch.Tensor] = {}
    grams: dict[tuple, dict[str, torch.Tensor]] = {}
    for name, layer in adapted_layers(model, adapter_name).items():
        a, b, scaling = lora_weights(layer, adapter_name)
        a, b = processes.whole(a).detach().float(), processes.whole(b).detach().float()
        scaled[name] = scaling * a
        grams.setdefault((a.device, len(a)), {})[name] = b.T @ b
    # All layers of a rank at once: each visit to the host waits for the device.
    lengths: dict[torch.device, dict[str, torch.Tensor]] = {}
    for (device, _), own in grams.items():
        # ||B A x|| = ||R A x|| for any R with R^T R = B^T B, and such an R is (r, r).
        squares, axes = torch.linalg.eigh(torch.stack(list(own.values())).cpu().double())
        roots = (squares.clamp(min=0).sqrt().unsqueeze(-1) * axes.mT).float().to(device)
        for name, r in zip(own, roots):
            lengths.setdefault(device, {})[name] = null_spaces[name].lengths(r @ scaled[name])
    changes = {}
    for own in lengths.values():
        read = torch.cat(list(own.values())).cpu().split([len(one) for one in own.values()])
        changes.update({name: null_spaces[name].change_of(one) for name, one in zip(own, read)})
    spaces = {name: null_spaces[name] for name in scaled}  # in the model's order
    return {name: changes[name] / (space.scale * space.dim) ** 0.5 for name, space in spaces.items()}
