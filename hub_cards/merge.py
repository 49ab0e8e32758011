"""The erased model without an adapter that somebody could switch off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from space_peft.canary.check import Canary
from space_peft.modeling.fingerprint import compare_base
from space_peft.modeling.loading import load_config, model_class
from space_peft.modeling.prompts import conversation
from space_peft.records.folder import CANARY_NAME
from space_peft.records.io import atomic_path
from space_peft.records.stages import begin, done


@torch.no_grad()
def merge_adapter(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    base_model: str | os.PathLike | None = None,
    **model_kwargs: Any,
) -> Path:
    """Adds an adapter to its base model's weights, and writes model and processor to a folder.

    The base model is loaded at the commit that the adapter records, as one for images and text or, if it is none, as
    one for text. The processor (a text model's tokenizer) is the base model's, with the chat template and the scaling of
    pictures that the adapter was trained with.

    An adapter can be ignored by a server (some leave out the vision tower's) and switched off by whoever holds it;
    merged weights cannot. They are added up in float32 and rounded once, to the base model's dtype.

    Args:
        adapter (`str` or `os.PathLike`): Folder or Hub id of the adapter.
        output (`str` or `os.PathLike`): Folder to write; must not exist, and appears only when it is complete.
        base_model (`str` or `os.PathLike`, *optional*): Folder or Hub id of the base model; by default the one that
            the adapter was trained on, as its config says.
        model_kwargs: Arguments of the base model's `from_pretrained`, e.g. `revision` (by default the recorded one).

    Returns:
        `Path`: `output`.

    Raises:
        FileExistsError: If `output` exists.
        ValueError: If the adapter does not say what its base model is and none is given, it does not fit the base model
            or changes more than linear layers, its files are not those that were published, the base model is another one
            than that of its canary, or weights of the base model are quantised, so that the sum cannot be stored.
        FileNotFoundError: If there is no adapter.
    """
    from .load import attach_adapter, refuse_changed, warn_about_base
    from .processor import load_processor
    from .source import RecordedBase, fetch, recorded_base, refuse_unsafe

    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists; choose a new folder for the merged model.")
    begin("load")
    source = fetch(adapter)
    refuse_unsafe(source)
    refuse_changed(source, stacklevel=3)
    recorded = recorded_base(source)
    name = recorded.name if base_model is None else os.fspath(base_model)
    if not name:
        raise ValueError(
            f"the adapter in {os.fspath(adapter)!r} does not say what its base model is; give `base_model`."
        )
    if name == recorded.name and recorded.revision:
        model_kwargs.setdefault("revision", recorded.revision)
    # Another base model's processor is not at that commit.
    base = RecordedBase(name, model_kwargs.get("revision"))
    kind = model_class(load_config(name, **model_kwargs), text=True)
    shows_images = kind is AutoModelForImageTextToText
    model = kind.from_pretrained(name, **{"dtype": "auto", **model_kwargs})
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    quantised = next((name for name, dtype in dtypes.items() if not dtype.is_floating_point), None)
    if quantised is not None:
        raise ValueError(
            f"weight {quantised!r} of the base model is {dtypes[quantised]}, and rounding to it would undo part of the "
            "erasure; merge into the base model in bfloat16 or float32, and quantise the result."
        )
    warn_about_base(model, recorded, revision=model_kwargs.get("revision"))
    _check_base(source.folder, model)
    adapted = attach_adapter(source, model.float())
    # Images and text as a list of parts, text alone as it is: as templates of either kind expect it.
    question = conversation("What is this?", image=Image.new("RGB", (1, 1)))["prompt"]
    asked = question if shows_images else [{"role": "user", "content": "What is this?"}]
    loads = AutoProcessor if shows_images else AutoTokenizer
    processor = load_processor(source, model, base, [asked], token=model_kwargs.get("token"), kind=loads)
    begin("merge")
    merged = adapted.merge_and_unload()
    for name, weight in merged.named_parameters():
        weight.data = weight.data.to(dtypes[name])
    merged.config.dtype = next(iter(dtypes.values()))
    begin("save")
    with atomic_path(output) as temporary:
        merged.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    done(f"saved to {output}")
    return output


def _check_base(folder: Path, model: torch.nn.Module) -> None:
    """Refuses a model of the same shapes on which the erasure was not made, and need not hold.

    Raises:
        ValueError: If it is one, or the canary is damaged.
    """
    if not (folder / CANARY_NAME).is_file():
        return
    different, compared = compare_base(model, Canary.load(folder).base)
    if different:
        raise ValueError(
            f"the base model is not the one the adapter was trained on: {len(different)} of the {compared} weights recorded of it "
            f"are others, the first is {different[0]!r:.120}. Give the one that it was trained on (`base_model`): what was erased "
            "from it need not be erased from another."
        )
