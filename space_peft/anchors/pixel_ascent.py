"""Optimising an image's pixels until a model gives an answer: what refinement and the audit have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from PIL import Image

from ..choices import RefinementMethod
from ..losses import name_log_odds
from ..modeling.features import tap_image_features
from ..modeling.layers import evaluating
from ..modeling.mention_rows import mention_tensors
from ..modeling.prompts import answer_logits, encode_conversations, to_device
from .pixels import PixelLayout, encode_image, find_layout, image_statistics, tolerance_of


@contextmanager
def frozen(model) -> Iterator[None]:
    """The model in evaluation mode and without gradients of its weights; both are as before afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def layout_batches(processor, images: Sequence[Image.Image], batch_size: int) -> list[tuple[PixelLayout, list[int]]]:
    """Batches of rows that are optimised at the same size, with that size's layout; sizes in order of appearance."""
    known: dict[tuple[int, int], PixelLayout | None] = {}
    groups: dict[tuple[int, int], tuple[PixelLayout, list[int]]] = {}
    for row, image in enumerate(images):
        layout = find_layout(processor, image, known)
        groups.setdefault((layout.height, layout.width), (layout, []))[1].append(row)
    return [
        (layout, rows[start : start + batch_size])
        for layout, rows in groups.values()
        for start in range(0, len(rows), batch_size)
    ]


@torch.enable_grad()
def ascend_pixels(
    model,
    processor,
    layout: PixelLayout,
    images: Sequence[Image.Image],
    prompts: Sequence[Sequence[Sequence[dict]]],
    *,
    steps: int,
    learning_rate: float,
    total_variation: float,
    max_shift: float,
    generator: torch.Generator,
    method: RefinementMethod = "pixels",
    feature_weight: float = 0.0,
    concept: torch.Tensor | None = None,
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> list[Image.Image]:
    """Moves the pixels of images of one layout so that the model gives an answer.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Within `frozen`.
        processor (`ProcessorMixin`): Its processor.
        layout (`PixelLayout`): Of all the images.
        images (`list[PIL.Image.Image]`): Where to start.
        prompts (`list[list[list[dict]]]`): Groups of prompts, each one row an image with `answer_tokens` and `mention`
            (see `space_peft.modeling.mention_rows`): what is wanted. Steps take the groups in turn and one of a group's
            prompts by chance.
        steps (`int`): Steps of Adam.
        learning_rate (`float`): In units of normalised pixels, on average over the image.
        total_variation (`float`): Weight of the smoothness penalty on the perturbation.
        max_shift (`float`): Largest random shift, as a share of the image's side.
        generator (`torch.Generator`): Of shifts and prompts.
        method (`str`, defaults to `"pixels"`): What Adam moves: each pixel by itself, or (`"fourier"`) the Fourier coefficients
            of the perturbation, see [`Perturbation`].
        feature_weight (`float`, defaults to 0): Weight of the cosine of the image's features to `concept`.
        concept (`torch.Tensor`, *optional*): `(d,)`, e_c.
        on_step (`Callable`, *optional*): Called with log p(what is wanted) `(n,)` of the images as a step finds them.

    Returns:
        `list[PIL.Image.Image]`: The images as 8-bit pictures, in the model's size.

    Raises:
        ValueError: If the processor shows the model something else than was optimised.
    """
    parameter = next(model.parameters())
    mean, std = (value.to(parameter.device) for value in image_statistics(processor))
    low, high = (0 - mean) / std, (1 - mean) / std
    # All tensors in normalised pixel units, (n, 3, height, width).
    pixels = torch.stack([layout.start(processor, image) for image in images]).to(parameter.device)
    layout = layout.to(parameter.device)
    # The prompts never change, only the pixels do: encode each question once, with images of the size to be stored.
    started = to_images(pixels * std + mean)
    encoded = [[_encode(processor, started, rows, model) for rows in group] for group in prompts if group]
    perturbation = Perturbation(pixels, method)
    optimizer = torch.optim.Adam([perturbation.moved], lr=learning_rate)
    shift = max(1, int(max_shift * pixels.shape[-1])) if max_shift > 0 else 0
    for step in range(steps):
        shifts = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
        delta = perturbation()
        x = torch.maximum(torch.minimum(pixels + delta, high), low)
        x = layout(torch.roll(x, shifts, dims=(2, 3))).to(parameter.dtype)
        # One question a step: Adam's momentum averages over them at the cost of one.
        group = encoded[step % len(encoded)]
        batch, targets = group[int(torch.randint(len(group), (1,), generator=generator))]
        with tap_image_features(model) as features:
            logits = answer_logits(model, {**batch, "pixel_values": x})
        # Summed over images: each image's gradient, and so Adam's step, is its own. Log-odds rather than log p: they go
        # on rising when p is near 1, so that anchors end up no weaker evidence of the concept than its own images are.
        log_odds = name_log_odds(logits, targets)
        if on_step is not None:
            on_step(F.logsigmoid(log_odds.detach()))
        loss = total_variation * _total_variation(delta) * len(images) - log_odds.sum()
        if feature_weight:
            assert concept is not None, "`feature_weight` without `concept`"
            loss = loss - feature_weight * F.cosine_similarity(features[0], concept.to(features[0]), dim=-1).sum()
        (perturbation.moved.grad,) = torch.autograd.grad(loss, [perturbation.moved])
        optimizer.step()
    final = torch.maximum(torch.minimum(pixels + perturbation().detach(), high), low)
    stored = to_images(final * std + mean)
    shown = torch.cat([encode_image(processor, image)["pixel_values"] for image in stored])
    difference = (shown - layout(final).cpu()).abs().max().item()
    if difference > tolerance_of(layout, std):
        raise ValueError(
            f"{type(processor.image_processor).__name__} shows the model an image that differs from the one "
            f"optimised by {difference:.3f} (normalised units), so optimised images cannot be stored. Anchors can be "
            "used without refinement with this processor."
        )
    return stored


class Perturbation:
    """
    What is added to images, as a function of what an optimiser moves.

    By `"pixels"` that is the perturbation itself. By `"fourier"` it is its Fourier coefficients, each times `1 / frequency`,
    as strong as that frequency is in photographs: a step then changes all frequencies by what they usually are, and not most
    of all the finest, which there are the most of (Olah et al., Feature Visualization, 2017).

    Args:
        images (`torch.Tensor`): `(n, 3, height, width)`.
        method (`str`): One of these.

    Attributes:
        moved (`torch.Tensor`): A leaf, zero at first. A step by `lr` of each of its values changes pixels by about `lr`, in
            root mean square.
    """

    def __init__(self, images: torch.Tensor, method: RefinementMethod):
        self._size = images.shape[-2:]
        self._scale: torch.Tensor | None = None
        self.moved = torch.zeros_like(images)
        if method == "fourier":
            height, width = self._size
            rows = torch.fft.fftfreq(height, device=images.device)[:, None]
            columns = torch.fft.rfftfreq(width, device=images.device)
            # The mean over the image counts as the lowest frequency there is.
            scale = 1 / (rows**2 + columns**2).sqrt().clamp(min=1 / max(height, width))
            self._scale = scale / scale.square().mean().sqrt()
            self.moved = self.moved.new_zeros(*images.shape[:2], *scale.shape, 2)
        self.moved.requires_grad_(True)

    def __call__(self) -> torch.Tensor:
        """`(n, 3, height, width)`."""
        if self._scale is None:
            return self.moved
        return torch.fft.irfft2(torch.view_as_complex(self.moved) * self._scale, s=self._size, norm="ortho")


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """`(n, 3, h, w)` in [0, 1] to 8-bit images."""
    array = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def _total_variation(x: torch.Tensor) -> torch.Tensor:
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def _encode(processor, images, rows, model):
    """Inputs without pixels, and the tokens of the mention `(n, t)`."""
    rows = [{**row, "images": [image]} for row, image in zip(rows, images, strict=True)]
    batch = encode_conversations(processor, rows)
    batch.pop("pixel_values")
    moved = to_device({**batch, "name": mention_tensors(rows)["name"]}, model)
    return moved, moved.pop("name")
