"""What null spaces were fitted for, so that they are never used for something else without a word."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..distributed import processes
from ..modeling.layers import adapted_layers, deployed_weights
from ..modeling.prompts import to_device
from ..records.digests import named_digest


# Values of a weight whose places count, beside the sum over all of them, to which places mean nothing.
_SAMPLED = 64
# The checksums computed so far, while `weights_at_rest`.
_known: dict[tuple[int, str], str] | None = None
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Of a batch: the ids are looked at row by row, and the others say nothing of what a layer is given.
_NOT_SUMMED = {"input_ids", "attention_mask", "labels", "logits_to_keep"}


@dataclass(frozen=True)
class FitIdentity:
    """
    What a null space was fitted for, beside the settings that it holds itself.

    Args:
        base (`str`): Checksum of the weights that determine what the adapted layers see, see [`base_checksum`].
        data (`str`): Digest of the retained batches, see [`DataDigest`].
        tokens_per_row (`int`, *optional*): See [`SpaceLoraConfig`].
        image_token_id (`int`, *optional*): See [`fit_null_space`].
        protect (`str`): Digest of the statistics of earlier erasures; empty without any.
        base_statistics (`str`, defaults to `""`): Digest of the base model's [`Statistics`]; empty without any.
    """

    base: str
    data: str
    tokens_per_row: int | None
    image_token_id: int | None
    protect: str
    base_statistics: str = ""

    @classmethod
    def from_dict(cls, content: object) -> FitIdentity:
        """The inverse of `dataclasses.asdict`.

        Raises:
            TypeError: If it is no identity.
        """
        names = [option.name for option in dataclasses.fields(cls)]
        if not isinstance(content, dict) or sorted({"base_statistics": "", **content}) != sorted(names):
            raise TypeError(f"an identity must be an object with the keys {names}")
        for name, value in content.items():
            kinds = (str,) if name in ("base", "data", "protect", "base_statistics") else (int, type(None))
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise TypeError(f"`{name}` of an identity is {value!r:.80}")
        if content["base"].count(":") != 2:
            raise TypeError(f"`base` of an identity is {content['base']!r:.120}; expected three digests")
        return cls(**content)


class DataDigest:
    """
    A digest of retained batches: the same in whatever order and in however many processes they are read.

    Rows count by their tokens, without padding, so that shuffled batches give the same digest; everything else (pixels,
    sizes of images) by its bits and their places in a row. Collisions that nobody constructs on purpose do not matter.
    """

    def __init__(self):
        self._sums: dict[str, int] = {}
        self.batches = 0

    def update(self, inputs: Mapping[str, object]) -> None:
        """Adds a batch, as the model is given it."""
        self.batches += 1
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if isinstance(ids, torch.Tensor):
            if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
                kept = mask.bool().cpu()
            else:
                kept = torch.ones(ids.shape, dtype=torch.bool)
            for row, own in zip(ids.cpu().long(), kept, strict=True):
                digest = hashlib.blake2b(row[own].numpy().tobytes(), digest_size=8).digest()
                self._add("input_ids", int.from_bytes(digest, "little"))
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor) and key not in _NOT_SUMMED:
                bits = _integers(value)
                bits = bits.reshape(len(bits), -1) if bits.ndim > 1 else bits.reshape(-1, 1)
                places = torch.arange(1, bits.shape[1] + 1, device=bits.device)
                self._add(key, int((bits.long() * places).sum()))

    def _add(self, key: str, value: int) -> None:
        self._sums[key] = (self._sums.get(key, 0) + value) % 2**64

    def value(self) -> str:
        """The digest over all processes. All of them must call it."""
        total: dict[str, int] = {}
        for part in processes.gather_objects(self._sums):
            for key, value in part.items():
                total[key] = (total.get(key, 0) + value) % 2**64
        return _digest(json.dumps(total, sort_keys=True).encode())


def data_digest(model: nn.Module, dataloader: Iterable[Mapping]) -> str | None:
    """The digest that a fit on these batches would have, without a forward pass; `None` if there are none.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The model that would see them.
        dataloader (iterable of `dict[str, torch.Tensor]`): See [`fit_null_space`]. All processes must call it.
    """
    digest = DataDigest()
    for batch, counted in processes.share_batches(dataloader, model):
        if counted:
            digest.update(to_device(dict(batch), model))
    read = sum(processes.gather_objects(digest.batches))
    return digest.value() if read else None


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
                exact.update(total + _integers(sample).numpy().tobytes())
                sample = sample.to(torch.bfloat16) if sample.is_floating_point() else sample
                rounded.update(_integers(sample).numpy().tobytes())
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
    words = _integers(flat)
    # Eight bytes at a time, where they fit: thirty times as fast.
    if words.nbytes % 8 == 0 and words.storage_offset() * words.itemsize % 8 == 0:
        words = words.view(torch.int64)
    picks = torch.linspace(0, len(flat) - 1, min(_SAMPLED, len(flat)), dtype=torch.float64).long()
    # Picked as integers: not every dtype of few bits can be indexed.
    sample = _integers(flat)[picks.to(flat.device)].cpu().view(flat.dtype)
    return words.sum(dtype=torch.int64).cpu().numpy().tobytes(), sample


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as integers of the same size."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.itemsize])


def _plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor itself, or those that a quantised one (torchao's are subclasses) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = [getattr(tensor, name) for name in sorted(tensor.__tensor_flatten__()[0])]
    return [plain for part in parts for plain in _plain_tensors(part)]


def adapter_digest(model: nn.Module, adapter_name: str = "default", kinds: Sequence[str] = ("lora_A", "lora_B")) -> str:
    """A digest of an adapter's weights, the same as [`file_digest`] gives of the file they are saved to.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model. In a distributed run all processes must call it.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        kinds (`Sequence[str]`, defaults to `("lora_A", "lora_B")`): Which of its weights.
    """
    processes.reshard(model)
    return named_digest(
        (f"{name}.{kind}.weight", processes.whole(getattr(layer, kind)[adapter_name].weight))
        for name, layer in adapted_layers(model, adapter_name).items()
        for kind in kinds
    )


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
