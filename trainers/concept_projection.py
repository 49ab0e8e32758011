"""A baseline without training and without images: image features are projected off the concept's text embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from space_peft.anchors.encoders import OwnSpaceEncoder
from space_peft.anchors.select import concept_embedding
from space_peft.data.names import check_target
from space_peft.modeling.features import multimodal_core
from space_peft.modeling.targets import PROJECTOR_PARTS, VISION_PARTS


def last_projection(model) -> str:
    """Returns the name, in the base model, of the linear layer whose outputs the language model reads.

    Args:
        model (`PreTrainedModel`): A multimodal model.

    Raises:
        ValueError: If no linear layer of the projector (or, where the tower ends in one, of the tower) puts out vectors
            as long as the language model's word embeddings.
    """
    width = model.get_input_embeddings().weight.shape[1]
    core = multimodal_core(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is core)
    fitting = {
        part: [
            name
            for name, module in core.named_modules()
            if name.startswith(f"{part}.") and isinstance(module, nn.Linear) and module.out_features == width
        ]
        for part in (*PROJECTOR_PARTS, *VISION_PARTS)
    }
    names = next((found for found in fitting.values() if found), None)
    if names is None:
        raise ValueError(
            f"no linear layer of {type(model).__name__}'s vision side puts out the {width} numbers of a word embedding, "
            "so the features the language model reads cannot be projected; name the layer with `layer`."
        )
    return prefix + names[-1]


@torch.no_grad()
def project_concept(
    model,
    processor,
    concept: str,
    *,
    aliases: Sequence[str] = (),
    amount: float = 1.0,
    layer: str | None = None,
) -> PeftModel:
    """Projects image features off a concept's text embedding, as a LoRA adapter of rank 1.

    With q the unit text embedding in the space the language model reads and W the last linear layer before it,
    W' = (I - a q q^T) W. The difference -a q (q^T W) has rank 1: B = -a q, A = q^T W, exact and training-free. The
    layer's bias stays: what it adds along q is the same for every image.

    Args:
        model (`PreTrainedModel`): A multimodal model, not quantised.
        processor (`ProcessorMixin`): Its processor.
        concept (`str`): The name to forget.
        aliases (`list[str]`, *optional*): Other names; q is the mean of all.
        amount (`float`, defaults to 1.0): a: 1 projects, a value between 1 and 2 also reflects, 2 mirrors.
        layer (`str`, *optional*): Name of the layer; by default `last_projection`.

    Returns:
        `PeftModel`: The model with the adapter; `save_pretrained` writes it as any other.

    Raises:
        TypeError: If the model carries an adapter already.
        ValueError: If `amount` is not a positive number, or `layer` is no such linear layer.
    """
    if isinstance(model, PeftModel):
        raise TypeError("`model` is a PeftModel; pass the base model, or merge its adapter first.")
    if not (math.isfinite(amount) and amount > 0):
        raise ValueError(f"`amount` must be a positive number, got {amount}.")
    concept, aliases = check_target(concept, aliases)
    layer = last_projection(model) if layer is None else layer
    module = dict(model.named_modules()).get(layer)
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise ValueError(f"`layer` is {layer!r}; expected the name of a linear layer that is not quantised.")
    q = torch.as_tensor(concept_embedding(OwnSpaceEncoder(model, processor), concept, aliases=aliases))
    if len(q) != module.out_features:
        raise ValueError(
            f"layer {layer!r} puts out {module.out_features} numbers, the text embedding has {len(q)}; expected the "
            "layer whose outputs the language model reads."
        )
    q = F.normalize(q.double(), dim=0).to(module.weight.device)  # (m,)
    update = q @ module.weight.double()  # (d,), q^T W
    adapted = get_peft_model(model, LoraConfig(r=1, lora_alpha=1, target_modules=[layer]))
    lora = adapted.get_base_model().get_submodule(layer)
    lora.lora_A["default"].weight.copy_(update[None])
    lora.lora_B["default"].weight.copy_(-amount * q[:, None])
    return adapted
