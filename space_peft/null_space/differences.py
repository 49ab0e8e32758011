"""In what null spaces differ from those that are asked for: before they are used again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..choices import CONSTRAINTS
from ..config import AUTO_RANK_BEFORE, auto_rank
from ..modeling.checksum import base_checksum, same_base
from ..modeling.layers import adapted_layers, adapter_config
from .space import NullSpace


def protect_digest(protect: Sequence[Mapping[str, NullSpace]]) -> str:
    """A digest of statistics of earlier erasures; empty without any."""
    if not protect:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for spaces in protect:
        for name in sorted(spaces):
            space = spaces[name]
            digest.update(f"{name} {space.scale!r}".encode())
            digest.update(space.eigenvalues.cpu().double().numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def fit_digest(null_spaces: Mapping[str, NullSpace]) -> str:
    """A digest of what null spaces were fitted for, settings included; of what they are, where they do not say."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(null_spaces):
        space = null_spaces[name]
        known = [name, space.constraint, space.strength, space.energy, space.max_rank, space.statistics]
        if space.identity is None:
            digest.update(space.filters.cpu().numpy().tobytes() + space.eigenvalues.cpu().double().numpy().tobytes())
        else:
            # Not the exact checksum: in which dtype the base model was loaded is no other purpose.
            known.append({**dataclasses.asdict(space.identity), "base": space.identity.base.split(":")[-1]})
        digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()


def fit_differences(
    model: nn.Module,
    null_spaces: Mapping[str, NullSpace],
    adapter_name: str = "default",
    *,
    data: Callable[[], str | None] | None = None,
    **asked,
) -> list[str]:
    """In what null spaces differ from those that a fit would give this model and adapter now; empty if in nothing.

    Those without an identity (files of version 0.1.0, or made with [`NullSpaceFitter`]) are compared by their settings
    alone.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model. In a distributed run all processes must call it.
        null_spaces (`dict[str, NullSpace]`): By layer name; those of layers that are not adapted do not matter.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        data (`Callable`, *optional*): Returns the digest of the retained data, or `None` if there are none to compare.
            Called only if nothing else differs, because it reads them all.
        asked (*optional*): Fields of [`FitIdentity`] to compare as well: `image_token_id`, `protect`, `base_statistics`.

    Returns:
        `list[str]`: One phrase for each difference: what it is in the null spaces, and what is asked for.
    """
    config = adapter_config(model, adapter_name)
    layers = adapted_layers(model, adapter_name)
    if missing := [name for name in layers if name not in null_spaces]:
        return [f"{len(missing)} adapted layers have no null space, the first is {missing[0]!r}"]
    unique = list({id(null_spaces[name]): null_spaces[name] for name in layers}.values())
    asked = {"base": base_checksum(model, adapter_name), **asked}
    if config.statistics == "token":
        asked["tokens_per_row"] = config.tokens_per_row
    found: dict[str, str] = {}
    for space in unique:
        settings: dict[str, Any] = {"constraint": config.constraint, "statistics": config.statistics}
        name = CONSTRAINTS[config.constraint].knob
        if config.constraint == space.constraint and name is not None:
            settings |= {name: float(getattr(config, name)), "max_rank": config.rank_limit(space.dim)}
        pairs = [(name, getattr(space, name), value) for name, value in settings.items()]
        if space.identity is not None:
            pairs += [(name, getattr(space.identity, name), value) for name, value in asked.items()]
        for name, fitted, value in pairs:
            if fitted != value and not (name == "base" and same_base(fitted, value)):
                said = _differs(name, fitted, value)
                if (
                    name == "max_rank"
                    and config.max_rank == "auto"
                    and fitted == auto_rank(space.dim, AUTO_RANK_BEFORE)
                ):
                    said += _AUTO_BEFORE
                found.setdefault(name, said)
    known = {space.identity.data for space in unique if space.identity is not None}
    if data is not None and not found and known and (read := data()) is not None and known != {read}:
        found["data"] = _SAID["data"]
    return list(found.values())


_SAID = {
    "base": "the base model's weights differ from those they were fitted on",
    "data": "the retained data differ from those they were fitted on",
    "protect": "the statistics to protect differ from those they were fitted with",
    "base_statistics": "the base model's statistics differ from those they were fitted with",
}
# Where `max_rank` is "auto" for both.
_AUTO_BEFORE = (
    " ('auto' meant that up to version 0.2.0; to go on as then, take the config that was saved: "
    "SpaceLoraConfig.from_pretrained of the adapter's or the checkpoint's folder)"
)


def _differs(name: str, fitted: object, asked: object) -> str:
    return _SAID.get(name) or f"`{name}` is {fitted!r} in the null spaces, but {asked!r} is asked for"


def warn_without_identity(null_spaces: Mapping[str, NullSpace], stacklevel: int) -> None:
    """Warns of null spaces that do not say which model and data they were fitted on."""
    unknown = [name for name, space in null_spaces.items() if space.identity is None]
    if unknown:
        warnings.warn(
            f"{len(unknown)} null spaces do not say what they were fitted on, the first is that of {unknown[0]!r}: they "
            "were saved by space-peft 0.1.0 or made by hand. Their settings were compared with the adapter's; that "
            "they are of this base model and of the right retained data is taken on trust. Fit them again to be sure.",
            stacklevel=stacklevel + 1,
        )
