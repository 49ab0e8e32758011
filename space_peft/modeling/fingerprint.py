"""Telling a base model from another one with the same shapes, by a few numbers of a few of its weights."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..distributed import processes
from .layers import base_model


_WEIGHTS = 32
_ELEMENTS = 256


@dataclass(frozen=True)
class BaseFingerprint:
    """
    Hashes of the first elements of some of a model's weights.

    It costs nothing and tells a fine-tuned or retrained model from the one recorded. It is no proof that every weight is
    the same: load the base model by the hash of its commit for that.

    Args:
        dtype (`str`): Of the weights when they were recorded, e.g. "float32".
        exact (`dict[str, str]`): By weight, the hash of its values.
        rounded (`dict[str, str]`): The hash of the values rounded to bfloat16: comparable between dtypes.
    """

    dtype: str
    exact: dict[str, str]
    rounded: dict[str, str]

    @classmethod
    def from_dict(cls, content: object) -> BaseFingerprint:
        """The inverse of `dataclasses.asdict`.

        Raises:
            ValueError: If it is no fingerprint.
        """
        keys = ("dtype", "exact", "rounded")
        if not isinstance(content, dict) or set(content) != set(keys) or not isinstance(content["dtype"], str):
            raise ValueError(f"the base model's fingerprint must be an object with the keys {list(keys)}.")
        for key in keys[1:]:
            hashes = content[key]
            if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
                raise ValueError(f"`{key}` of the base model's fingerprint must map weights to hashes.")
        return cls(**content)


def fingerprint_base(model: nn.Module) -> BaseFingerprint:
    """Returns the fingerprint of a model without its adapters.

    Args:
        model (`PeftModel` or `PreTrainedModel`): In a distributed run all processes must call it.
    """
    weights = {name: weight for name, weight in _base_weights(model).items() if _readable(weight)}
    names = _spread(weights)
    hashes = {name: _hashes(weights[name]) for name in names}
    dtype = str(weights[names[0]].dtype).removeprefix("torch.") if names else ""
    return BaseFingerprint(
        dtype=dtype,
        exact={name: exact for name, (exact, _) in hashes.items()},
        rounded={name: rounded for name, (_, rounded) in hashes.items()},
    )


def compare_base(model: nn.Module, fingerprint: BaseFingerprint) -> tuple[list[str], int]:
    """Which of the weights recorded are different in a model, and how many could be compared.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The model.
        fingerprint (`BaseFingerprint`): That of the base model it should be.

    Returns:
        `tuple[list[str], int]`: Names of weights that differ; number compared. Weights that are quantised, offloaded or
        have another name here are not.
    """
    weights = _base_weights(model)
    different, compared = [], 0
    for name, recorded in fingerprint.exact.items():
        weight = weights.get(name)
        if weight is None or not _readable(weight) or name not in fingerprint.rounded:
            continue
        exact, rounded = _hashes(weight)
        same_dtype = str(weight.dtype) == f"torch.{fingerprint.dtype}"
        compared += 1
        if exact != recorded and (same_dtype or rounded != fingerprint.rounded[name]):
            different.append(name)
    return different, compared


def _spread(names: Iterable[str]) -> list[str]:
    """Some weights of every kind, from layers all over the model: fine-tuning, and merging an adapter, leave parts alone.

    Every n-th name would not do: layers are alike, and of some models only biases would be looked at.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    # What adapters are put on first.
    order = sorted(kinds, key=lambda kind: ("norm" in kind or not kind.endswith(".weight"), kind))
    rounds = itertools.zip_longest(*(kinds[kind] for kind in order))
    return sorted(itertools.islice((name for turn in rounds for name in turn if name is not None), _WEIGHTS))


def _base_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base model's parameters by the names they have without an adapter."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in base_model(model).named_parameters()
        if ".lora_" not in name
    }


def _readable(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and weight.device.type != "meta"


def _hashes(weight: torch.Tensor) -> tuple[str, str]:
    # A copy: NumPy pins the storage it looks at, and FSDP2 has to give its unsharded weights' back.
    values = processes.whole(weight).detach().flatten()[:_ELEMENTS].to("cpu", copy=True)
    exact, rounded = (
        hashlib.sha256(part.float().numpy().tobytes()).hexdigest() for part in (values, values.to(torch.bfloat16))
    )
    return exact, rounded
