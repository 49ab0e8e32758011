"""The adapter that a model brings along: which one is trained, and under which constraint it was."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.utils.logging import get_logger

from space_peft.config import SpaceLoraConfig
from space_peft.modeling.layers import adapted_layers, lora_weights
from space_peft.modeling.targets import Target, default_target_modules
from space_peft.null_space.identity import adapter_digest
from space_peft.records.folder import SPACE_CONFIG_NAME
from space_peft.records.measured import saved_digest


logger = get_logger(__name__)

ADAPTER = "default"
"""The adapter that a trainer trains: what PEFT saves into the folder itself, where it is looked for."""

# Written by PEFT when an adapter is loaded or saved; they do not say what it is.
NOT_THE_ADAPTER = {
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "task_type",
}


def add_adapter(model, peft_config: LoraConfig | None, target: Target, output_dir: str) -> PeftModel:
    """Returns the model with the adapter to train: a new one, or that of a `PeftModel`, see [`adopt`].

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        peft_config (`LoraConfig`, *optional*): The adapter's; stays as it is. A [`SpaceLoraConfig`] by default.
        target (`str`): Where the adapter goes if the config names no `target_modules`.
        output_dir (`str`): Of the trainer.

    Raises:
        ValueError: If the model carries an adapter that cannot be trained on as it was trained, or the config chooses
            layers without naming modules.
    """
    if isinstance(model, PeftModel):
        return adopt(model, peft_config, output_dir)
    check_bare(model)
    return get_peft_model(model, with_target_modules(model, peft_config, target))


def with_target_modules(model, peft_config: LoraConfig | None, target: Target) -> LoraConfig:
    """A copy of an adapter's config in which the layers are named; see [`add_adapter`].

    Raises:
        ValueError: If it chooses layers without naming modules, or the model's parts have unknown names.
    """
    peft_config = SpaceLoraConfig() if peft_config is None else copy.copy(peft_config)
    if peft_config.target_modules is None:
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(peft_config, name):
                raise ValueError(
                    f"`{name}` is {getattr(peft_config, name)!r}, but `target_modules` is not set, and PEFT ignores the one "
                    f"for the pattern that `target={target!r}` would put there. Set target_modules to a list of names as "
                    "well, or leave it out."
                )
        peft_config.target_modules = default_target_modules(model, target)
    return peft_config


def check_bare(model) -> None:
    """Refuses a model that carries adapters without being a `PeftModel`: a second one would take the place of the first.

    Args:
        model (`PreTrainedModel`): To be given an adapter.

    Raises:
        ValueError: If an adapter is in it.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        return
    names = list(getattr(model, "peft_config", None) or {}) or sorted(
        {n for layer in layers for n in layer.active_adapters}
    )
    raise ValueError(
        f"`model` is a {type(model).__name__} with the adapter {', '.join(map(repr, names))} in it (from load_adapter, "
        "add_adapter or inject_adapter_in_model), which training another one would lose. To train that adapter on, load "
        "it into the bare model: PeftModel.from_pretrained(model, folder, config=SpaceLoraConfig.from_pretrained(folder), "
        "is_trainable=True). To erase something else as well, merge it first: PeftModel.from_pretrained(model, "
        "folder).merge_and_unload(), or keep all requests in an ErasureLedger."
    )


def adopt(model: PeftModel, peft_config: LoraConfig | None, output_dir: str) -> PeftModel:
    """Makes sure that the adapter of a `PeftModel` is trained under the constraint that it was trained under before.

    `PeftModel.from_pretrained(..., is_trainable=True)` reads `adapter_config.json` alone, so an erasure comes back as a
    plain LoRA. Its constraint is taken from `output_dir` if that is where it came from (the weights are the same), or
    from a `peft_config` that is given for it; otherwise it is refused.

    Args:
        model (`PeftModel`): With the adapter "default" on; others that are on must be frozen, and belong to the model.
        peft_config (`LoraConfig`, *optional*): A [`SpaceLoraConfig`] to restore, of the same LoRA; or the adapter's own
            config, which says that it is to be trained without the constraint.
        output_dir (`str`): Of the trainer.

    Raises:
        ValueError: If the adapter has another name, is off, is no LoRA, or was trained before and nothing says how.
    """
    names = list(model.peft_config)
    if ADAPTER not in names or ADAPTER not in model.active_adapters:
        raise ValueError(
            f"the adapter to train must be called {ADAPTER!r} and be on; the model has {', '.join(map(repr, names))}, of "
            f"which {', '.join(map(repr, model.active_adapters)) or 'none'} is on. PEFT saves adapters of other names into "
            "folders of their own, where nothing looks for them. Leave out `adapter_name` in get_peft_model and "
            "PeftModel.from_pretrained for the adapter that erases, and give other adapters other names."
        )
    config = model.peft_config[ADAPTER]
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"the adapter {ADAPTER!r} has a {type(config).__name__}; expected a SpaceLoraConfig or LoraConfig."
        )
    others = [name for name in model.active_adapters if name != ADAPTER]
    if others:
        warnings.warn(
            f"the adapter {', '.join(map(repr, others))} is on as well: what is erased and kept is measured on the model "
            "with it, and holds for no other. Merge it (merge_and_unload) and save that model to publish an erasure of it.",
            stacklevel=4,
        )
    if peft_config is config:
        return model
    if peft_config is not None:
        if isinstance(config, SpaceLoraConfig) or not isinstance(peft_config, SpaceLoraConfig):
            raise ValueError(
                "`model` already carries an adapter and `peft_config` asks for another; pass the base model, or leave "
                "`peft_config` out to train the adapter that is there."
            )
        _restore(model, peft_config)
    elif not isinstance(config, SpaceLoraConfig) and _was_trained(model):
        if not Path(output_dir, SPACE_CONFIG_NAME).is_file() or saved_digest(output_dir) != adapter_digest(
            model, ADAPTER
        ):
            raise ValueError(
                "the adapter of `model` was trained before and has a plain LoraConfig, so nothing says under which "
                "constraint it is to be trained: PeftModel.from_pretrained reads no space_config.json by itself. Load it "
                "with config=SpaceLoraConfig.from_pretrained(folder), or pass that as `peft_config`. To train it without "
                f"a constraint, pass `peft_config=model.peft_config[{ADAPTER!r}]`."
            )
        _restore(model, SpaceLoraConfig.from_pretrained(output_dir))
        logger.warning(
            "The adapter comes from %s: it is trained under the constraint in its space_config.json.", output_dir
        )
    return model


def _restore(model: PeftModel, config: SpaceLoraConfig) -> None:
    """Gives the adapter a config with a constraint, if it is that of the same LoRA."""
    own, asked = model.peft_config[ADAPTER].to_dict(), config.to_dict()
    for name, value in own.items():
        if name not in NOT_THE_ADAPTER and _plain(value) != _plain(asked.get(name)):
            raise ValueError(
                f"`peft_config` is not that of the adapter which `model` carries: its `{name}` is {asked.get(name)!r:.200}, "
                f"the adapter's is {value!r:.200}. Pass SpaceLoraConfig.from_pretrained of the adapter's own folder."
            )
    config = copy.copy(config)
    config.inference_mode = model.peft_config[ADAPTER].inference_mode
    config.base_model_name_or_path = model.peft_config[ADAPTER].base_model_name_or_path
    model.peft_config[ADAPTER] = config


def _plain(value):
    return sorted(value) if isinstance(value, (set, list, tuple)) and all(isinstance(v, str) for v in value) else value


def _was_trained(model: PeftModel) -> bool:
    """Whether the adapter does anything: a fresh one has B = 0."""
    return any(bool(lora_weights(layer, ADAPTER)[1].any()) for layer in adapted_layers(model, ADAPTER).values())
