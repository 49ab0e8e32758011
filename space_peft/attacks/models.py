"""The models that are attacked: the erased one without its adapter's layers, and the deployed one beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import nn

from ..data.names import check_aliases, mentions
from ..data.questions import Question
from ..modeling.layers import deployed_model
from ..modeling.prompts import generate_answers


_ADD_ADAPTER = (
    "the adapter of this {} was added with `add_adapter`; wrap the base model with `PeftModel.from_pretrained` instead, "
    "so that the adapter can be merged and taken off."
)


def has_adapter(model: nn.Module) -> bool:
    """Whether a model holds LoRA layers that could be switched off, so that there is a "before" to compare with."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


@torch.no_grad()
def merged_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with its active adapters added to the weights; the model itself is not changed.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The erased model. One without adapters is copied as it is.

    Returns:
        `PreTrainedModel`: In evaluation mode.

    Raises:
        ValueError: If weights are quantised: adding to them would round part of the erasure away.
    """
    quantised = next((name for name, weight in model.named_parameters() if not weight.is_floating_point()), None)
    if quantised is not None:
        raise ValueError(
            f"weight {quantised!r} is quantised, and adding the adapter to it would round part of the erasure away; "
            "load the base model in float32 or bfloat16."
        )
    duplicate = copy.deepcopy(model)
    if isinstance(duplicate, PeftModel):
        duplicate = duplicate.merge_and_unload()
    elif has_adapter(duplicate):
        raise TypeError(_ADD_ADAPTER.format(type(model).__name__))
    return duplicate.eval()


@torch.no_grad()
def deployed_copy(model: nn.Module) -> nn.Module | None:
    """A copy of the base model as it was before the erasure; None if the model holds no adapter."""
    if not has_adapter(model):
        return None
    if not isinstance(model, PeftModel):
        raise TypeError(_ADD_ADAPTER.format(type(model).__name__))
    with deployed_model(model):  # Refuses an adapter that is merged, which `unload` would leave in the weights.
        duplicate = copy.deepcopy(model)
    return duplicate.unload().eval()


# Longest answer in which a name is looked for, in tokens.
_LONGEST = 32


def answers_naming(
    model, processor, images: Sequence[Image.Image], questions: Sequence[Question], names: Sequence[str], **options
) -> list[bool]:
    """For each image, whether an answer to one of some questions says one of the names, in any form at any place.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        processor (`ProcessorMixin`): Its processor.
        images (`list[PIL.Image.Image]`): n images.
        questions (`list[str or Dialogue]`): Each is asked about each image.
        names (`list[str]`): The name and its aliases.
        options: See `space_peft.modeling.prompts.generate_tokens`.

    Returns:
        `list[bool]`: n values.
    """
    options = {"max_new_tokens": _LONGEST, **options}
    asked = [question for question in questions for _ in images]
    answers = generate_answers(model, processor, asked, images=[*images] * len(questions), **options)
    said = [mentions(answer, names) for answer in answers]
    return [any(said[i :: len(images)]) for i in range(len(images))]


def check_controls(processor, argument: str, names: Sequence[str], target: Sequence[str]) -> tuple[str, ...]:
    """Names that serve as a control: distinct, none of them the target's, all of them within the vocabulary.

    Args:
        processor (`ProcessorMixin`): Of the model.
        argument (`str`): What the names were passed as.
        names (`list[str]`): The names.
        target (`list[str]`): The target's name and aliases.

    Returns:
        `tuple[str, ...]`: The names, stripped.

    Raises:
        TypeError: If it is a single string.
        ValueError: If there is none, one names the target, or one holds a word the tokenizer does not know.
    """
    checked = check_aliases(names, what=argument)
    if not checked:
        raise ValueError(
            f"`{argument}` is empty: without another name there is no control. Pass names the model knows."
        )
    check_not_target(argument, checked, target)
    check_vocabulary(processor, checked)
    return checked


def check_not_target(argument: str, names: Sequence[str], target: Sequence[str]) -> None:
    """Refuses names of other things that name the target.

    Raises:
        ValueError: If there is one.
    """
    same = [name for name in names if mentions(name, target)]
    if same:
        raise ValueError(f"`{argument}` must not name the target {target[0]!r}, got {same}.")


def check_vocabulary(processor, names: Sequence[str]) -> None:
    """Refuses names that the tokenizer turns into its unknown token: that token stands for every such name alike.

    Raises:
        ValueError: If there is one.
    """
    tokenizer = processor.tokenizer
    for name in names:
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokenizer(name)["input_ids"]:
            raise ValueError(f"the tokenizer does not know {name!r}, so the model cannot say it.")
