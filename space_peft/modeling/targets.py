"""Where the adapter goes: default `target_modules` for the vision side, the language side, or both."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from ..choices import Target as Target
from .features import multimodal_core


# Attribute names used for the parts of multimodal models in transformers.
VISION_PARTS = ("vision_tower", "vision_model", "visual")
PROJECTOR_PARTS = ("multi_modal_projector", "connector")
LANGUAGE_PARTS = ("language_model", "text_model")
_SIDES: dict[str, Literal["vision", "language"]] = {
    **dict.fromkeys((*VISION_PARTS, *PROJECTOR_PARTS), "vision"),
    **dict.fromkeys(LANGUAGE_PARTS, "language"),
}


# A pooling head of the tower: the language model reads tokens, so that its output goes nowhere.
_UNREAD = re.compile(r"(^|\.)head\.")


def side_of(layer: str) -> Literal["vision", "language"] | None:
    """Which side of the model a layer is on: "vision" (tower or projector), "language", or `None` for neither.

    Args:
        layer (`str`): Its name, in the model or in an adapter's file.
    """
    return next((_SIDES[part] for part in layer.split(".") if part in _SIDES), None)


def part_of(layer: str) -> Literal["tower", "projector", "language", "other"]:
    """Which part of the model a layer is in; "other" is e.g. an output head of its own.

    Args:
        layer (`str`): Its name in the model.
    """
    names = layer.split(".")
    if side_of(layer) == "vision":
        # Qwen's towers hold the projector, as their merger.
        projects = any(name in PROJECTOR_PARTS or "merger" in name for name in names)
        return "projector" if projects else "tower"
    return "other" if side_of(layer) is None else "language"


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model by name, the same whether adapters have been put into it or not.

    Args:
        model (`nn.Module`): The transformers model, without a `PeftModel` around it.
    """
    # An adapter puts a wrapper in a layer's place, and the layer inside.
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def _used_vision_layers(model) -> int | None:
    """How many of the tower's first layers reach the output, if not all (LLaVA reads the second-to-last by default)."""
    layers = getattr(model.config, "vision_feature_layer", None)
    count = getattr(getattr(model.config, "vision_config", None), "num_hidden_layers", None)
    if layers is None or count is None:
        return None
    layers = [layers] if isinstance(layers, int) else list(layers)
    # Hidden states are counted from the embeddings' on: -1 and `count` are the last layer's.
    used = max(count + 1 + layer if layer < 0 else layer for layer in layers)
    return None if used >= count else used


def default_target_modules(model, target: Target) -> str:
    """Returns the regular expression of `target_modules` that adapts every linear layer of one side of the model.

    Args:
        model (`PreTrainedModel`): A multimodal model.
        target (`str`): "vision" (tower and projector), "language" (the decoder, without the output head) or "all".

    Returns:
        `str`: A pattern for `LoraConfig.target_modules`. Layers of the tower whose output is never read are left out:
        an adapter on them would never get a gradient.

    Raises:
        ValueError: If `target` is unknown, or the model has no part of a known name; the message lists its linear
            layers, to choose `target_modules` from.
    """
    parts = {
        "vision": VISION_PARTS + PROJECTOR_PARTS,
        "language": LANGUAGE_PARTS,
        "all": VISION_PARTS + PROJECTOR_PARTS + LANGUAGE_PARTS,
    }
    if target not in parts:
        raise ValueError(f"`target` must be 'vision', 'language' or 'all', got {target!r}.")
    core = multimodal_core(model)
    linear = linear_modules(core)
    used = _used_vision_layers(model)
    patterns = []
    for part in parts[target]:
        for name in linear:
            if name != part and not name.startswith(f"{part}."):
                continue
            # Numbers inside a name count layers. One at its end tells a Linear from its neighbours in a Sequential.
            pattern = re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name))
            if part in VISION_PARTS:
                if _UNREAD.search(name):
                    continue
                if used is not None and r"\d+" in pattern:
                    # Only layers 0 .. used - 1.
                    pattern = pattern.replace(r"\d+", f"({'|'.join(map(str, range(used)))})", 1)
            patterns.append(pattern)
    if not patterns:
        shown = "\n  ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in linear}))
        raise ValueError(
            f"no default target modules for `target={target!r}` of {type(model).__name__}: none of its parts is called "
            f"{', '.join(parts[target])}. Choose `SpaceLoraConfig(target_modules=...)` among its linear layers:\n  {shown}"
        )
    return rf"(.*\.)?({'|'.join(dict.fromkeys(patterns))})"
