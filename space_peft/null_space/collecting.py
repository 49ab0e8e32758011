"""Collecting a base model's statistics: one pass over retained data, once for all requests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..choices import InputKind
from ..distributed import processes
from ..modeling.checksum import base_checksum
from ..modeling.layers import base_model
from ..modeling.targets import default_target_modules, linear_modules
from ..records.base_commit import loaded_commit
from ..records.stages import bar
from ..retained.reading import RetainedRows, retained_loader
from .base_statistics import SecondMoment, Statistics, kept_rank
from .fitting import collect_moments
from .identity import DataDigest
from .moments import NullSpaceFitter
from .observing import shows_progress


def collect_statistics(
    model: nn.Module,
    processor,
    retain_dataset,
    *,
    target_modules: str | Sequence[str] | None = None,
    statistics: InputKind = "token",
    tokens_per_row: int | None = 64,
    max_rank: int | Literal["auto"] | None = "auto",
    batch_size: int = 32,
    image_token_id: int | None = None,
    progress: bool = True,
    save_to: str | os.PathLike | None = None,
    save_every: int = 50,
) -> Statistics:
    """Computes the second moment of every adaptable layer's inputs on retained data, in one pass over the deployed model.

    In a distributed run every process calls it with the same data, sees a share of the batches and decomposes a share of
    the layers; all return the same.

    Args:
        model (`PreTrainedModel`): The base model. An adapter of ours inside is off; others that are on belong to the model.
        processor (`ProcessorMixin`): Its processor.
        retain_dataset (`datasets.Dataset` or `list[dict]`): What must not change, in TRL's formats, as for the trainers.
        target_modules (`str` or `list[str]`, *optional*): Layers to look at, as in [`~peft.LoraConfig`]: a regular
            expression, or the ends of names. By default every linear layer of tower, projector and language model, so
            that any `target_modules` may be asked for later.
        statistics (`str`, defaults to `"token"`): See [`SpaceLoraConfig`].
        tokens_per_row (`int`, *optional*, defaults to 64): See [`SpaceLoraConfig`].
        max_rank (`int` or `"auto"`, *optional*, defaults to `"auto"`): Most eigenpairs kept of a layer, and so the most
            that an adapter's `max_rank` may ask for; `None` for all. `"auto"`: as many as [`SpaceLoraConfig`] asks for
            by default, 64 at least.
        batch_size (`int`, defaults to 32): Rows a forward pass.
        image_token_id (`int`, *optional*): See [`fit_null_space`].
        progress (`bool`, defaults to `True`): Whether to show progress bars.
        save_to (`str` or `os.PathLike`, *optional*): A file to keep the sums in meanwhile, see [`fit_null_space`].
        save_every (`int`, defaults to 50): Batches between two saves.

    Returns:
        [`Statistics`]

    Raises:
        ValueError: If no layer is meant, one saw no data, or a row cannot be used; the message names it.
    """
    retained = RetainedRows.of(retain_dataset)
    layers = linear_layers(model, target_modules)
    digest = DataDigest()
    fitters = collect_moments(
        model,
        retained_loader(processor, retained, range(len(retained)), batch_size),
        layers=layers,
        digest=digest,
        statistics=statistics,
        tokens_per_row=tokens_per_row,
        dtype=torch.float32,
        image_token_id=image_token_id,
        progress=progress,
        save_to=save_to,
        save_every=save_every,
    )
    unique = list({id(fitter): fitter for fitter in fitters.values()}.values())
    with bar("Finding eigenvectors", len(unique), show=shows_progress(progress)) as shown:

        def keep(fitter: NullSpaceFitter) -> SecondMoment:
            moment = SecondMoment.of(fitter.second_moment(), fitter.counts, kept_rank(fitter.dim, max_rank))
            shown.update()
            return moment

        kept = processes.divide(unique, keep)
    moment_of = {id(fitter): moment for fitter, moment in zip(unique, kept, strict=True)}
    inner = base_model(model)
    name = getattr(inner.config, "_name_or_path", None) or None
    return Statistics(
        {layer: moment_of[id(fitter)] for layer, fitter in fitters.items()},
        base=base_checksum(model),
        data=digest.value(),
        rows=len(retained),
        kind=statistics,
        tokens_per_row=tokens_per_row,
        model=name,
        commit=None if name is None else loaded_commit(name),
    )


def linear_layers(model: nn.Module, target_modules: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """Linear layers by name, as PEFT's `target_modules` chooses them."""
    inner = base_model(model)
    if target_modules is None:
        target_modules = default_target_modules(inner, "all")
    config = LoraConfig(target_modules=target_modules)
    chosen = {
        name: module for name, module in linear_modules(inner).items() if check_target_module_exists(config, name)
    }
    if not chosen:
        raise ValueError(f"no linear layer of the model is meant by target_modules={target_modules!r:.200}.")
    return chosen
