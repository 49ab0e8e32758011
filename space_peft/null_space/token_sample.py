"""Which tokens of a retained batch count: at most so many of a kind and row, drawn at random."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch


_CUMULATIVE = ("cu_seq_lens_q", "cu_seqlens")


def packed_sequences(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Which sequence each token of a batch belongs to, where rows hold several of them.

    Padding-free collators make one row of a batch, packing one of many short texts. Each sequence begins where
    `position_ids` begin again at 0, or else where `cu_seq_lens_q` says.

    Args:
        inputs (`dict[str, torch.Tensor]`): The model's inputs.

    Returns:
        `torch.Tensor`: `(rows, length)` numbers of sequences in ascending order; `None` if each row is one.
    """
    ids = inputs.get("input_ids")
    ids = inputs.get("inputs_embeds") if ids is None else ids
    if ids is None or ids.ndim < 2:
        return None
    rows, length = ids.shape[:2]
    positions, attention = inputs.get("position_ids"), inputs.get("attention_mask")
    ends = next((inputs[key] for key in _CUMULATIVE if inputs.get(key) is not None), None)
    if positions is not None and positions.shape[-1] == length:
        # Rotary embeddings for images have several positions a token: a sequence begins where all of them do.
        begins = (positions.reshape(-1, *positions.shape[-2:]) == 0).all(dim=0).expand(rows, length)
        if attention is not None and attention.shape == begins.shape:
            begins = begins & attention.to(begins.device).bool()  # padding is at position 0 as well
    elif ends is not None:
        begins = torch.zeros(rows * length, dtype=torch.bool, device=ids.device)
        begins[ends.to(ids.device, torch.long)[:-1].clamp(max=rows * length - 1)] = True
        begins = begins.view(rows, length)
    else:
        return None
    if int(begins.sum(dim=1).max()) < 2:
        return None
    number = begins.long().cumsum(dim=1).clamp(min=1)  # (rows, length), from 1 in each row
    before = torch.cat([number.new_zeros(1), number[:-1, -1].cumsum(dim=0)])  # sequences in the rows above
    return number + before[:, None] - 1


class TokenSample:
    """
    Draws tokens without replacement, for all layers of a forward pass the same.

    A row's image tokens are hundreds and much alike, and `h h^T` of each costs as much as a layer's forward pass. The
    draw depends on the batch alone, so that it is the same whichever process sees the batch, and when.

    Args:
        per_row (`int`, *optional*): Most tokens of a kind of a row, or of each sequence where a row holds several; all by
            default.
    """

    def __init__(self, per_row: int | None = None):
        self._per_row = per_row
        self._rows = 1
        self._generator = torch.Generator()
        self._drawn: dict[tuple[str, torch.Size], torch.Tensor] = {}
        self._sequences: torch.Tensor | None = None  # (rows, length)

    def start_batch(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Must be called before every forward pass.

        Args:
            inputs (`dict[str, torch.Tensor]`): The model's inputs.
        """
        self._sequences = packed_sequences(inputs)
        if self._per_row is None:
            return
        ids = inputs["input_ids"] if inputs.get("input_ids") is not None else next(iter(inputs.values()))
        self._rows = len(ids) if self._sequences is None else int(self._sequences[-1, -1]) + 1
        self._generator.manual_seed(zlib.crc32(ids.detach().cpu().contiguous().view(torch.uint8).numpy()))
        self._drawn.clear()

    def sequences(self, shape: torch.Size) -> torch.Tensor | None:
        """The number of the sequence of each token of a layer's input, `shape`; `None` if its rows are one each, or if
        its tokens are not those of the text."""
        if self._sequences is None or shape.numel() != self._sequences.numel():
            return None
        return self._sequences.reshape(shape)

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
            sequences = self.sequences(shape)
            draw = self._draw_of_rows if sequences is None else self._draw_of_sequences
            self._drawn[key] = draw(shape, mask, limit, length if sequences is None else sequences)
        return self._drawn[key]

    def _draw_of_rows(self, shape, mask, limit: int, length: int) -> torch.Tensor:
        scores = torch.rand(shape.numel() // length, length, generator=self._generator)
        if mask is not None:
            scores = scores.to(mask.device).masked_fill_(~mask.reshape(scores.shape), -1.0)
        best, places = scores.topk(limit, dim=1)
        drawn = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, places, best >= 0)
        return drawn.reshape(shape)

    def _draw_of_sequences(self, shape, mask, limit: int, sequences: torch.Tensor) -> torch.Tensor:
        sequences = sequences.flatten()
        scores = torch.rand(shape.numel(), generator=self._generator).to(sequences.device)
        if mask is not None:
            scores.masked_fill_(~mask.to(scores.device).flatten(), -1.0)
        order = scores.argsort(descending=True)
        order = order[sequences[order].argsort(stable=True)]  # by sequence, and within each the highest first
        sizes = sequences.bincount()
        place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[sequences[order]]
        drawn = torch.zeros_like(scores, dtype=torch.bool)
        drawn[order] = (place < limit) & (scores[order] >= 0)
        return drawn.reshape(shape)

    def _limit(self, shape: torch.Size) -> tuple[int | None, int]:
        """How many tokens may count of each stretch of tokens, and how long a stretch is."""
        if self._per_row is None or shape.numel() == 0:
            return None, 0
        if (sequences := self.sequences(shape)) is not None:
            return self._per_row, int(sequences.flatten().bincount().max())
        if len(shape) == 1:  # the batch's tokens, packed: one stretch for all rows
            return self._per_row * self._rows, shape[0]
        return self._per_row, shape.numel() // shape[0]
