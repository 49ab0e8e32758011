"""Image features in the space the language model reads: what the projector (merger, connector) puts out."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch


def multimodal_core(model):
    """Returns the innermost module that makes image features, the one whose forward needs them.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A multimodal model, wrapped or not.

    Raises:
        ValueError: If the model has no vision side.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for candidate in (getattr(base, "model", None), base):
        if candidate is not None and (hasattr(candidate, "get_image_features") or attends_to_images(candidate)):
            return candidate
    raise ValueError(
        f"{type(base).__name__} has no `get_image_features`: it is not a multimodal model. Load it with "
        "`AutoModelForImageTextToText`, or use an encoder of your own."
    )


def attends_to_images(core) -> bool:
    """Whether a model's layers attend to projected image features instead of reading them as tokens (Mllama).

    Args:
        core (`nn.Module`): The innermost model, without an output head.
    """
    parts = ("vision_model", "multi_modal_projector")
    return not hasattr(core, "get_image_features") and all(hasattr(core, part) for part in parts)


def image_token_id(model) -> int | None:
    """The token that stands for a piece of an image in `input_ids`, as the model's config has it."""
    return getattr(model.config, "image_token_id", None)


def image_features(model, inputs: Mapping) -> torch.Tensor:
    """Projected visual tokens, averaged over each row of a batch that shows an image.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A multimodal model.
        inputs (`dict[str, torch.Tensor]`): What its processor made of prompts with images, on the model's device.

    Returns:
        `torch.Tensor`: `(n, d)`, float32, not normalised.
    """
    core = multimodal_core(model)
    if attends_to_images(core):
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        states = core.vision_model(**{name: inputs[name] for name in names}).last_hidden_state
        return _pool_tiles(core.multi_modal_projector(states), inputs)
    output = core.get_image_features(**accepted_inputs(inputs, core), return_dict=True)
    return _pool_rows(output, inputs.get("input_ids"), core)


def accepted_inputs(inputs: Mapping, module, method: str = "get_image_features") -> dict:
    """The tensors that a method takes by name: processors also put out counts and masks meant for `forward`."""
    # Of the class: an instance's method may be wrapped (`tap_image_features`), which hides the parameters.
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    parameters = inspect.signature(getattr(type(base), method)).parameters
    return {key: value for key, value in inputs.items() if key in parameters}


def pool_features(features) -> torch.Tensor:
    """Mean over an image's visual tokens.

    Args:
        features: What `get_image_features` returned: an output whose `pooler_output` holds, for each image (or each
            tile of one), its projected tokens `(tokens, d)`, or one tensor `(n, tokens, d)`.

    Returns:
        `torch.Tensor`: `(n, d)`, float32, not normalised.
    """
    features = getattr(features, "pooler_output", features)
    if isinstance(features, torch.Tensor):
        return features.float().mean(dim=1)
    return torch.stack([tokens.float().reshape(-1, tokens.shape[-1]).mean(dim=0) for tokens in features])


def _pool_rows(output, input_ids: torch.Tensor | None, core, image_tokens: Sequence[int] | None = None) -> torch.Tensor:
    """Mean over the visual tokens of each row that has any: an image may have been cut into several tiles, which only
    the image tokens in its prompt keep together."""
    pooled = getattr(output, "pooler_output", output)
    token = image_token_id(core)
    if input_ids is None or token is None:
        return pool_features(output)
    if image_tokens is None:
        image_tokens = (input_ids == token).sum(dim=1).tolist()
    tokens = torch.cat([part.reshape(-1, part.shape[-1]) for part in pooled])  # (all visual tokens, d)
    counts = [count for count in image_tokens if count]
    if sum(counts) != len(tokens):
        return pool_features(output)
    return torch.stack([part.float().mean(dim=0) for part in tokens.split(counts)])


def _pool_tiles(states: torch.Tensor, inputs: Mapping) -> torch.Tensor:
    """The same for `(rows, images, tiles, tokens, d)`, tiles of padding left out, and rows without an image."""
    shown = inputs["aspect_ratio_ids"] > 0  # (rows, images)
    mask = inputs["aspect_ratio_mask"].bool() & shown[..., None]  # (rows, images, tiles)
    tiles = states.float().reshape(*mask.shape, -1, states.shape[-1]).mean(dim=-2)  # (rows, images, tiles, d)
    weights = mask.to(tiles)[..., None]
    pooled = (tiles * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2)).clamp(min=1)
    return pooled[shown.any(dim=1)]


@contextlib.contextmanager
def tap_image_features(model, image_tokens: Sequence[int] | None = None) -> Iterator[list]:
    """Collects the image features of every forward pass inside the block, gradients attached.

    The representation losses need them, and computing them a second time would double the cost of the vision tower.
    `get_image_features` is a method, which no module hook reaches, so the method is wrapped for the block's duration.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A multimodal model.
        image_tokens (`list[int]`, *optional*): How many image tokens each row of the one batch has that is going to be run,
            where that is known: counting them waits for the device.

    Yields:
        `list[torch.Tensor]`: Grows by one `(n, d)` tensor per forward pass with images: the features of each row that
        shows any, averaged over its visual tokens.
    """
    core = multimodal_core(model)
    collected: list[torch.Tensor] = []
    inputs: dict = {}  # of the forward pass that is going on

    with contextlib.ExitStack() as stack:

        def start(_, args, kwargs):
            inputs.update(kwargs)

        def end(*_):
            inputs.clear()

        stack.callback(core.register_forward_pre_hook(start, with_kwargs=True).remove)
        stack.callback(core.register_forward_hook(end, always_call=True).remove)
        if attends_to_images(core):

            def projected(_, args, output):
                if inputs:
                    collected.append(_pool_tiles(output, inputs))

            stack.callback(core.multi_modal_projector.register_forward_hook(projected).remove)
        else:
            original = core.get_image_features

            def tapped(*args, **kwargs):
                output = original(*args, **kwargs)
                collected.append(_pool_rows(output, inputs.get("input_ids"), core, image_tokens))
                return output

            core.get_image_features = tapped
            stack.callback(delattr, core, "get_image_features")
        yield collected
