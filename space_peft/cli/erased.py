"""The erased model of a command: an adapter on its base model, or a merged model beside its original."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..choices import DtypeName
from ..data.names import check_target
from ..evaluation.named_images import NamedImages, split_by_name
from ..modeling.checksum import base_checksum
from ..null_space.identity import adapter_digest
from ..records.measured import note_measured, saved_digest
from .bench import load_pair
from .pictures import load_pictures


def load_attacked(adapter: str, base_model: str | None, dtype: DtypeName | None = None) -> tuple:
    """An erased model with its adapter, and the processor.

    Args:
        adapter (`str`): Folder or Hub id.
        base_model (`str`, *optional*): The original, by default the one recorded.
        dtype (`str`, *optional*): To load it in; by default as it was saved, on a CPU float32: processors have no fast
            arithmetic in half precision, and a search takes hundreds of passes.
    """
    from transformers import AutoProcessor

    from ..hub_cards import load_erased

    where: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {"dtype": None}
    if dtype is not None:
        where["dtype"] = dtype
    model = load_erased(adapter, base_model=base_model, check_canary=False, **where)
    return model, AutoProcessor.from_pretrained(base_model or model.peft_config["default"].base_model_name_or_path)


@dataclass(frozen=True)
class ErasedModel:
    """
    A loaded erased model.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The model.
        processor (`ProcessorMixin`): Its processor.
        original (`PreTrainedModel`, *optional*): The model before the erasure, if it is not `model` without its adapter.
        adapter (`str`, *optional*): Digest of the adapter; `None` for a merged model.
    """

    model: Any
    processor: Any
    original: Any = None
    adapter: str | None = None

    def identity(self) -> dict:
        """What results of it depend on, as it was when this was first asked; JSON values."""
        return {"adapter": self.adapter, "weights": self._weights}

    @cached_property
    def _weights(self) -> str:
        return base_checksum(self.model)


def named_pictures(args: argparse.Namespace) -> NamedImages:
    """The pictures of `--images`, by what they show; read before any model is loaded.

    Raises:
        ValueError: If the concept is no name, or none of the pictures is its.
    """
    check_target(args.concept, args.aliases)
    return split_by_name(load_pictures(args.images), args.concept, args.aliases)


def load_judged(args: argparse.Namespace, *, original: bool = True) -> ErasedModel:
    """Loads what `--adapter`, or `--merged` and `--base-model`, name.

    Args:
        args (`argparse.Namespace`): Of the command.
        original (`bool`, defaults to `True`): Whether the original of a merged model is needed.

    Raises:
        OSError: If there is no such model.
        ValueError: If it is damaged, or there is no original to compare a merged model with.
    """
    if args.adapter is not None:
        model, processor = load_attacked(args.adapter, args.base_model, args.dtype)
        return ErasedModel(model, processor, adapter=adapter_digest(model))
    if not original:
        model, processor = load_pair(args.merged, args.dtype)
        return ErasedModel(model, processor)
    check_merged(args)
    model, processor = load_pair(args.merged, args.dtype)
    return ErasedModel(model, processor, original=load_pair(args.base_model, args.dtype)[0])


def check_merged(args: argparse.Namespace) -> None:
    """Refuses a merged model without its original.

    Raises:
        ValueError: If `--base-model` is missing.
    """
    if args.merged is not None and args.base_model is None:
        raise ValueError(
            "--base-model is missing: a merged model does not record its original, and without that nothing shows what the "
            "erasure changed."
        )


def check_output(output: str, erased: ErasedModel) -> None:
    """Refuses a folder that holds another adapter than the one that is judged.

    Raises:
        ValueError: If it does.
    """
    held = saved_digest(output)
    if held is not None and held != erased.adapter:
        raise ValueError(
            f"{output} holds a different adapter from the one that is judged here; choose another --output."
        )


def note_result(output: str, name: str, erased: ErasedModel) -> None:
    """Notes beside an adapter, for its card, which weights a result was measured on.

    Args:
        output (`str`): Folder that the result was written to.
        name (`str`): Its file.
        erased ([`ErasedModel`]): What was measured.
    """
    if erased.adapter is not None and saved_digest(Path(output)) is not None:
        note_measured(output, {name: erased.adapter})
