"""A checksum of all weights that a model computes with: whether it is the one that something was made of."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from ..distributed import processes
from .layers import deployed_weights


# Values of a weight whose places count, beside the sum over all of them, to which places mean nothing.
_SAMPLED = 64
# The checksums computed so far, while `weights_at_rest`.
_known: dict[tuple[int, str], str] | None = None
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
@contextlib.contextmanager
def weights_at_rest() -> Iterator[None]:
    """Within it nobody changes a base model's weights, so each model's [`base_checksum`] is computed once."""
    global _known
    before, _known = _known, {}
    try:
        yield
    finally:
        _known = before


def base_checksum(model: nn.Module, adapter_name: str = "default") -> str:
    """A checksum of all that determines what adapted layers see while the adapter is off.

    Of every weight and persistent buffer (other adapters that are on included) it takes the sum of its bits, which a
    change anywhere changes, and some values at their places. That reads the weights once, in place, at the speed of
    memory. It is the same in every process and on every device. Weights that are offloaded count by name and shape
    alone, for they would have to be loaded.

    Args:
        model (`PeftModel` or `PreTrainedModel`): In a distributed run all processes must call it.
        adapter_name (`str`, defaults to `"default"`): The adapter that does not count.

    Returns:
        `str`: Three digests: of all that, of the weights' dtypes, and of the values at their places rounded to bfloat16,
        by which a model is told that was only loaded in another dtype. See [`same_base`].
    """
    if _known is not None and (id(model), adapter_name) in _known:
        return _known[id(model), adapter_name]
    processes.reshard(model)
    exact, dtypes, rounded = (hashlib.blake2b(digest_size=16) for _ in range(3))
    for name, weight in sorted(deployed_weights(model, adapter_name).items()):
        if not isinstance(weight, torch.Tensor):
            exact.update(f"{name}={weight!r};".encode())
            rounded.update(f"{name}={weight!r};".encode())
            continue
        rounded.update(f"{name}{tuple(weight.shape)}".encode())
        dtypes.update(f"{weight.dtype}".encode())
        for part in _plain_tensors(processes.whole(weight)):
            if part.device.type != "meta" and part.numel():
                total, sample = _sum_and_sample(part)
                exact.update(total + integers(sample).numpy().tobytes())
                sample = sample.to(torch.bfloat16) if sample.is_floating_point() else sample
                rounded.update(integers(sample).numpy().tobytes())
    exact.update(rounded.digest() + dtypes.digest())
    checksum = ":".join(digest.hexdigest() for digest in (exact, dtypes, rounded))
    if _known is not None:
        _known[id(model), adapter_name] = checksum
    return checksum


def same_base(one: str, other: str) -> bool:
    """Whether two checksums are of one model, perhaps loaded in two dtypes: from bfloat16 to float32 nothing is lost."""
    (exact, dtypes, rounded), (exact_other, dtypes_other, rounded_other) = one.split(":"), other.split(":")
    return exact == exact_other if dtypes == dtypes_other else rounded == rounded_other


def _sum_and_sample(weight: torch.Tensor) -> tuple[bytes, torch.Tensor]:
    """The sum of a weight's bits, and some of its values, on the CPU."""
    flat = weight.detach().contiguous().reshape(-1)
    words = integers(flat)
    # Eight bytes at a time, where they fit: thirty times as fast.
    if words.nbytes % 8 == 0 and words.storage_offset() * words.itemsize % 8 == 0:
        words = words.view(torch.int64)
    picks = torch.linspace(0, len(flat) - 1, min(_SAMPLED, len(flat)), dtype=torch.float64).long()
    # Picked as integers: not every dtype of few bits can be indexed.
    sample = integers(flat)[picks.to(flat.device)].cpu().view(flat.dtype)
    return words.sum(dtype=torch.int64).cpu().numpy().tobytes(), sample


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as integers of the same size."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.itemsize])


def _plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor itself, or those that a quantised one (torchao's are subclasses) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = [getattr(tensor, name) for name in sorted(tensor.__tensor_flatten__()[0])]
    return [plain for part in parts for plain in _plain_tensors(part)]
