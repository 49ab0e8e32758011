"""Digests of an adapter's weights: of a file, or of the same weights in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import torch
from safetensors import safe_open


# What PEFT puts before the name of a layer in the file.
PEFT_PREFIX = "base_model.model."


def file_digest(path: str | os.PathLike, kinds: Sequence[str] | None = None) -> str:
    """The digest of the weights in an `adapter_model.safetensors`, see [`~null_space.identity.adapter_digest`].

    Args:
        path (`str` or `os.PathLike`): The file.
        kinds (`Sequence[str]`, *optional*): Which of its weights; by default whatever it holds.

    Raises:
        safetensors.SafetensorError: If it is none, or damaged.
    """
    with safe_open(path, framework="pt") as file:
        return named_digest(
            (key.removeprefix(PEFT_PREFIX), file.get_tensor(key))
            for key in file.keys()
            if kinds is None or key.split(".")[-2] in kinds
        )


def weight_content(weight: torch.Tensor) -> tuple[tuple[int, ...], str]:
    """The shape of an adapter's weight and a digest of its values, in whatever precision it was saved."""
    # In float32, to which PEFT loads adapters of lower precision.
    content = weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return tuple(weight.shape), hashlib.sha256(content).hexdigest()


def named_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A digest of weights by their names, in whatever order they come."""
    parts = [(name, *weight_content(weight)) for name, weight in weights]
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()
