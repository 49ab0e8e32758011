"""Several processes: each sees a share of the retained rows and of the batch, and all end with one and the same result.

Everything here is the identity in a run of one process. Supported are DDP and FSDP2 (`fully_shard`), both by
accelerate, and DeepSpeed's ZeRO 1 and 2, whose partitions are read in `zero.py`. The projection itself needs no
communication: `dW = s B A` is kept in the null space row by row of `A`, so a process projects the rows that it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler


if TYPE_CHECKING:
    pass


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes; `(0, 1)` without `torch.distributed`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def check_supported(model: nn.Module) -> None:
    """Refuses a model that is split over processes in a way the constraint cannot follow.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model, as it is trained.

    Raises:
        ValueError: For FSDP 1, DeepSpeed's ZeRO 3, and models sharded when they were loaded (tensor parallelism).
    """
    if getattr(model, "is_distributed_loading_by_transformers", False) or (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            "the model was split over processes when it was loaded (tensor parallelism, `DistributedConfig`), so a "
            "layer sees a part of its inputs or weights only. Load it whole, and shard it with FSDP2 "
            "(`fsdp_version: 2` in accelerate's config) if it does not fit."
        )
    for module in model.modules():
        # By name: importing FSDP 1 registers it, and warns, in runs that never touch it.
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                "the model is wrapped by FSDP 1, which flattens parameters, so the rows of lora_A cannot be told apart. "
                "Use FSDP2: set `fsdp_version: 2` in accelerate's config."
            )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "the model is partitioned by DeepSpeed's ZeRO 3, which leaves no whole row of lora_A on a process. Use "
            "ZeRO 2 (`zero_stage: 2`), or FSDP2 if the model does not fit on one device."
        )


def check_saves_whole(accelerator: Any) -> None:
    """Refuses FSDP settings under which `Trainer.save_model` writes no adapter, and says nothing.

    Args:
        accelerator (`accelerate.Accelerator`): Of the trainer.

    Raises:
        ValueError: If state dicts are saved in shards.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"FSDP saves a {plugin.state_dict_type}, of which no adapter can be loaded. Set "
            "`fsdp_state_dict_type: FULL_STATE_DICT` in accelerate's config."
        )


# Shares


def share_batches(dataloader: Iterable[Mapping], model: nn.Module) -> Iterator[tuple[Mapping, bool]]:
    """This process's share of the batches: of every `size` batches the one at place `rank`.

    A forward pass of a sharded model waits for all processes at every layer. So all are given the same number of
    batches: where the last round is not full, a process that has none left is given another's, which must not be
    counted. And if the batches of a round differ in kind (some without images leave out the vision tower), all
    processes of a sharded model go through all of them, each counting its own.

    Args:
        dataloader (iterable of `dict[str, torch.Tensor]`): The same on all processes, in the same order; a
            `DataLoader` may shuffle. One that gives each process its own share already (prepared by accelerate, or
            with a `DistributedSampler`) must give all of them equally many batches, as both do by default.
        model (`nn.Module`): That is going to see them.

    Yields:
        `tuple[dict[str, torch.Tensor], bool]`: A batch, and whether it counts.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield from ((batch, True) for batch in dataloader)
        return
    sharded = is_sharded(model)
    for batch, counted in _own_batches(dataloader):
        if sharded and len(set(gather_objects(tuple(sorted(batch))))) > 1:
            for place, other in enumerate(gather_objects(batch)):
                yield other, counted and place == rank
        else:
            yield batch, counted


def share_length(dataloader: Iterable[Mapping]) -> int | None:
    """The number of batches of a share, if it is known beforehand."""
    if not isinstance(dataloader, Sized):
        return None
    return len(dataloader) if _is_shared(dataloader) else -(-len(dataloader) // rank_and_size()[1])


def _own_batches(dataloader: Iterable[Mapping]) -> Iterator[tuple[Mapping, bool]]:
    rank, size = rank_and_size()
    if _is_shared(dataloader):
        yield from ((batch, True) for batch in dataloader)
    elif isinstance(dataloader, DataLoader) and dataloader.batch_sampler is not None:
        # Rank 0 draws the order for all, so that shuffling neither repeats nor leaves out a row, and no process
        # reads and encodes rows of others.
        drawn: list[list] = [list(dataloader.batch_sampler) if rank == 0 else []]
        dist.broadcast_object_list(drawn, src=0)
        order = drawn[0]
        places = range(rank, -(-len(order) // size) * size, size)
        counts = [place < len(order) for place in places]
        own = [order[place if counted else 0] for place, counted in zip(places, counts)]
        yield from zip(with_batches(dataloader, own), counts, strict=True)
    else:
        batches = iter(dataloader)
        while round_ := list(islice(batches, size)):
            counted = rank < len(round_)
            yield round_[rank if counted else 0], counted


def _is_shared(dataloader: Iterable) -> bool:
    """Whether a dataloader gives every process its own batches already."""
    if isinstance(getattr(dataloader, "sampler", None), DistributedSampler):
        return True
    if not isinstance(dataloader, DataLoader):
        return False
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

    return isinstance(dataloader, (DataLoaderShard, DataLoaderDispatcher))


def with_batches(dataloader: DataLoader, batches: list[list[int]]) -> DataLoader:
    """The same dataloader with other batches of row numbers."""
    names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
             "generator", "prefetch_factor", "persistent_workers")  # fmt: skip
    return DataLoader(dataloader.dataset, batch_sampler=batches, **{name: getattr(dataloader, name) for name in names})


def divide(items: list, work: Callable) -> list:
    """`[work(item) for item in items]`, item `i` done by process `i % size` and the results given to all.

    Results are pickled, so tensors in them should be on the CPU. An exception is raised on every process: the others
    would otherwise wait for a result that never comes.
    """
    rank, size = rank_and_size()
    if size == 1:
        return [work(item) for item in items]
    own = {}
    for index in range(rank, len(items), size):
        try:
            own[index] = work(items[index])
        except Exception as error:
            own[index] = error
    results = []
    for index in range(len(items)):
        box = [own.get(index)]
        dist.broadcast_object_list(box, src=index % size)
        if isinstance(box[0], Exception):
            raise own.get(index, box[0])  # where it happened, with its traceback
        results.append(box[0])
    return results


def gather_objects(value: object) -> list:
    """`value` of every process, by rank."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    everyone: list = [None] * size
    dist.all_gather_object(everyone, value)
    return everyone


# Losses


def mean_weight(count: torch.Tensor) -> float:
    """Factor of this process's mean over `count` samples in a loss that is averaged over processes.

    Gradients are averaged as if every process had equally many samples. With the factor `size n_r / sum_r n_r` the
    average is the mean over the samples of all processes.

    Args:
        count (`torch.Tensor`): `n_r`, a whole number.
    """
    size = rank_and_size()[1]
    if size == 1:
        return 1.0
    total = count.clone()
    dist.all_reduce(total)
    return size * int(count) / int(total)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows `(n, d)` of all processes, `(size n, d)`, for a loss that compares each row with every other.

    Every process computes the same loss from them, and gradients flow into its own rows only. These are scaled by
    `size`, since gradients are then averaged over processes and not summed.
    """
    rank, size = rank_and_size()
    if size == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(size)]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[rank] = size * rows - (size - 1) * rows.detach()
    return torch.cat(parts)


# Shards


def local_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The rows of a matrix `(r, d)` that this process holds, maybe none; writing to them changes the matrix.

    Raises:
        ValueError: If a row is split over processes.
    """
    if not _is_dtensor(matrix):
        return matrix.detach()
    split = [placement for placement in matrix.placements if not (placement.is_shard(0) or placement.is_replicate())]
    if split:
        raise ValueError(
            f"lora_A is split over processes as {tuple(matrix.placements)}; expected whole rows (`Shard(0)`), as FSDP2 "
            "leaves them. Shard the model with FSDP2 alone, without tensor parallelism."
        )
    return matrix.detach().to_local()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model, or a part of it."""
    return bool(_fsdp_modules(model))


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 keeps gathered after a forward pass without backward (the outermost module's own weights).

    Until then the model's parameters are copies, which neither are the optimiser's nor follow what is written to it.
    """
    for module in _fsdp_modules(model):
        module.reshard()


def _fsdp_modules(model: nn.Module) -> list[nn.Module]:
    if rank_and_size()[1] == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def whole(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the rows of all processes. Must be called by all of them."""
    return matrix.detach().full_tensor() if _is_dtensor(matrix) else matrix


def gradient_norms(weights: list[nn.Parameter]) -> torch.Tensor:
    """The norm of each weight's gradient, 0 where it has none, `(n,)`. Must be called by all processes."""
    squares, copies = [], 1
    for weight in weights:
        gradient = weight.grad
        rows = torch.zeros(0, device=weight.device) if gradient is None else local_rows(gradient)
        squares.append(rows.float().square().sum())
        if _is_dtensor(gradient):
            mesh = gradient.device_mesh
            copies = math.prod(mesh.size(i) for i, kind in enumerate(gradient.placements) if kind.is_replicate())
    total = torch.stack([square.to(squares[0].device) for square in squares])
    if any(_is_dtensor(weight) for weight in weights):
        dist.all_reduce(total)
    return (total / copies).sqrt()


def _is_dtensor(tensor: torch.Tensor) -> bool:
    if rank_and_size()[1] == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
