"""The rows of `lora_A` in the partitions of DeepSpeed's ZeRO 1 and 2.

ZeRO lays the trained weights of a parameter group end to end in one flat float32 tensor, of which each process holds
and steps an equal part; what the model computes with are copies, refreshed after the step. The step itself is an
ordinary torch optimiser's on that part, so its hooks are the right place here, too. Only, a part may begin or end in
the middle of a row. Such rows, less than two a process, are put together by one small all-reduce.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .processes import gather_objects


@dataclass(frozen=True)
class FlatRows:
    """
    Whole rows inside of a flat tensor; takes the place of a parameter `(rows, dim)`.

    Args:
        flat (`torch.Tensor`): `(n,)`, with its gradient in `grad`.
        start (`int`): Where the first row begins.
        rows (`int`): Their number.
        dim (`int`): Their length.
    """

    flat: torch.Tensor
    start: int
    rows: int
    dim: int

    @property
    def device(self) -> torch.device:
        return self.flat.device

    @property
    def dtype(self) -> torch.dtype:
        return self.flat.dtype

    def detach(self) -> torch.Tensor:
        """The rows `(rows, dim)`; writing to them changes the flat tensor."""
        return self._of(self.flat.detach())

    @property
    def grad(self) -> torch.Tensor | None:
        """Their gradient, likewise."""
        return None if self.flat.grad is None else self._of(self.flat.grad)

    def _of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.view(-1)[self.start : self.start + self.rows * self.dim].view(self.rows, self.dim)


@dataclass(frozen=True)
class _Piece:
    """What this process holds of a row that is cut in two: `numel` values from column `column` on."""

    row: tuple[str, int]  # layer, row of its A
    column: int
    flat: torch.Tensor
    start: int
    numel: int


class CutRows:
    """
    The rows that a boundary between processes cuts, put together on all of them.

    Args:
        pieces (`list[_Piece]`): Of this process.
        dims (`dict[tuple[str, int], int]`): Length of every cut row, also of those that others hold.
        device (`torch.device`): Where processes communicate.
        group: The processes that share the partitions.
    """

    def __init__(
        self, pieces: list[_Piece], dims: Mapping[tuple[str, int], int], device: torch.device, group: Any
    ) -> None:
        self._pieces, self._group = pieces, group
        self._starts, end = {}, 0
        for row in sorted(dims):
            self._starts[row] = end
            end += dims[row]
        self._flat = torch.zeros(end, device=device)
        self._flat.grad = torch.zeros(end, device=device)
        self.rows = {row: FlatRows(self._flat, start, 1, dims[row]) for row, start in self._starts.items()}

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, `rows` hold the rows; what is written to them reaches the partitions at the end."""
        if not self.rows:
            yield
            return
        both = torch.zeros(2, len(self._flat), device=self._flat.device)  # weights, gradients
        for piece in self._pieces:
            for values, flat in zip(both, (piece.flat.detach(), piece.flat.grad), strict=True):
                if flat is not None:
                    self._there(values, piece).copy_(self._here(flat, piece))
        dist.all_reduce(both, group=self._group)
        self._flat.copy_(both[0])
        self._flat.grad.copy_(both[1])
        yield
        for piece in self._pieces:
            self._here(piece.flat.detach(), piece).copy_(self._there(self._flat, piece))
            if piece.flat.grad is not None:
                self._here(piece.flat.grad, piece).copy_(self._there(self._flat.grad, piece))

    def _there(self, values: torch.Tensor, piece: _Piece) -> torch.Tensor:
        return values.narrow(0, self._starts[piece.row] + piece.column, piece.numel)

    @staticmethod
    def _here(flat: torch.Tensor, piece: _Piece) -> torch.Tensor:
        return flat.view(-1).narrow(0, piece.start, piece.numel)


def zero_optimizer(optimizer: Any) -> Any | None:
    """DeepSpeed's ZeRO 1 or 2 optimiser among the wrappers of an optimiser, or `None`.

    Raises:
        ValueError: If it makes its steps in a way that torch's hooks do not see.
    """
    while optimizer is not None and not hasattr(optimizer, "single_partition_of_fp32_groups"):
        optimizer = getattr(optimizer, "optimizer", None)
    if getattr(optimizer, "zenflow", False):
        raise ValueError(
            "DeepSpeed's ZenFlow steps parts of the weights at other times, where the projection does not see them. "
            "Leave `zenflow` out of the DeepSpeed config."
        )
    return optimizer


def partitioned_rows(zero: Any, weights: Mapping[str, nn.Parameter]) -> tuple[dict[str, list[FlatRows]], CutRows]:
    """What ZeRO's partitions hold of the adapter's `A`. Must be called by all processes.

    Args:
        zero (`DeepSpeedZeroOptimizer`): From [`zero_optimizer`].
        weights (`dict[str, nn.Parameter]`): Each `A` `(r, d)`, by layer name.

    Returns:
        `tuple[dict[str, list[FlatRows]], CutRows]`: By layer name, the rows to project in this process; and the cut
        rows, which are among them.
    """
    rows: dict[str, list[FlatRows]] = {name: [] for name in weights}
    pieces: list[_Piece] = []
    for name, weight in weights.items():
        part = weight._hp_mapping
        if part is None:
            continue
        flat = zero.single_partition_of_fp32_groups[part.param_group_index]
        dim = weight.shape[1]
        begin = part.lp_fragment_address.start  # in A, row after row
        end = begin + part.lp_fragment_address.numel
        offset = part.hp_fragment_address.start - begin  # from a place in A to that in the partition
        first, last = -(-begin // dim), end // dim  # whole rows
        if first < last:
            rows[name].append(FlatRows(flat, offset + first * dim, last - first, dim))
        spans = [(begin, first * dim), (last * dim, end)] if first <= last else [(begin, end)]
        for start, stop in spans:
            if start < stop:
                pieces.append(_Piece((name, start // dim), start % dim, flat, offset + start, stop - start))
    cut = {row for part in gather_objects([piece.row for piece in pieces]) for row in part}
    example = next(iter(weights.values()))
    cut_rows = CutRows(
        pieces, {row: weights[row[0]].shape[1] for row in cut}, example.device, getattr(example, "_dp_group", None)
    )
    for row in sorted(cut):
        rows[row[0]].append(cut_rows.rows[row])
    return rows, cut_rows


def gradient_norms(zero: Any, weights: list[nn.Parameter]) -> list[float]:
    """The norm of each weight's gradient while the optimiser makes its step, 0 where it has none.

    Must be called by all processes.
    """
    squares = torch.zeros(len(weights), device=weights[0].device)
    for index, weight in enumerate(weights):
        part = weight._hp_mapping
        flat = None if part is None else zero.single_partition_of_fp32_groups[part.param_group_index]
        if flat is not None and flat.grad is not None:
            own = flat.grad.view(-1).narrow(0, part.hp_fragment_address.start, part.hp_fragment_address.numel)
            squares[index] = own.float().square().sum()
    dist.all_reduce(squares, group=weights[0]._dp_group)
    return squares.sqrt().tolist()
