"""Collecting what the adapted layers see on retained data, in one pass over the deployed model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data.rows import check_all_read, check_batch, check_loader
from ..distributed import processes
from ..modeling.features import attends_to_images
from ..modeling.layers import adapted_layers, adapter_config, base_model, check_untied, deployed_model
from ..modeling.prompts import takes_logits_to_keep, to_device
from .fit_progress import FitProgress
from .identity import DataDigest, FitIdentity, base_checksum, protect_digest
from .moments import NullSpaceFitter
from .precision import exact_products
from .space import NullSpace
from .token_sample import TokenSample


# What a layer sees comes in parts: (kind, mask of the tokens of that kind or None for all of them).
Parts = list[tuple[str, torch.Tensor | None]]
_VISUAL_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def fit_null_space(
    model: nn.Module,
    dataloader: Iterable[Mapping],
    adapter_name: str = "default",
    *,
    image_token_id: int | None = None,
    progress: bool = True,
    protect: Sequence[Mapping[str, NullSpace]] = (),
    save_to: str | os.PathLike | None = None,
    save_every: int = 50,
) -> dict[str, NullSpace]:
    """Fits the null space of every adapted layer to retained data, in one pass.

    The statistics are those of the deployed model: our adapter off, evaluation mode. The settings are those of the
    adapter's [`SpaceLoraConfig`]; each null space carries what it was fitted for ([`FitIdentity`]), and layers of the
    same input (q/k/v, gate/up) share one. In a distributed run every process must call it with the same data: each sees
    a share of the batches and decomposes a share of the layers, and all return the same null spaces.

    Args:
        model (`PeftModel` or `PreTrainedModel`): With the adapter, from `get_peft_model` or `add_adapter`.
        dataloader (iterable of `dict[str, torch.Tensor]`): Batches as [`~prompts.encode_conversations`] makes them;
            `labels` are not used. The logits of all positions are not computed unless a batch says `logits_to_keep`.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        image_token_id (`int`, *optional*): Token that stands for a piece of an image in `input_ids`. By default the
            one (and that for videos) which the model's config names.
        progress (`bool`, defaults to `True`): Whether to show progress bars.
        protect (`list[dict[str, NullSpace]]`, *optional*): Inputs that were seen before and must be kept as well, e.g.
            those of earlier erasures (see `trainers.ErasureLedger`): C <- C + C_request, each weighing as much as a
            kind of retained token.
        save_to (`str` or `os.PathLike`, *optional*): A file to keep the sums in while fitting, from which the next call
            goes on if this one is killed: as large as the sums, and deleted at the end. One process only.
        save_every (`int`, defaults to 50): Batches between two saves.

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
    digest = DataDigest()
    fitters = collect_moments(
        model,
        dataloader,
        adapter_name,
        digest=digest,
        statistics=config.statistics,
        tokens_per_row=config.tokens_per_row,
        dtype=torch.float64 if config.constraint == "hard" else torch.float32,
        image_token_id=image_token_id,
        progress=progress,
        save_to=save_to,
        save_every=save_every,
    )
    for number, spaces in enumerate(protect, start=1):
        missing = [name for name in fitters if name not in spaces]
        if missing:
            raise ValueError(
                f"the statistics to protect as number {number} hold {len(missing)} of the adapted layers not, the first "
                f"is {missing[0]!r}; use the `target_modules` they were made with."
            )
    settings = {"strength": config.strength, "energy": config.energy}
    base = base_checksum(model, adapter_name)
    identity = FitIdentity(base, digest.value(), config.tokens_per_row, image_token_id, protect_digest(protect))
    owned = {id(fitter): name for name, fitter in reversed(fitters.items())}  # a layer that holds each fitter
    unique = list({id(fitter): fitter for fitter in fitters.values()}.values())
    with tqdm(total=len(unique), desc="null spaces", disable=not _shows_progress(progress), leave=False) as bar:

        def decompose(fitter: NullSpaceFitter) -> NullSpace:
            for number, spaces in enumerate(protect, start=1):
                fitter.add_moment(spaces[owned[id(fitter)]].second_moment(), f"request {number}")
            space = fitter.fit(config.constraint, max_rank=config.rank_limit(fitter.dim), **settings)
            bar.update()
            space = dataclasses.replace(space, identity=identity)
            return space.to("cpu") if processes.rank_and_size()[1] > 1 else space  # it is sent to the others

        spaces = processes.divide(unique, decompose)
    fitted = {id(fitter): space for fitter, space in zip(unique, spaces, strict=True)}
    null_spaces = {}
    for name, fitter in fitters.items():
        space = null_spaces[name] = fitted[id(fitter)]
        rank = layers[name].r[adapter_name]
        if config.constraint == "hard" and space.dim - space.rank < rank:
            raise ValueError(
                f"the null space of layer {name!r} is too small: of its d = {space.dim} input directions the hard "
                f"constraint removes k = {space.rank}, which leaves {space.dim - space.rank}, but the adapter's rank "
                f"is r = {rank}. Lower energy (now {config.energy}), set max_rank to at most {space.dim - rank}, "
                'choose a smaller r, or use constraint="soft".'
            )
    return null_spaces


def collect_moments(
    model: nn.Module,
    dataloader: Iterable[Mapping],
    adapter_name: str = "default",
    *,
    statistics: str = "token",
    tokens_per_row: int | None = None,
    dtype: torch.dtype = torch.float64,
    image_token_id: int | None = None,
    progress: bool = True,
    adapted: bool = False,
    save_to: str | os.PathLike | None = None,
    save_every: int = 50,
    digest: DataDigest | None = None,
) -> dict[str, NullSpaceFitter]:
    """Observes the inputs of every adapted layer; see [`fit_null_space`] for the other arguments.

    Args:
        statistics (`str`, defaults to `"token"`): See [`SpaceLoraConfig`].
        tokens_per_row (`int`, *optional*): See [`SpaceLoraConfig`]; all by default. Pooled statistics use all.
        dtype (`torch.dtype`, defaults to `torch.float64`): Of the sums, see [`NullSpaceFitter`].
        adapted (`bool`, defaults to `False`): Whether adapters are on meanwhile.
        digest ([`DataDigest`], *optional*): Is given every batch that counts here.

    Returns:
        `dict[str, NullSpaceFitter]`: By layer name. Layers that were given the same tensors hold the same fitter.
    """
    processes.check_supported(model)
    layers = adapted_layers(model, adapter_name)
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
        desc="retained inputs",
        adapted=adapted,
        on_batch=start_forward,
        after_batch=None if saved is None else lambda: saved.end_batch(fitters, sharing.owner),
    )
    if saved is not None:
        saved.remove()
    processes.add_up(fitters, sharing.owner, new_fitter, next(model.parameters()).device)
    seen = {name for name, owner in sharing.owner.items() if fitters[owner].counts}
    unseen = [name for name in layers if name not in seen]
    if unseen:
        raise ValueError(
            f"{len(unseen)} adapted layers saw no retained data, the first is {unseen[0]!r}. Give retained rows that "
            "use them (rows with images for the vision tower), or leave them out of target_modules."
        )
    return {name: fitters[sharing.owner[name]] for name in layers}


def observe_inputs(
    model: nn.Module,
    dataloader: Iterable[Mapping],
    modules: dict[str, nn.Module],
    visit: Callable[[str, torch.Tensor, Callable[[], Parts]], None],
    *,
    image_token_id: int | None = None,
    progress: bool = True,
    desc: str | None = None,
    adapted: bool = False,
    on_batch: Callable[[dict, bool], bool] | None = None,
    after_batch: Callable[[], None] | None = None,
) -> int:
    """Runs the deployed model over batches and shows `visit` what goes into modules.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model; by default its adapters are off while it runs.
        dataloader (iterable of `dict[str, torch.Tensor]`): The batches.
        modules (`dict[str, nn.Module]`): Modules of the model to look at, by name.
        visit (`Callable`): Called with a module's name, its input `(..., d)`, and a function that returns which tokens
            are of which kind, padding left out.
        image_token_id (`int`, *optional*): See [`fit_null_space`].
        progress (`bool`, defaults to `True`): Whether to show a progress bar.
        desc (`str`, *optional*): Its label.
        adapted (`bool`, defaults to `False`): Whether adapters are on while it runs.
        on_batch (`Callable`, *optional*): Given the inputs and whether they count here; says whether to run them.
        after_batch (`Callable`, *optional*): Called after every forward pass.

    Returns:
        `int`: Number of batches.
    """
    check_loader(dataloader)
    inner = base_model(model)
    language = _language_modules(inner)
    visual_tokens = _visual_tokens(inner, image_token_id)
    masks: Parts = []
    counted = True

    def hook_of(name: str, module: nn.Module):
        in_language = None if language is None else any(part in language for part in module.modules())

        def hook(_, args, kwargs):
            if not counted:
                return
            x = args[0] if args else kwargs["x"]
            with exact_products([x.device.type]):  # a Trainer's autocast would round the statistics
                visit(name, x, lambda: _parts(name, x, masks, in_language))

        return hook

    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    observes_head = head is not None and any(part is head for module in modules.values() for part in module.modules())
    # The logits of all positions are the largest tensor of the pass, and nobody looks at them.
    few_logits = takes_logits_to_keep(inner) and not observes_head
    batches = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(deployed_model(model, adapted=adapted))
        stack.enter_context(_random_state_kept(model))
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(hook_of(name, module), with_kwargs=True)
            stack.callback(handle.remove)
        shares = processes.share_batches(dataloader, model)
        total = processes.share_length(dataloader)
        for batch, counted in tqdm(  # noqa: B007
            shares, desc=desc, total=total, disable=not _shows_progress(progress), leave=False
        ):
            check_batch(batch, batches)
            inputs = to_device({key: value for key, value in batch.items() if key != "labels"}, model)
            masks[:] = _token_masks(inputs, visual_tokens)
            batches += 1
            if on_batch is not None and not on_batch(inputs, counted):
                continue
            if few_logits:
                inputs.setdefault("logits_to_keep", 1)
            else:
                inputs.pop("logits_to_keep", None)
            model(**inputs)
            if after_batch is not None:
                after_batch()
    check_all_read(dataloader, batches, total)
    if batches == 0:
        raise ValueError("the retained data are empty: the dataloader gave no batch. Give at least one retained row.")
    return batches


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


def _language_modules(model: nn.Module) -> set[nn.Module] | None:
    """Every module of the language model, output layer included; `None` if the model does not say which part it is."""
    if not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    if decoder is None or decoder is model or not isinstance(decoder, nn.Module):
        return None
    head = model.get_output_embeddings()
    return set(decoder.modules()) | ({head} if head is not None else set())


def _visual_tokens(model: nn.Module, image_token_id: int | None) -> list[int]:
    if image_token_id is not None:
        return [image_token_id]
    if attends_to_images(getattr(model, "model", None)):
        return []  # its image token is one word of the prompt
    config = getattr(model, "config", None)
    return [token for name in _VISUAL_TOKENS if isinstance(token := getattr(config, name, None), int)]


def _token_masks(inputs: dict, visual_tokens: list[int]) -> Parts:
    """The kinds of tokens of a batch, `(b, length)` each, padding in none of them."""
    ids, attention = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None and attention is None:
        return []
    if attention is not None and attention.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention.shape)}; expected (rows, length).")
    if ids is None:
        return [("text", attention.bool())]
    attention = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention.bool()
    image = torch.isin(ids, torch.tensor(visual_tokens, dtype=ids.dtype, device=ids.device))
    parts = [("image", image & attention), ("text", ~image & attention)]
    if "aspect_ratio_mask" in inputs:
        # (rows, images, tiles): all images have the same number of tiles, some of them padding (Mllama).
        shown = inputs["aspect_ratio_ids"] > 0
        parts.append(("tiles", inputs["aspect_ratio_mask"].bool() & shown[..., None]))
    return parts


def _parts(name: str, x: torch.Tensor, masks: Parts, in_language: bool | None) -> Parts:
    """Which tokens of a layer's input are of which kind; `(kind, None)` stands for all of them."""
    tiles = next((mask for kind, mask in masks if kind == "tiles"), None)
    masks = [(kind, mask) for kind, mask in masks if kind != "tiles"]
    if not masks or in_language is False:
        return _image_part(x, tiles)
    shape = masks[0][1].shape
    if x.shape[:-1] == shape:
        return [(group, mask.to(x.device)) for group, mask in masks]
    if in_language is None or x.ndim == 3:
        return _image_part(x, tiles)  # a vision tower, or image features that a language layer attends to
    if x.shape[:-1].numel() == shape.numel():
        return [(group, mask.to(x.device).reshape(x.shape[:-1])) for group, mask in masks]
    if bool(torch.stack([mask for _, mask in masks]).any(dim=0).all()):
        return [("text", None)]  # a share of the tokens (mixture of experts); without padding all of them count
    raise ValueError(
        f"layer {name!r} is given {x.shape[0]} tokens of a batch with {shape.numel()}, padding included, and does not "
        "say which: use retained batches without padding (batch size 1), or leave it out of target_modules."
    )


def _image_part(x: torch.Tensor, tiles: torch.Tensor | None) -> Parts:
    """All of an image side's input, or those of its tokens that lie in tiles which are no padding."""
    positions = x.shape[:-1].numel()
    if tiles is None or positions % tiles.numel():
        return [("image", None)]
    # However a model folds its dimensions, they stay in the order rows, images, tiles, tokens of a tile.
    mask = tiles.flatten().repeat_interleave(positions // tiles.numel()).view(x.shape[:-1])
    return [("image", mask.to(x.device))]


def _shows_progress(progress: bool) -> bool:
    return progress and processes.rank_and_size()[0] == 0


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Looking at retained data must not change the random numbers that training is going to draw."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
