"""Where the adapter goes: default `target_modules` for the vision side, the language side, or both."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from .features import multimodal_core


Target = Literal["vision", "language", "all"]

# Attribute names used for the parts of multimodal models in transformers.
VISION_PARTS = ("vision_tower", "vision_model", "visual")
PROJECTOR_PARTS = ("multi_modal_projector", "connector")
LANGUAGE_PARTS = ("language_model", "text_model")


def _used_vision_layers(model) -> int | None:
    """How many of the tower's first layers reach the output, if not all (LLaVA reads the second-to-last by default)."""
    layer = getattr(model.config, "vision_feature_layer", None)
    count = getattr(getattr(model.config, "vision_config", None), "num_hidden_layers", None)
    if not isinstance(layer, int) or count is None or layer in (-1, count):
        return None
    return count + 1 + layer if layer < 0 else layer


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
    prefix = next((name for name, module in model.named_modules() if module is core), "")
    prefix = f"{prefix}." if prefix else ""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    used = _used_vision_layers(model)
    patterns = []
    for part in parts[target]:
        inside = [name for name in linear if name.startswith(f"{prefix}{part}.")]
        if not inside:
            continue
        leaves = "|".join(sorted({re.escape(name.rsplit(".", 1)[-1]) for name in inside}))
        between = r"(.*\.)?"
        if part in VISION_PARTS and used is not None:
            # Only layers 0 .. used - 1; a name without `layers.N.` (patch embedding, heads) is not adapted either.
            between = rf"(.*\.)?layers\.({'|'.join(map(str, range(used)))})\.(.*\.)?"
        patterns.append(rf"{part}\.{between}({leaves})")
    if not patterns:
        shown = "\n  ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in linear}))
        raise ValueError(
            f"no default target modules for `target={target!r}` of {type(model).__name__}: none of its parts is called "
            f"{', '.join(parts[target])}. Choose `SpaceLoraConfig(target_modules=...)` among its linear layers:\n  {shown}"
        )
    return rf"(.*\.)?({'|'.join(patterns)})"
