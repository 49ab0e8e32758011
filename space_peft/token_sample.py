"""Which tokens of a retained batch count: at most so many of a kind and row, drawn at random."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch


class TokenSample:
    """
    Draws tokens without replacement, for all layers of a forward pass the same.

    A row's image tokens are hundreds and much alike, and `h h^T` of each costs as much as a layer's forward pass. The
    draw depends on the batch alone, so that it is the same whichever process sees the batch, and when.

    Args:
        per_row (`int`, *optional*): Most tokens of a kind of a row; all by default.
    """

    def __init__(self, per_row: int | None = None):
        self._per_row = per_row
        self._rows = 1
        self._generator = torch.Generator()
        self._drawn: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def start_batch(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Must be called before every forward pass.

        Args:
            inputs (`dict[str, torch.Tensor]`): The model's inputs.
        """
        if self._per_row is None:
            return
        ids = inputs.get("input_ids", next(iter(inputs.values())))
        self._rows = len(ids)
        self._generator.manual_seed(zlib.crc32(ids.detach().cpu().contiguous().view(torch.uint8).numpy()))
        self._drawn.clear()

    def draw(self, shape: torch.Size, mask: torch.Tensor | None, group: str) -> torch.Tensor | None:
        """Returns the mask of the tokens that count, `shape`; `None` for all of them.

        Args:
            shape (`torch.Size`): Of a layer's input without its last dimension: `(rows, length)`, `(images, tokens)`, or
                `(tokens,)` of all rows in a row.
            mask (`torch.Tensor`, *optional*): `shape`, the tokens of this kind; all by default.
            group (`str`): The kind.
        """
        limit, length = self._limit(shape)
        if limit is None or length <= limit:
            return mask
        key = (group, shape)
        if key not in self._drawn:
            scores = torch.rand(shape.numel() // length, length, generator=self._generator)
            if mask is not None:
                scores = scores.to(mask.device).masked_fill_(~mask.reshape(scores.shape), -1.0)
            best, places = scores.topk(limit, dim=1)
            drawn = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, places, best >= 0)
            self._drawn[key] = drawn.reshape(shape)
        return self._drawn[key]

    def _limit(self, shape: torch.Size) -> tuple[int | None, int]:
        """How many tokens may count of each stretch of tokens, and how long a stretch is."""
        if self._per_row is None or shape.numel() == 0:
            return None, 0
        if len(shape) == 1:  # the batch's tokens, packed: one stretch for all rows
            return self._per_row * self._rows, shape[0]
        return self._per_row, shape.numel() // shape[0]
