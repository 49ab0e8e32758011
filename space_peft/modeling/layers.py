"""Access to the adapted layers of a model, however the adapter was put there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config import SpaceLoraConfig
from ..records.digests import PEFT_PREFIX


def base_model(model: nn.Module) -> nn.Module:
    """Returns the transformers model inside a `PeftModel`, or the model itself after `add_adapter`."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapter_config(model: nn.Module, adapter_name: str = "default") -> SpaceLoraConfig:
    """Returns the checked `SpaceLoraConfig` of an adapter.

    Args:
        model (`PeftModel` or `PreTrainedModel`): From `get_peft_model`, or with `add_adapter` called.
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Raises:
        TypeError: If the adapter was made with another kind of config.
        ValueError: If there is no such adapter, or its settings are refused.
    """
    configs = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        raise ValueError(
            f"the model has no adapter {adapter_name!r} (it has: {', '.join(map(repr, configs)) or 'none'}); "
            "call get_peft_model(model, SpaceLoraConfig(...)) or model.add_adapter(...) first."
        )
    config = configs[adapter_name]
    if not isinstance(config, SpaceLoraConfig):
        raise TypeError(
            f"adapter {adapter_name!r} has a {type(config).__name__}; expected a SpaceLoraConfig, which says how the "
            "adapter is constrained. A saved one is loaded with PeftModel.from_pretrained(model, folder, "
            "config=SpaceLoraConfig.from_pretrained(folder), is_trainable=True)."
        )
    config.check()
    return config


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Returns the LoRA layers that hold an adapter, by their name in the base model, in the order of `named_modules`.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model.
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Raises:
        TypeError: If an adapted layer is not linear.
        ValueError: If no layer holds the adapter.
    """
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = name.removeprefix(PEFT_PREFIX)
        if adapter_name in module.lora_embedding_A or (
            adapter_name in module.lora_A and not isinstance(module.lora_A[adapter_name], nn.Linear)
        ):
            raise TypeError(
                f"layer {name!r} is a {type(module.get_base_layer()).__name__}; only linear layers can be "
                "constrained. Leave it out of target_modules."
            )
        if adapter_name in module.lora_A:
            layers[name] = module
    if not layers:
        raise ValueError(f"no layer of the model holds the adapter {adapter_name!r}; check its target_modules.")
    return layers


def our_adapter(model: nn.Module) -> str | None:
    """Returns the adapter that "the adapter" means, where a model holds several; `None` if none is on.

    That is the only one that is on; of several, the one that is trained; of several or none such, the one with a
    [`SpaceLoraConfig`]. All others belong to the model as it is deployed.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model.

    Raises:
        ValueError: If that leaves several.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    on = {name: None for layer in layers for name in layer.active_adapters if name in layer.lora_A}
    if len(on) < 2:
        return next(iter(on), None)
    trained = {
        name for layer in layers for name in on if name in layer.lora_A and layer.lora_A[name].weight.requires_grad
    }
    left = [name for name in on if not trained or name in trained]
    configs = getattr(model, "peft_config", None) or {}
    ours = [name for name in left if isinstance(configs.get(name), SpaceLoraConfig)]
    left = ours or left
    if len(left) > 1:
        raise ValueError(
            f"{len(left)} adapters are on ({', '.join(map(repr, left))}), and nothing says which one is to be told from "
            "the rest of the model. Freeze or merge the others, or switch them off with set_adapter."
        )
    return left[0]


def deployed_weights(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor | float]:
    """Returns what a model computes with while an adapter is off, by names that do not depend on who put adapters there.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model.
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Returns:
        `dict[str, torch.Tensor or float]`: Parameters, persistent buffers, and of other adapters that are on weights and
        scaling.
    """
    inner = base_model(model)
    left_out, scalings = set(), {}
    for place, module in inner.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        on = [] if module.disable_adapters else module.active_adapters
        for kind in module.adapter_layer_names:
            held = getattr(module, kind)
            for name in held.keys():
                if name == adapter_name or name not in on:
                    part = held[name]
                    left_out |= {id(part)} if isinstance(part, torch.Tensor) else set(map(id, part.parameters()))
        for name, scaling in getattr(module, "scaling", {}).items():
            if name != adapter_name and name in on:
                scalings[f"{place}.scaling.{name}"] = float(scaling)
    persistent = set(inner.state_dict(keep_vars=True))
    weights = {name: weight for name, weight in inner.named_parameters() if id(weight) not in left_out}
    weights |= {name: buffer for name, buffer in inner.named_buffers() if name in persistent}
    names = {name: name.replace(".base_layer.", ".").replace(".original_module.", ".") for name in weights}
    return {names[name]: weight for name, weight in weights.items()} | scalings


def check_untied(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuses adapted layers whose weight serves another module as well: merging the adapter would change that one, too.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model.
        layers (`dict[str, nn.Module]`): By name, from [`adapted_layers`], or those that are to be adapted.

    Raises:
        ValueError: If there is one, e.g. an output layer tied to the embeddings.
    """
    places: dict[int, set[str]] = {}
    for name, weight in base_model(model).named_parameters(remove_duplicate=False):
        places.setdefault(id(weight), set()).add(name.rpartition(".")[0].removesuffix(".base_layer"))
    for name, layer in layers.items():
        layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        others = sorted(places.get(id(layer.weight), {name}) - {name})
        if others:
            raise ValueError(
                f"layer {name!r} shares its weight with {others[0]!r} (tied weights), which no null space constrains and "
                f"which would change with it once the adapter is merged; leave {name!r} out of target_modules."
            )


def lora_weights(layer: LoraLayer, adapter_name: str = "default") -> tuple[nn.Parameter, nn.Parameter, float]:
    """Returns `A` `(r, d)`, `B` `(m, r)` and the scaling `s` of `dW = s B A`."""
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight, layer.scaling[adapter_name]


def quantised_4bit(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that bitsandbytes holds in 4 bits, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, LoraLayer)
        and getattr(getattr(module, "weight", None), "quant_state", None) is not None
    }


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode; afterwards every module is in the mode it was in, frozen parts included."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for module in quantised_4bit(model).values():
            # In evaluation mode on a CPU, bitsandbytes lays the weights out anew for a kernel without backward pass, for
            # good: gradients would silently stop there in all training that follows. Nothing else depends on the mode.
            module.training = True
        yield model
    finally:
        for module, flag in training.items():
            module.training = flag


@contextlib.contextmanager
def deployed_model(model: nn.Module, *, adapted: bool = False) -> Iterator[nn.Module]:
    """The model as it is deployed: in evaluation mode, our adapter off, no gradients; all of it restored afterwards.

    Only [`our_adapter`] is off: another one that is on, e.g. a frozen one for a task, belongs to the model.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model.
        adapted (`bool`, defaults to `False`): Whether the adapter stays on: the model as it is going to be deployed.

    Raises:
        ValueError: If an adapter is merged into the weights, because they are then no longer the deployed ones, or
            several are on and nothing says which one is ours.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    merged = next((name for name, layer in layers.items() if layer.merged), None)
    if merged is not None:
        raise ValueError(f"an adapter is merged into layer {merged!r}; call model.unmerge_adapter() first.")
    ours = None if adapted else our_adapter(model)
    enabled = [layer for layer in layers.values() if not layer.disable_adapters and ours in layer.active_adapters]
    active = {layer: layer._active_adapter for layer in enabled}
    with evaluating(model), torch.no_grad():
        try:
            for layer in enabled:
                # Not by enable_adapters or set_adapter, which set requires_grad of the weights, too: that is the user's
                # to decide, and FSDP2 looks in its first forward pass which weights are trained.
                others = [name for name in layer.active_adapters if name != ours]
                if others:
                    layer._active_adapter = others
                else:
                    layer._disable_adapters = True
            yield model
        finally:
            for layer in enabled:
                layer._disable_adapters, layer._active_adapter = False, active[layer]
