"""What a trainer refuses, found before anything is made for it: the anchors of a large model take hours."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from PIL import Image
from torch import nn

from space_peft.config import SpaceLoraConfig
from space_peft.data.questions import QuestionSet
from space_peft.modeling.checksum import base_checksum
from space_peft.modeling.features import multimodal_core
from space_peft.modeling.loading import warn_if_slow
from space_peft.modeling.targets import linear_modules
from space_peft.null_space.base_statistics import Statistics
from space_peft.null_space.planning import refusals
from space_peft.retained.reading import RetainedRows

from .erasure_config import ErasureConfig
from .evaluating import check_args, refuse_arguments
from .forget_rows import located_rows
from .given_adapter import check_bare, with_target_modules
from .pairs import forget_rows


if TYPE_CHECKING:
    from .erasure_trainer import ErasureTrainer


# Stands for an anchor, of which there are none yet.
_PICTURE = Image.new("RGB", (448, 448), "gray")


def check_job(trainer: type[ErasureTrainer], args: ErasureConfig, options: Mapping[str, Any], *, alone: bool) -> None:
    """Refuses what needs no model to be refused.

    Args:
        trainer (`type`): The trainer that is to be made.
        args ([`ErasureConfig`]): Its configuration.
        options (`dict`): Other arguments of it.
        alone (`bool`): Whether statistics stand alone, without retained rows.

    Raises:
        TypeError: If the trainer has no such argument, or `args` is of another class.
        ValueError: If the settings ask for retained rows, and there are none.
    """
    known = inspect.signature(trainer.__init__).parameters
    refuse_arguments(trainer, {name: value for name, value in options.items() if name not in known})
    check_args(args, trainer._config_class, trainer)
    if alone and trainer._steps_on_retained(args):
        raise ValueError(
            f"the settings of {trainer.__name__} ask for a loss on retained rows, and there are none: pass "
            "`retain_dataset` beside `statistics`, or turn that loss off."
        )


def check_processor(processor) -> None:
    """Refuses a processor that shows no pictures.

    Raises:
        ValueError: If it is none of a multimodal model.
    """
    if getattr(processor, "image_processor", None) is None or not hasattr(processor, "image_token"):
        raise ValueError(
            f"{type(processor).__name__} has no image processor or no image token; pass the multimodal "
            "processor of the model (`AutoProcessor.from_pretrained`), not its tokenizer."
        )


def check_model(
    model,
    processor,
    args: ErasureConfig,
    peft_config: LoraConfig,
    names: Sequence[str],
    questions: QuestionSet,
    retained: RetainedRows | None = None,
    statistics: Statistics | None = None,
) -> None:
    """Refuses a model that cannot be given the adapter, without giving it one.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model. Of a `PeftModel` the adapter is there, and is not looked at.
        processor (`ProcessorMixin`): Its processor.
        args ([`ErasureConfig`]): Of training.
        peft_config (`LoraConfig`): Of the adapter.
        names (`list[str]`): The concept's name and aliases.
        questions (`QuestionSet`): What is asked about pictures.
        retained ([`RetainedRows`], *optional*): What must not change.
        statistics ([`Statistics`], *optional*): Of the base model.

    Raises:
        TypeError: If a layer that is to be adapted is not linear.
        ValueError: For what [`plan_erasure`] says would be refused, an adapter of no layer, a name that the tokenizer cannot write,
            or statistics of something else.
    """
    check_processor(processor)
    multimodal_core(model)
    warn_if_slow(model, args.device)
    located_rows(processor, forget_rows([_PICTURE], names, questions))
    if isinstance(model, PeftModel):
        return
    check_bare(model)
    config = with_target_modules(model, peft_config, args.target)
    constrained = isinstance(config, SpaceLoraConfig)
    if isinstance(config, SpaceLoraConfig):
        config.check()
    elif statistics is not None:
        raise ValueError("`statistics` is kept by the null space; pass a SpaceLoraConfig as `peft_config`.")
    layers = layers_to_adapt(model, config)
    shown = statistics is not None or retained is None or any(retained.has_image())
    for reason in refusals(model, layers, shows_images=shown or not constrained):
        raise ValueError(reason)
    if statistics is not None:
        inputs = {name: layer.in_features for name, layer in layers.items() if hasattr(layer, "in_features")}
        statistics.check_layers(config, inputs, base_checksum(model))


def layers_to_adapt(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The layers that PEFT would give an adapter, by name.

    Args:
        model (`PreTrainedModel`): Without an adapter.
        config (`LoraConfig`): With `target_modules`.

    Raises:
        TypeError: If one is not linear.
        ValueError: If there is none.
    """
    linear = linear_modules(model)
    if config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return {name: layer for name, layer in linear.items() if layer is not head}
    found = {name: layer for name, layer in model.named_modules() if name and check_target_module_exists(config, name)}
    if not found and not getattr(config, "target_parameters", None):
        asked = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ValueError(
            f"no layer of {type(model).__name__} is meant by the target modules {asked!r:.200}; the names of its linear layers "
            f"end in {ends}."
        )
    for name, layer in found.items():
        # Of transformers' Conv1D, too, PEFT's adapter is linear; quantised layers of all kinds say their inputs.
        if not hasattr(layer, "in_features") and not hasattr(layer, "nf"):
            raise TypeError(
                f"layer {name!r} is a {type(layer).__name__}; only linear layers can be constrained. Leave it out of "
                "target_modules."
            )
    return found
