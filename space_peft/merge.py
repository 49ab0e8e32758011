"""The erased model without an adapter that somebody could switch off."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from ._io import atomic_path


@torch.no_grad()
def merge_adapter(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    base_model: str | os.PathLike | None = None,
    **model_kwargs,
) -> Path:
    """Adds an adapter to its base model's weights, and writes model and processor to a folder.

    An adapter can be ignored by a server (some leave out the vision tower's) and switched off by whoever holds it;
    merged weights cannot. They are added up in float32 and rounded once, to the base model's dtype.

    Args:
        adapter (`str` or `os.PathLike`): Folder or Hub id of the adapter.
        output (`str` or `os.PathLike`): Folder to write; must not exist, and appears only when it is complete.
        base_model (`str` or `os.PathLike`, *optional*): Folder or Hub id of the base model; by default the one that
            the adapter was trained on, as its config says.
        model_kwargs: Arguments of the base model's `from_pretrained`, e.g. `revision`.

    Returns:
        `Path`: `output`.

    Raises:
        FileExistsError: If `output` exists.
        ValueError: If the adapter does not say what its base model is and none is given, or weights of the base model
            are quantised, so that the sum cannot be stored.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists; choose a new folder for the merged model.")
    if base_model is None:
        base_model = _base_of(adapter)
    model = AutoModelForImageTextToText.from_pretrained(base_model, **{"dtype": "auto", **model_kwargs})
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    quantised = next((name for name, dtype in dtypes.items() if not dtype.is_floating_point), None)
    if quantised is not None:
        raise ValueError(
            f"weight {quantised!r} of the base model is {dtypes[quantised]}, and rounding to it would undo part of the "
            "erasure; merge into the base model in bfloat16 or float32, and quantise the result."
        )
    merged = PeftModel.from_pretrained(model.float(), os.fspath(adapter)).merge_and_unload()
    for name, weight in merged.named_parameters():
        weight.data = weight.data.to(dtypes[name])
    merged.config.dtype = next(iter(dtypes.values()))
    with atomic_path(output) as temporary:
        merged.save_pretrained(temporary)
        AutoProcessor.from_pretrained(base_model).save_pretrained(temporary)
    return output


def _base_of(adapter: str | os.PathLike) -> str:
    name = PeftConfig.from_pretrained(os.fspath(adapter)).base_model_name_or_path
    if not name:
        raise ValueError(
            f"the adapter in {os.fspath(adapter)!r} does not say what its base model is; give `base_model`."
        )
    return name
