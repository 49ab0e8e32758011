"""Image features in the space the language model reads: what the projector (merger, connector) puts out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def multimodal_core(model):
    """Returns the innermost module that has `get_image_features`, the one whose forward calls it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A multimodal model, wrapped or not.

    Raises:
        ValueError: If the model has no vision side.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for candidate in (getattr(base, "model", None), base):
        if candidate is not None and hasattr(candidate, "get_image_features"):
            return candidate
    raise ValueError(
        f"{type(base).__name__} has no `get_image_features`: it is not a multimodal model. Load it with "
        "`AutoModelForImageTextToText`, or use an encoder of your own."
    )


def pool_features(features) -> torch.Tensor:
    """Mean over an image's visual tokens.

    Args:
        features: What `get_image_features` returned: an output whose `pooler_output` holds, for each image, its
            projected tokens `(tokens, d)`, or one tensor `(n, tokens, d)`.

    Returns:
        `torch.Tensor`: `(n, d)`, float32, not normalised.
    """
    features = getattr(features, "pooler_output", features)
    if isinstance(features, torch.Tensor):
        return features.float().mean(dim=1)
    return torch.stack([tokens.float().reshape(-1, tokens.shape[-1]).mean(dim=0) for tokens in features])


@contextlib.contextmanager
def tap_image_features(model) -> Iterator[list]:
    """Collects the image features of every forward pass inside the block, gradients attached.

    The representation losses need them, and computing them a second time would double the cost of the vision tower.
    `get_image_features` is a method, which no module hook reaches, so the method is wrapped for the block's duration.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A multimodal model.

    Yields:
        `list[torch.Tensor]`: Grows by one `(n, d)` tensor of pooled features per forward pass with images.
    """
    core = multimodal_core(model)
    original = core.get_image_features
    collected: list[torch.Tensor] = []

    def tapped(*args, **kwargs):
        output = original(*args, **kwargs)
        collected.append(pool_features(output))
        return output

    core.get_image_features = tapped
    try:
        yield collected
    finally:
        del core.get_image_features
