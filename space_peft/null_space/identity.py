"""What null spaces were fitted for, so that they are never used for something else without a word."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..distributed import processes
from ..modeling.checksum import integers
from ..modeling.layers import adapted_layers
from ..modeling.prompts import to_device
from ..records.digests import named_digest


# Of a batch: the ids are looked at row by row, and the others say nothing of what a layer is given.
_NOT_SUMMED = {"input_ids", "attention_mask", "labels", "logits_to_keep"}


@dataclass(frozen=True)
class FitIdentity:
    """
    What a null space was fitted for, beside the settings that it holds itself.

    Args:
        base (`str`): Checksum of the weights that determine what the adapted layers see, see [`~modeling.checksum.base_checksum`].
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
                bits = integers(value)
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
