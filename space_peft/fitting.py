"""Collecting what the adapted layers see on retained data, in one pass over the deployed model."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn
from tqdm.auto import tqdm

from .layers import adapted_layers, adapter_config, base_model, deployed_model
from .null_space import NullSpace, NullSpaceFitter
from .prompts import to_device


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
) -> dict[str, NullSpace]:
    """Fits the null space of every adapted layer to retained data, in one pass.

    The statistics are those of the deployed model: adapters off, evaluation mode. The settings are those of the
    adapter's [`SpaceLoraConfig`]. Layers that are given the same input (q/k/v, gate/up) share one `NullSpace`. In a
    distributed run the sums of all processes are added up, so each may be given all of the data or its share.

    Args:
        model (`PeftModel` or `PreTrainedModel`): With the adapter, from `get_peft_model` or `add_adapter`.
        dataloader (iterable of `dict[str, torch.Tensor]`): Batches as [`~prompts.encode_conversations`] makes them;
            `labels` are not used.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        image_token_id (`int`, *optional*): Token that stands for a piece of an image in `input_ids`. By default the
            one (and that for videos) which the model's config names.
        progress (`bool`, defaults to `True`): Whether to show progress bars.

    Returns:
        `dict[str, NullSpace]`: By the layer's name in the base model.

    Raises:
        ValueError: If there are no batches, a layer saw no data or NaN, padding cannot be told from data, or a null
            space is smaller than the layer's rank.
    """
    config = adapter_config(model, adapter_name)
    layers = adapted_layers(model, adapter_name)
    fitters = collect_moments(
        model,
        dataloader,
        adapter_name,
        statistics=config.statistics,
        image_token_id=image_token_id,
        progress=progress,
    )
    fitted: dict[int, NullSpace] = {}  # by fitter
    null_spaces = {}
    for name, fitter in tqdm(fitters.items(), desc="null spaces", disable=not progress, leave=False):
        if id(fitter) not in fitted:
            fitted[id(fitter)] = fitter.fit(
                config.constraint, strength=config.strength, energy=config.energy, max_rank=config.max_rank
            )
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
    image_token_id: int | None = None,
    progress: bool = True,
) -> dict[str, NullSpaceFitter]:
    """Observes the inputs of every adapted layer; see [`fit_null_space`] for the arguments.

    Returns:
        `dict[str, NullSpaceFitter]`: By layer name. Layers that were given the same tensors hold the same fitter.
    """
    layers = adapted_layers(model, adapter_name)
    fitters: dict[str, NullSpaceFitter] = {}
    sharing = _InputSharing()

    def visit(name: str, x: torch.Tensor, parts: Callable[[], Parts]) -> None:
        if not sharing.is_new(name, x):
            return
        if name not in fitters:
            fitters[name] = NullSpaceFitter(x.shape[-1], statistics=statistics, name=name)
        for group, mask in parts():
            fitters[name].update(x, mask, group)

    observe_inputs(
        model,
        dataloader,
        layers,
        visit,
        image_token_id=image_token_id,
        progress=progress,
        desc="retained inputs",
        on_batch=sharing.start_forward,
    )
    seen = {name for name, owner in sharing.owner.items() if fitters[owner].counts}
    unseen = [name for name in layers if name not in seen]
    if unseen:
        raise ValueError(
            f"{len(unseen)} adapted layers saw no retained data, the first is {unseen[0]!r}. Give retained rows that "
            "use them (rows with images for the vision tower), or leave them out of target_modules."
        )
    for fitter in fitters.values():
        _add_up_processes(fitter)
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
    on_batch: Callable[[], None] | None = None,
) -> int:
    """Runs the deployed model over batches and shows `visit` what goes into modules.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model; its adapters are off while it runs.
        dataloader (iterable of `dict[str, torch.Tensor]`): The batches.
        modules (`dict[str, nn.Module]`): Modules of the model to look at, by name.
        visit (`Callable`): Called with a module's name, its input `(..., d)`, and a function that returns which tokens
            are of which kind, padding left out.
        image_token_id (`int`, *optional*): See [`fit_null_space`].
        progress (`bool`, defaults to `True`): Whether to show a progress bar.
        desc (`str`, *optional*): Its label.
        on_batch (`Callable`, *optional*): Called before every forward pass.

    Returns:
        `int`: Number of batches.
    """
    inner = base_model(model)
    language = _language_modules(inner)
    visual_tokens = _visual_tokens(inner, image_token_id)
    masks: Parts = []

    def hook_of(name: str, module: nn.Module):
        in_language = None if language is None else any(part in language for part in module.modules())

        def hook(_, args, kwargs):
            x = args[0] if args else kwargs["x"]
            visit(name, x, lambda: _parts(name, x, masks, in_language))

        return hook

    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    observes_head = head is not None and any(part is head for module in modules.values() for part in module.modules())
    # The logits of all positions are the largest tensor of the pass, and nobody looks at them.
    few_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters and not observes_head
    batches = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(deployed_model(model))
        stack.enter_context(_random_state_kept(model))
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(hook_of(name, module), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in tqdm(dataloader, desc=desc, disable=not progress, leave=False):
            if not isinstance(batch, Mapping):
                raise TypeError(f"a batch is a {type(batch).__name__}; expected a dict of tensors.")
            inputs = to_device({key: value for key, value in batch.items() if key != "labels"}, model)
            masks[:] = _token_masks(inputs, visual_tokens)
            if on_batch is not None:
                on_batch()
            model(**inputs, **({"logits_to_keep": 1} if few_logits else {}))
            batches += 1
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
    return [("image", image & attention), ("text", ~image & attention)]


def _parts(name: str, x: torch.Tensor, masks: Parts, in_language: bool | None) -> Parts:
    """Which tokens of a layer's input are of which kind; `(kind, None)` stands for all of them."""
    if not masks or in_language is False:
        return [("image", None)]
    shape = masks[0][1].shape
    if x.shape[:-1] == shape:
        return [(group, mask.to(x.device)) for group, mask in masks]
    if in_language is None or x.ndim == 3:
        return [("image", None)]  # a vision tower, or image features that a language layer attends to
    if x.shape[:-1].numel() == shape.numel():
        return [(group, mask.to(x.device).reshape(x.shape[:-1])) for group, mask in masks]
    if bool(torch.stack([mask for _, mask in masks]).any(dim=0).all()):
        return [("text", None)]  # a share of the tokens (mixture of experts); without padding all of them count
    raise ValueError(
        f"layer {name!r} is given {x.shape[0]} tokens of a batch with {shape.numel()}, padding included, and does not "
        "say which: use retained batches without padding (batch size 1), or leave it out of target_modules."
    )


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Looking at retained data must not change the random numbers that training is going to draw."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _add_up_processes(fitter: NullSpaceFitter) -> None:
    """Adds up the sums of all processes of a distributed run; all of them must have seen the layer."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            fitter.all_reduce()
