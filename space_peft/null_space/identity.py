"""What null spaces were fitted for, so that they are never used for something else without a word."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import nn

from ..distributed import processes
from ..modeling.layers import PEFT_PREFIX, adapted_layers, adapter_config, deployed_weights
from ..modeling.prompts import to_device


if TYPE_CHECKING:
    from .space import NullSpace

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
            padded = isinstance(mask, torch.Tensor) and mask.shape == ids.shape
            kept = mask.bool().cpu() if padded else torch.ones(ids.shape, dtype=torch.bool)
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


def adapter_digest(model: nn.Module, adapter_name: str = "default", kinds: Sequence[str] = ("lora_A", "lora_B")) -> str:
    """A digest of an adapter's weights, the same as [`file_digest`] gives of the file they are saved to.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model. In a distributed run all processes must call it.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        kinds (`Sequence[str]`, defaults to `("lora_A", "lora_B")`): Which of its weights.
    """
    processes.reshard(model)
    return _named_digest(
        (f"{name}.{kind}.weight", processes.whole(getattr(layer, kind)[adapter_name].weight))
        for name, layer in adapted_layers(model, adapter_name).items()
        for kind in kinds
    )


def file_digest(path: str | os.PathLike, kinds: Sequence[str] | None = None) -> str:
    """The digest of the weights in an `adapter_model.safetensors`, see [`adapter_digest`].

    Args:
        path (`str` or `os.PathLike`): The file.
        kinds (`Sequence[str]`, *optional*): Which of its weights; by default whatever it holds.

    Raises:
        safetensors.SafetensorError: If it is none, or damaged.
    """
    with safe_open(path, framework="pt") as file:
        return _named_digest(
            (key.removeprefix(PEFT_PREFIX), file.get_tensor(key))
            for key in file.keys()
            if kinds is None or key.split(".")[-2] in kinds
        )


def weight_content(weight: torch.Tensor) -> tuple[tuple[int, ...], str]:
    """The shape of an adapter's weight and a digest of its values, in whatever precision it was saved."""
    # In float32, to which PEFT loads adapters of lower precision.
    content = weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return tuple(weight.shape), hashlib.sha256(content).hexdigest()


def _named_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    parts = [(name, *weight_content(weight)) for name, weight in weights]
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


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
        settings = {"constraint": config.constraint, "statistics": config.statistics}
        if config.constraint == space.constraint != "none":
            name = "strength" if config.constraint == "soft" else "energy"
            settings |= {name: float(getattr(config, name)), "max_rank": config.rank_limit(space.dim)}
        pairs = [(name, getattr(space, name), value) for name, value in settings.items()]
        if space.identity is not None:
            pairs += [(name, getattr(space.identity, name), value) for name, value in asked.items()]
        for name, fitted, value in pairs:
            if fitted != value and not (name == "base" and same_base(fitted, value)):
                found.setdefault(name, _differs(name, fitted, value))
    known = {space.identity.data for space in unique if space.identity is not None}
    if data is not None and not found and known and (read := data()) is not None and known != {read}:
        found["data"] = _SAID["data"]
    return list(found.values())


_SAID = {
    "base": "the base model's weights are others than those they were fitted on",
    "data": "the retained data are others than those they were fitted on",
    "protect": "the statistics to protect are others than those they were fitted with",
    "base_statistics": "the base model's statistics are others than those they were fitted with",
}


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


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
