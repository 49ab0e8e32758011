"""Loading a model by its id: its architecture is known, and its precision suits where it runs."""

from __future__ import annotations

import os

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)
from transformers.utils.logging import get_logger

from ..choices import DTYPES
from ..records.places import refuse_missing


logger = get_logger(__name__)

_CONFIG_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
# Whoever gives one of these has chosen a precision.
_PRECISION = ("dtype", "torch_dtype", "quantization_config")
_HALF = (torch.float16, torch.bfloat16)


class UnknownArchitectureError(ValueError):
    """The model may be in order, but nothing here knows its architecture, so that it cannot be loaded."""


def load_config(model: str | os.PathLike, **options) -> PreTrainedConfig:
    """The configuration of a model, without running code of its repository.

    Args:
        model (`str` or `os.PathLike`): Id or folder.
        options: Of `from_pretrained`; those that do not say where it is are left out.

    Raises:
        UnknownArchitectureError: If no architecture of its name is registered with transformers.
        OSError: If there is no such folder, or no configuration.
        ValueError: If it is damaged.
    """
    refuse_missing(model)
    places = {key: options[key] for key in _CONFIG_OPTIONS if key in options}
    content, _ = PreTrainedConfig.get_config_dict(model, **places)
    kind = content.get("model_type")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING and not options.get("trust_remote_code"):
        own = " Code that comes with it is not run." if content.get("auto_map") else ""
        raise UnknownArchitectureError(
            f"{os.fspath(model)!r} is of the architecture {kind!r}, which transformers does not know.{own} "
            "If a module of yours registers it (AutoConfig.register, AutoModelForImageTextToText.register), import that "
            "first: `--import MODULE` on the command line. Or update transformers."
        )
    trusted = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
    return AutoConfig.from_pretrained(model, **places, **trusted)


def model_class(config: PreTrainedConfig, *, text: bool = False):
    """The class of transformers that loads a model of a configuration.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The model's.
        text (`bool`, defaults to `False`): Whether a model for text alone will do.

    Returns:
        `AutoModelForImageTextToText`, or where text will do and it takes no pictures, `AutoModelForCausalLM`.

    Raises:
        UnknownArchitectureError: If only the configuration is registered, and no model.
        ValueError: If it is no model that takes pictures and text.
    """
    kind = type(config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if text:
        return AutoModelForCausalLM
    if not kind.__module__.startswith("transformers."):
        raise UnknownArchitectureError(
            f"no model is registered for a {kind.__name__}; register it: AutoModelForImageTextToText.register({kind.__name__}, "
            "...)."
        )
    raise ValueError(
        f"a {kind.__name__} is not the config of a model that takes pictures and text (AutoModelForImageTextToText does not "
        "know it), so there is nothing to erase a concept from."
    )


def default_dtype(config: PreTrainedConfig, device: str | torch.device) -> torch.dtype | str:
    """The precision to load a model in: as it was saved, but float32 on a CPU, and that is said.

    Processors have no fast arithmetic in float16: a step of the embedded model takes fourteen times as long as in float32.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The model's; a quantised one stays as it is.
        device (`str` or `torch.device`): Where it will run.
    """
    if torch.device(device).type != "cpu" or getattr(config, "quantization_config", None) is not None:
        return "auto"
    if (saved := saved_dtype(config)) in _HALF:
        logger.warning_once(
            f"The model was saved in {str(saved).removeprefix('torch.')} and is loaded in float32, which is many times faster "
            "on a CPU and takes twice the memory; set `dtype` (--dtype) for another precision."
        )
    return torch.float32


def warn_if_slow(model, device: str | torch.device) -> None:
    """Says that a model in float16 crawls on a CPU: one that somebody has loaded so, for here it would be float32.

    Args:
        model (`PreTrainedModel`): The model.
        device (`str` or `torch.device`): Where it will run.
    """
    if torch.device(device).type == "cpu" and any(part.dtype == torch.float16 for part in model.parameters()):
        logger.warning_once(
            'The model is in float16, in which a CPU takes many times as long as in float32; load it with dtype="float32" '
            "(--dtype float32)."
        )


def saved_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The precision in which a model was saved, as its configuration has it; float32 if it does not say."""
    for own in (config, getattr(config, "text_config", None)):
        dtype = getattr(own, "dtype", None)
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if isinstance(dtype, torch.dtype):
            return dtype
    return torch.float32


def check_dtype(dtype) -> None:
    """Refuses a word for a precision that is none; what is no word, such as a `torch.dtype`, is left to `from_pretrained`.

    Raises:
        ValueError: If it is one.
    """
    if not isinstance(dtype, str) or dtype in DTYPES:
        return
    known = getattr(torch, dtype, None)
    if not isinstance(known, torch.dtype) or not known.is_floating_point:
        raise ValueError(f"`dtype` is {dtype!r}; expected one of {', '.join(map(repr, DTYPES))}.")


def check_device(device: str | torch.device) -> None:
    """Refuses a device that torch does not know, and a GPU where there is none.

    Raises:
        ValueError: If it is one.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"the device is {device!r}; expected 'cpu', 'cuda', or 'cuda:0' and so on.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here that torch can use; take the device 'cpu', or a machine with a GPU.")


def load_model(model: str, device: str | torch.device | None = None, *, place: bool = True, **kwargs):
    """A multimodal model by its id, in a precision that suits where it runs; see [`default_dtype`].

    Args:
        model (`str`): Id or folder.
        device (`str` or `torch.device`, *optional*): Where; a GPU if there is one.
        place (`bool`, defaults to `True`): Whether to put it there; a trainer does that itself.
        kwargs: Of `from_pretrained`; a `dtype` or `quantization_config` is taken as it is, and a `device_map` instead of
            `device`.

    Raises:
        UnknownArchitectureError, ValueError: See [`load_config`], [`model_class`], [`check_dtype`] and [`check_device`].
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    check_dtype(kwargs.get("dtype"))
    config = load_config(model, **kwargs)
    options = dict(kwargs)
    if not any(options.get(key) is not None for key in _PRECISION):
        options["dtype"] = default_dtype(config, device)
    loaded = model_class(config).from_pretrained(model, **options)
    return loaded if "device_map" in kwargs or not place else loaded.to(device)
