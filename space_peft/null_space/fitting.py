"""Collecting what the adapted layers see on retained data, in one pass over the deployed model."""

from __future__ import annotations

import copy
import dataclasses
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..choices import InputKind
from ..distributed import processes
from ..modeling.batch_observer import BatchObserver
from ..modeling.checksum import base_checksum
from ..modeling.layers import adapted_layers, adapter_config, check_untied
from ..records.stages import bar
from .constraints import FITTED
from .differences import protect_digest
from .fit_progress import FitProgress
from .identity import DataDigest, FitIdentity
from .moments import NullSpaceFitter
from .observing import Parts, observe_inputs, shows_progress
from .space import NullSpace
from .token_sample import TokenSample


if TYPE_CHECKING:
    from .base_statistics import Statistics


def fit_null_space(
    model: nn.Module,
    dataloader: Iterable[Mapping] | None,
    adapter_name: str = "default",
    *,
    image_token_id: int | None = None,
    progress: bool = True,
    protect: Sequence[Mapping[str, NullSpace]] = (),
    statistics: Statistics | None = None,
    save_to: str | os.PathLike | None = None,
    save_every: int = 50,
    observer: BatchObserver | None = None,
) -> dict[str, NullSpace]:
    """Fits the null space of every adapted layer to retained data, in one pass.

    The statistics are those of the deployed model: our adapter off, evaluation mode. The settings are those of the
    adapter's [`SpaceLoraConfig`]; each null space carries what it was fitted for ([`FitIdentity`]), and layers of the
    same input (q/k/v, gate/up) share one. In a distributed run every process must call it with the same data: each sees
    a share of the batches and decomposes a share of the layers, and all return the same null spaces.

    Args:
        model (`PeftModel` or `PreTrainedModel`): With the adapter, from `get_peft_model` or `add_adapter`.
        dataloader (iterable of `dict[str, torch.Tensor]`, *optional*): Batches as [`~prompts.encode_conversations`] makes
            them; `None` beside `statistics` if nothing is to be added to those. `labels` are not used. The logits of all
            positions are not computed unless a batch says `logits_to_keep`.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        image_token_id (`int`, *optional*): Token that stands for a piece of an image in `input_ids`. By default the
            one (and that for videos) which the model's config names.
        progress (`bool`, defaults to `True`): Whether to show progress bars.
        protect (`list[dict[str, NullSpace]]`, *optional*): Inputs that were seen before and must be kept as well, e.g.
            those of earlier erasures (see `trainers.ErasureLedger`): C <- C + C_request, each weighing as much as a
            kind of retained token.
        statistics ([`Statistics`], *optional*): Those of the base model on retained data, see [`collect_statistics`]: they
            weigh as much as a kind of token of the batches. Layers that the batches do not reach have them alone.
        save_to (`str` or `os.PathLike`, *optional*): A file to keep the sums in while fitting, from which the next call
            goes on if this one is killed: as large as the sums, and deleted at the end. One process only.
        save_every (`int`, defaults to 50): Batches between two saves.
        observer ([`BatchObserver`], *optional*): Who looks on while the deployed model is given the batches.

    Returns:
        `dict[str, NullSpace]`: By the layer's name in the base model.

    Raises:
        ValueError: If there are no batches, a layer saw no data or NaN, padding cannot be told from data, an adapted
            layer's weight is tied to another module's, or a null space is smaller than the layer's rank.
        RuntimeError: If the batches are not those of the interrupted fit in `save_to`.
    """
    config = adapter_config(model, adapter_name)
    layers = adapted_layers(model, adapter_name)
    check_untied(model, layers)
    if statistics is not None:
        statistics.check(model, adapter_name)
    digest, dtype = DataDigest(), FITTED[config.constraint].dtype
    if dataloader is None:
        if statistics is None:
            raise ValueError("there is neither a dataloader nor statistics to fit the null spaces to.")
        options = {"statistics": config.statistics, "dtype": dtype}
        fitters = {name: NullSpaceFitter(layer.in_features, name=name, **options) for name, layer in layers.items()}
    else:
        fitters = collect_moments(
            model,
            dataloader,
            adapter_name,
            digest=digest,
            statistics=config.statistics,
            tokens_per_row=config.tokens_per_row,
            dtype=dtype,
            image_token_id=image_token_id,
            progress=progress,
            save_to=save_to,
            save_every=save_every,
            unseen_allowed=statistics is not None,
            observer=observer,
        )
    if statistics is not None:
        fitters = _apart(fitters, statistics)
    for number, spaces in enumerate(protect, start=1):
        missing = [name for name in fitters if name not in spaces]
        if missing:
            raise ValueError(
                f"number {number} of the statistics to protect lacks {len(missing)} of the adapted layers, the first "
                f"is {missing[0]!r}; use the `target_modules` they were made with."
            )
    settings = {"strength": config.strength, "energy": config.energy}
    base = base_checksum(model, adapter_name)
    identity = FitIdentity(
        base,
        digest.value(),
        config.tokens_per_row,
        image_token_id,
        protect_digest(protect),
        "" if statistics is None else statistics.digest(),
    )
    owned = {id(fitter): name for name, fitter in reversed(fitters.items())}  # a layer that holds each fitter
    unique = list({id(fitter): fitter for fitter in fitters.values()}.values())
    with bar("Fitting null spaces", len(unique), show=shows_progress(progress)) as shown:

        def decompose(fitter: NullSpaceFitter) -> NullSpace:
            for number, spaces in enumerate(protect, start=1):
                earlier = spaces[owned[id(fitter)]]
                fitter.add_moment(earlier.second_moment(), f"request {number}", uncertainty=earlier.moment_uncertainty)
            if statistics is not None:
                moment = statistics[owned[id(fitter)]]
                fitter.add_moment(moment.dense(fitter.dtype), "statistics", uncertainty=moment.uncertainty)
            space = fitter.fit(config.constraint, max_rank=config.rank_limit(fitter.dim), **settings)
            shown.update()
            space = dataclasses.replace(space, identity=identity)
            return space.to("cpu") if processes.rank_and_size()[1] > 1 else space  # it is sent to the others

        decomposed: list[NullSpace] = processes.divide(unique, decompose)
    fitted = {id(fitter): space for fitter, space in zip(unique, decomposed, strict=True)}
    null_spaces: dict[str, NullSpace] = {}
    for name, fitter in fitters.items():
        space = null_spaces[name] = fitted[id(fitter)]
        rank = layers[name].r[adapter_name]
        if not space.invertible and space.dim - space.rank < rank:
            raise ValueError(
                f"the null space of layer {name!r} is too small: of its d = {space.dim} input directions the "
                f"{config.constraint} constraint removes k = {space.rank}, which leaves {space.dim - space.rank}, but the adapter's rank "
                f"is r = {rank}. Lower energy (now {config.energy}), set max_rank to at most {space.dim - rank}, "
                'choose a smaller r, or use constraint="soft".'
            )
    return null_spaces


def _apart(fitters: dict[str, NullSpaceFitter], statistics: Statistics) -> dict[str, NullSpaceFitter]:
    """Fitters of their own for layers whose statistics are not the same, and one for those that have seen nothing and
    whose statistics are."""
    by_moment: dict[tuple, NullSpaceFitter] = {}
    apart = {}
    for name, fitter in fitters.items():
        key = (id(statistics[name]), id(fitter) if fitter.counts else None)
        if key not in by_moment:
            taken = any(fitter is other for other in by_moment.values())
            by_moment[key] = (
                NullSpaceFitter(fitter.dim, statistics=fitter.statistics, name=name, dtype=fitter.dtype).merge(fitter)
                if taken
                else fitter
            )
        apart[name] = by_moment[key]
    return apart


def collect_moments(
    model: nn.Module,
    dataloader: Iterable[Mapping],
    adapter_name: str = "default",
    *,
    statistics: InputKind = "token",
    tokens_per_row: int | None = None,
    dtype: torch.dtype = torch.float64,
    image_token_id: int | None = None,
    progress: bool = True,
    adapted: bool = False,
    save_to: str | os.PathLike | None = None,
    save_every: int = 50,
    digest: DataDigest | None = None,
    layers: Mapping[str, nn.Module] | None = None,
    unseen_allowed: bool = False,
    observer: BatchObserver | None = None,
) -> dict[str, NullSpaceFitter]:
    """Observes the inputs of every adapted layer; see [`fit_null_space`] for the other arguments.

    Args:
        statistics (`str`, defaults to `"token"`): See [`SpaceLoraConfig`].
        tokens_per_row (`int`, *optional*): See [`SpaceLoraConfig`]; all by default. Pooled statistics use all.
        dtype (`torch.dtype`, defaults to `torch.float64`): Of the sums, see [`NullSpaceFitter`].
        adapted (`bool`, defaults to `False`): Whether adapters are on meanwhile.
        digest ([`DataDigest`], *optional*): Is given every batch that counts here.
        layers (`dict[str, nn.Module]`, *optional*): Other linear layers to look at than the adapted ones.
        unseen_allowed (`bool`, defaults to `False`): Whether layers may see nothing: they get a fitter without inputs.

    Returns:
        `dict[str, NullSpaceFitter]`: By layer name. Layers that were given the same tensors hold the same fitter.
    """
    processes.check_supported(model)
    layers = adapted_layers(model, adapter_name) if layers is None else layers
    fitters: dict[str, NullSpaceFitter] = {}
    sharing = _InputSharing()
    sample = TokenSample(tokens_per_row if statistics == "token" else None)

    def new_fitter(dim: int, name: str) -> NullSpaceFitter:
        return NullSpaceFitter(dim, statistics=statistics, name=name, dtype=dtype)

    saved = None
    if save_to is not None:
        if processes.rank_and_size()[1] > 1:
            raise ValueError("`save_to` keeps the sums of one process, but several are fitting; leave it out.")
        identity = {
            "statistics": statistics, "tokens_per_row": tokens_per_row, "dtype": str(dtype),
            "weights": base_checksum(model, adapter_name),
        }  # fmt: skip
        saved = FitProgress(save_to, save_every, identity)
        saved.load(fitters, sharing.owner, new_fitter)

    def start_forward(inputs: dict, counted: bool) -> bool:
        if digest is not None and counted:
            digest.update(inputs)
        sharing.start_forward()
        sample.start_batch(inputs)
        return saved is None or saved.start_batch(inputs)

    def visit(name: str, x: torch.Tensor, parts: Callable[[], Parts]) -> None:
        if not sharing.is_new(name, x):
            return
        if name not in fitters:
            fitters[name] = new_fitter(x.shape[-1], name)
        sequences = sample.sequences(x.shape[:-1]) if statistics == "pooled" else None
        for group, mask in parts():
            if sequences is None:
                fitters[name].update(x, sample.draw(x.shape[:-1], mask, group), group)
                continue
            # A mean for each sequence, not one for all that share a row.
            for sequence in range(int(sequences.max()) + 1):
                own = sequences.to(x.device) == sequence
                fitters[name].update(x[own][None], None if mask is None else mask[own][None], group)

    observe_inputs(
        model,
        dataloader,
        layers,
        visit,
        image_token_id=image_token_id,
        progress=progress,
        desc="Reading retained rows",
        adapted=adapted,
        on_batch=start_forward,
        after_batch=None if saved is None else lambda: saved.end_batch(fitters, sharing.owner),
        observer=observer,
    )
    if saved is not None:
        saved.remove()
    add_up(fitters, sharing.owner, new_fitter, next(model.parameters()).device)
    seen = {name for name, owner in sharing.owner.items() if fitters[owner].counts}
    unseen = [name for name in layers if name not in seen]
    if unseen_allowed:
        for name in unseen:
            fitters[name], sharing.owner[name] = new_fitter(layers[name].in_features, name), name
    elif unseen:
        raise ValueError(
            f"{len(unseen)} adapted layers saw no retained data, the first is {unseen[0]!r}. Give retained rows that "
            "use them (rows with images for the vision tower), or leave them out of target_modules."
        )
    return {name: fitters[sharing.owner[name]] for name in layers}


class _InputSharing:
    """
    Which layers are given the very same tensor and so need one fitter between them.

    A layer seen for the first time shares with another one that was itself first seen in this forward pass with this
    tensor; so far both have seen the same. That it stays so is checked in every later pass. Tensors are compared by
    identity through weak references: an address alone may be reused once a tensor is freed, and keeping the tensors
    would keep all activations.
    """

    def __init__(self):
        self.owner: dict[str, str] = {}
        self._seen: dict[int, tuple[weakref.ref, int, set[str]]] = {}  # id -> tensor, version, owners that counted it
        self._first_seen_now: set[str] = set()

    def start_forward(self) -> None:
        self._seen.clear()
        self._first_seen_now.clear()

    def is_new(self, name: str, x: torch.Tensor) -> bool:
        """Whether the layer is the one to count this input."""
        version = 0 if x.is_inference() else x._version
        known, known_version, owners = self._seen.get(id(x), (None, None, set()))
        if known is None or known() is not x or known_version != version:
            owners = set()
            self._seen[id(x)] = (weakref.ref(x), version, owners)
        if name not in self.owner:
            candidates = sorted(owners & self._first_seen_now)
            self.owner[name] = candidates[0] if candidates else name
            if not candidates:
                self._first_seen_now.add(name)
        owner = self.owner[name]
        if owner in owners:
            return False
        if owner != name:
            raise RuntimeError(
                f"layers {owner!r} and {name!r} were given the same input in an earlier batch but different ones in "
                "this one, so their statistics cannot be shared; leave one of them out of target_modules."
            )
        owners.add(name)
        return True


def add_up(
    fitters: dict[str, NullSpaceFitter],
    owners: dict[str, str],
    new: Callable[[int, str], NullSpaceFitter],
    device: torch.device,
) -> None:
    """Adds up what the processes have seen, in place: afterwards all of them hold the same fitters and owners.

    A process need not have seen every layer (those of the vision tower, if its rows have no images), nor every kind
    of token.

    Args:
        fitters (`dict[str, NullSpaceFitter]`): Of this process, by the name of the layer that owns it.
        owners (`dict[str, str]`): Layer that owns the fitter of each layer this process has seen.
        new (`Callable`): Makes an empty fitter of a dimension, for the layer of a name.
        device (`torch.device`): Where to communicate.
    """
    if processes.rank_and_size()[1] == 1:
        return
    everyone = processes.gather_objects(
        (owners, {name: (fitter.dim, sorted(fitter.counts)) for name, fitter in fitters.items()})
    )
    names = sorted({name for theirs, _ in everyone for name in theirs})
    for name in names:
        said = {theirs[name] for theirs, _ in everyone if name in theirs}
        if len(said) > 1:
            # Here its inputs were those of another layer, elsewhere they were not: it needs a fitter of its own.
            if name in owners and name not in fitters:
                fitters[name] = copy.deepcopy(fitters[owners[name]])
            said = {name}
        owners[name] = said.pop()
    seen = [theirs for _, theirs in everyone]
    for name in names:
        if owners[name] != name:
            continue
        dim = next(theirs[name][0] for theirs in seen if name in theirs)
        groups = {group for theirs in seen for group in theirs.get(name, (0, ()))[1]}
        if name not in fitters:
            fitters[name] = new(dim, name)
        fitters[name].all_reduce(tuple(groups), device)
