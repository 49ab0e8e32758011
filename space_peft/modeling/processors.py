"""What processors do otherwise than others, and older ones otherwise than today's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from torch.nn import functional as F
from transformers import Gemma3Processor, MllamaProcessor, PaliGemmaProcessor


# Mllama's processor takes a row without an image beside rows with one.
_MLLAMA_MIXES = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


def placeholder(processor) -> str | None:
    """The text that stands for an image in a prompt; `None` if the processor has none."""
    if isinstance(processor, Gemma3Processor):
        return processor.boi_token  # Before transformers 5.11 its `image_token` is another one. Can go then.
    token, index = getattr(processor, "image_token", None), getattr(processor, "image_token_id", None)
    if token is None and index is not None:
        token = processor.tokenizer.convert_ids_to_tokens(index)
    return token if isinstance(token, str) and token else None


def image_token(processor) -> str:
    """The text that stands for an image in a prompt.

    Raises:
        ValueError: If the processor has none.
    """
    token = placeholder(processor)
    if token is None:
        raise ValueError(
            f"{type(processor).__name__} has no image token, so its prompts cannot hold an image. Load the processor "
            "of the multimodal model itself: `AutoProcessor.from_pretrained(...)`."
        )
    return token


def begins_with_bos(processor, prompt: str) -> bool:
    """Whether the chat template has written BOS, so that the tokenizer must not write another one.

    The rule of `apply_chat_template(tokenize=True)`, which is how a model is asked elsewhere. Where the template does not
    write it (LLaVA-1.5), the tokenizer does, if it is one that does.
    """
    bos = processor.tokenizer.bos_token
    return bos is not None and prompt.startswith(bos)


def read_prompt(processor, prompt: str) -> str:
    """A prompt as the tokenizer gets it, as far as its end goes: PaliGemma's processor writes a line break there."""
    return f"{prompt}\n" if isinstance(processor, PaliGemmaProcessor) else prompt


def encode_prompts(
    processor, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]
) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, with what the processor makes of their images.

    Args:
        processor (`ProcessorMixin`): Of a multimodal model.
        prompts (`list[str]`): As the chat template writes them.
        images (`list[list[PIL.Image.Image]]`): Of each prompt.

    Returns:
        `dict[str, torch.Tensor]`: What the processor returns, of n prompts.

    Raises:
        ValueError: If a prompt has places for other than its number of images, and what the processor refuses.
    """
    # Some processors do not count, or run out of images in other words. A prompt without a place may still get one.
    token = placeholder(processor)
    for number, (prompt, shown) in enumerate(zip(prompts, images, strict=True)):
        places = prompt.count(token) if token else 0
        if places and places != len(shown):
            raise ValueError(
                f"row {number} of a batch has {places} places for images in its prompt, and {len(shown)} images; as many "
                "blocks of type 'image' are needed as there are images."
            )
    options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if begins_with_bos(processor, prompts[0]):
        options["add_special_tokens"] = False
    if not all(images):
        if isinstance(processor, PaliGemmaProcessor):
            return _paligemma(processor, prompts, images, options)
        if any(images) and isinstance(processor, MllamaProcessor) and not _MLLAMA_MIXES:
            return _mllama(processor, prompts, images, options)
    return dict(processor(images=images if any(images) else None, text=list(prompts), **options))


def _paligemma(processor, prompts, images, options: dict) -> dict[str, torch.Tensor]:
    """PaliGemma's processor refuses text alone, and beside rows with images it writes BOS into the middle of a word."""
    bos = processor.tokenizer.bos_token
    texts = [f"{bos}{prompt}\n" for prompt, own in zip(prompts, images) if not own]
    silent = dict(processor.tokenizer(texts, **{**options, "add_special_tokens": False}))
    silent["token_type_ids"] = torch.zeros_like(silent["input_ids"])
    shown = _of_those_shown(processor, prompts, images, options) if any(images) else {}
    batch = _side_by_side(processor, silent, shown, images)
    return {**batch, "pixel_values": shown["pixel_values"]} if shown else batch


def _mllama(processor, prompts, images, options: dict) -> dict[str, torch.Tensor]:
    """What Mllama's processor makes of rows with and without images from transformers 5.23 on. Can go then."""
    silent = dict(processor(text=[prompt for prompt, own in zip(prompts, images) if not own], **options))
    shown = _of_those_shown(processor, prompts, images, options)
    mask = shown["cross_attention_mask"]  # (rows, length, images, tiles); of a row without an image it is zero
    silent["cross_attention_mask"] = mask.new_zeros(*silent["input_ids"].shape, *mask.shape[2:])
    batch = _side_by_side(processor, silent, shown, images)
    features = processor.image_processor(images, return_tensors="pt")
    return {**batch, **{key: value for key, value in features.items() if key != "num_tiles"}}


def _of_those_shown(processor, prompts, images, options: dict) -> dict[str, torch.Tensor]:
    rows = [row for row, own in enumerate(images) if own]
    return dict(processor(images=[images[row] for row in rows], text=[prompts[row] for row in rows], **options))


def _side_by_side(processor, silent: dict, shown: dict, images) -> dict[str, torch.Tensor]:
    """Rows without and with images in their order, as far as they are sequences of tokens, `(n, length, ...)`."""
    parts = [part for part in (silent, shown) if part]
    length = max(part["input_ids"].shape[1] for part in parts)
    order = torch.tensor(sorted(range(len(images)), key=lambda row: bool(images[row]))).argsort()
    batch = {}
    for key, value in silent.items():
        padding = processor.tokenizer.pad_token_id if key == "input_ids" else 0
        rest = (0, 0) * (value.ndim - 2)
        columns = [F.pad(part[key], (*rest, length - part[key].shape[1], 0), value=padding) for part in parts]
        batch[key] = torch.cat(columns)[order]
    return batch
