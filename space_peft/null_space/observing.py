"""Looking at what goes into modules of the deployed model, and which of it is of which kind of token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from ..data.rows import check_all_read, check_batch, check_loader
from ..distributed import processes
from ..modeling.batch_observer import BatchObserver
from ..modeling.features import attends_to_images
from ..modeling.layers import base_model, deployed_model
from ..modeling.prompts import takes_logits_to_keep, to_device
from ..records.stages import track
from .precision import exact_products


# What a layer sees comes in parts: (kind, mask of the tokens of that kind or None for all of them).
Parts = list[tuple[str, torch.Tensor | None]]
_VISUAL_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def observe_inputs(
    model: nn.Module,
    dataloader: Iterable[Mapping],
    modules: Mapping[str, nn.Module],
    visit: Callable[[str, torch.Tensor, Callable[[], Parts]], None],
    *,
    image_token_id: int | None = None,
    progress: bool = True,
    desc: str | None = None,
    adapted: bool = False,
    on_batch: Callable[[dict, bool], bool] | None = None,
    after_batch: Callable[[], None] | None = None,
    observer: BatchObserver | None = None,
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
        observer ([`BatchObserver`], *optional*): Who looks on.

    Returns:
        `int`: Number of batches.
    """
    check_loader(dataloader)
    inner = base_model(model)
    language = _language_modules(inner)
    visual = visual_tokens(inner, image_token_id)
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
        if observer is not None:
            stack.enter_context(observer)
        shares = processes.share_batches(dataloader, model)
        total = processes.share_length(dataloader)
        for batch, counted in track(shares, desc or "", total=total, show=shows_progress(progress)):  # noqa: B007
            check_batch(batch, batches)
            batch = batch if observer is None else observer.before(batch)
            inputs = to_device({key: value for key, value in batch.items() if key != "labels"}, model)
            masks[:] = _token_masks(inputs, visual)
            batches += 1
            if on_batch is not None and not on_batch(inputs, counted):
                continue
            if few_logits:
                inputs.setdefault("logits_to_keep", 1)
            else:
                inputs.pop("logits_to_keep", None)
            model(**inputs)
            if observer is not None:
                observer.after()
            if after_batch is not None:
                after_batch()
    check_all_read(dataloader, batches, total)
    if batches == 0:
        raise ValueError("the retained data are empty: the dataloader gave no batch. Give at least one retained row.")
    return batches


def _language_modules(model: nn.Module) -> set[nn.Module] | None:
    """Every module of the language model, output layer included; `None` if the model does not say which part it is."""
    if not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    if decoder is None or decoder is model or not isinstance(decoder, nn.Module):
        return None
    head = model.get_output_embeddings()
    return set(decoder.modules()) | ({head} if head is not None else set())


def visual_tokens(model: nn.Module, image_token_id: int | None = None) -> list[int]:
    """The tokens that stand for a piece of a picture; none where pictures are attended to, or the config names none."""
    if image_token_id is not None:
        return [image_token_id]
    if attends_to_images(getattr(model, "model", None)):
        return []  # its image token is one word of the prompt
    config = getattr(model, "config", None)
    return [token for name in _VISUAL_TOKENS if isinstance(token := getattr(config, name, None), int)]


def _token_masks(inputs: dict, visual_tokens: list[int]) -> Parts:
    """The kinds of tokens of a batch, `(b, length)` each, padding in none of them."""
    ids, attention = inputs.get("input_ids"), inputs.get("attention_mask")
    if attention is not None and attention.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention.shape)}; expected (rows, length).")
    if ids is None:
        return [] if attention is None else [("text", attention.bool())]
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
    tokens = [(kind, mask) for kind, mask in masks if kind != "tiles" and mask is not None]
    if not tokens or in_language is False:
        return _image_part(x, tiles)
    shape = tokens[0][1].shape
    if x.shape[:-1] == shape:
        return [(group, mask.to(x.device)) for group, mask in tokens]
    if in_language is None or x.ndim == 3:
        return _image_part(x, tiles)  # a vision tower, or image features that a language layer attends to
    if x.shape[:-1].numel() == shape.numel():
        return [(group, mask.to(x.device).reshape(x.shape[:-1])) for group, mask in tokens]
    if bool(torch.stack([mask for _, mask in tokens]).any(dim=0).all()):
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


def shows_progress(progress: bool) -> bool:
    return progress and processes.rank_and_size()[0] == 0


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Looking at retained data must not change the random numbers that training is going to draw."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
