"""From an image to a model's `pixel_values`, differentiably and whatever the layout (docs/method.md, section 2).

Refinement moves the pixels of an *image*, and has to know what the model will see of it. A processor's last steps, after
it has resized an image, only rearrange pixels: LLaVA's keeps them, Qwen-VL's cuts them into patches, others cut tiles
and may add a small copy of the whole. So nothing here knows an architecture: the rearrangement is read off the processor
itself, by showing it images whose pixels say where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image, ImageOps

from ..modeling.processors import image_token


# What one 8-bit level is worth on a scale of 0 to 1.
LEVEL = 1 / 255


def encode_image(processor, image: Image.Image) -> dict[str, torch.Tensor]:
    """What the processor makes of one image; with the prompt that is nothing but the image, some need one."""
    return dict(processor(images=[[image]], text=[image_token(processor)], return_tensors="pt"))


def image_statistics(processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation that `pixel_values` were normalised with, `(3, 1, 1)` each."""
    image_processor = processor.image_processor
    if not getattr(image_processor, "do_normalize", True):
        return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    mean, std = (torch.tensor(getattr(image_processor, f"image_{name}")).view(3, 1, 1) for name in ("mean", "std"))
    return mean, std


@dataclass(frozen=True, eq=False)
class PixelLayout:
    """
    The processor's map from images of one size to `pixel_values`, as a differentiable function.

    Images are tensors `(n, 3, height, width)` in normalised units, `(value - mean) / std` with values in [0, 1].

    Args:
        height, width (`int`): Size of the images, one which the processor does not resize.
        shape (`tuple[int, ...]`): Of one image's `pixel_values`; those of n images are joined along the first dimension.
        index (`torch.Tensor`): For each element of `pixel_values` the element of `(3, height, width)` it is a copy of.
            Elements of padding point behind the image, at the entries of `constants`.
        constants (`torch.Tensor`): `(k,)`, the values of padding.
        small (`torch.Tensor`): `(tiles,)`, which tiles `(3, h, w)` are not copies of pixels but the whole image made
            small.
        rows, columns (`torch.Tensor`): `(h, height)` and `(w, width)`, the resampling that makes it small; empty without
            such tiles.
        low, high (`torch.Tensor`): `(3, 1, 1)`, black and white in normalised units.
    """

    height: int
    width: int
    shape: tuple[int, ...]
    index: torch.Tensor
    constants: torch.Tensor
    small: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @property
    def used(self) -> torch.Tensor:
        """`(tiles,)`, which tiles show anything of the image; the others are padding."""
        return (self.index.view(len(self.small), -1) < 3 * self.height * self.width).any(dim=1)

    def to(self, device: torch.device | str) -> PixelLayout:
        """The same layout on another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """`pixel_values` of images `(n, 3, height, width)`."""
        n = len(images)
        pixels = torch.cat([images.flatten(1), self.constants.expand(n, -1)], dim=1)[:, self.index]
        if self.small.any():
            whole = self.resize(images).flatten(1)[:, None]  # (n, 1, elements of a tile)
            pixels = torch.where(self.small[:, None], whole, pixels.view(n, len(self.small), -1))
        return pixels.reshape(n * self.shape[0], *self.shape[1:])

    def resize(self, images: torch.Tensor) -> torch.Tensor:
        """The images made small, `(n, 3, h, w)`: columns first, then rows, with clipping, as PIL does it."""
        narrow = torch.clamp(images @ self.columns.T, self.low, self.high)
        return torch.clamp(self.rows @ narrow, self.low, self.high)

    def start(self, processor, image: Image.Image) -> torch.Tensor:
        """What an image of any size looks like in this layout, `(3, height, width)`.

        Where the processor keeps one picture, the one it makes of the image; where it cuts tiles, the image as large as
        it fits, on black.
        """
        copies = self.used & ~self.small  # (tiles,)
        if copies.sum() == 1:
            pixels = encode_image(processor, image)["pixel_values"]
            if tuple(pixels.shape) == self.shape:
                index, values = (flat.reshape(len(copies), -1)[copies].flatten() for flat in (self.index, pixels))
                canvas = pixels.new_zeros(3 * self.height * self.width)
                return canvas.scatter(0, index, values).view(3, self.height, self.width)
        fitted = ImageOps.pad(image, (self.width, self.height), Image.Resampling.BICUBIC)
        return normalise(fitted, self.low, self.high)


def find_layout(processor, image: Image.Image, known: dict[tuple[int, int], PixelLayout | None]) -> PixelLayout:
    """The layout in which an image is refined: at the size nearest to its own that the processor does not resize.

    Args:
        processor (`ProcessorMixin`): Of the model.
        image (`PIL.Image.Image`): An RGB image of any size.
        known (`dict`): By size `(height, width)`, the layouts found so far (`None`: the processor resizes that size);
            grows.

    Returns:
        `PixelLayout`: The layout.

    Raises:
        ValueError: If the processor changes images of every size that it could be expected to keep.
    """
    sizes, used = _candidate_sizes(processor, image)
    kept = []
    for size in sizes:
        if size not in known:
            known[size] = _read_layout(processor, *size)
        layout = known[size]
        if layout is not None:
            kept.append(layout)
            if layout.used.sum() == used:
                return layout
    if kept:
        return kept[0]
    tried = ", ".join(f"{width} x {height}" for height, width in sizes)
    raise ValueError(
        f"{type(processor.image_processor).__name__} changes an image of its own output size (tried {tried}) by more "
        "than rearranging its pixels, so a refined image could not be stored. Use a processor that does not crop or "
        "enlarge images of that size, or unrefined anchors."
    )


def normalise(image: Image.Image, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """An 8-bit RGB image as `(3, height, width)` in normalised units."""
    values = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) * LEVEL
    return low + values * (high - low)


def _candidate_sizes(processor, image: Image.Image) -> tuple[list[tuple[int, int]], int]:
    """Sizes `(height, width)` which the processor may keep, those most like the image first, and how many tiles it
    shows of the image."""
    inputs = encode_image(processor, image)
    pixels = inputs["pixel_values"]
    image_processor = processor.image_processor
    if "image_grid_thw" in inputs:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        return [(rows * image_processor.patch_size, columns * image_processor.patch_size)], 1
    if pixels.ndim < 4:
        raise ValueError(
            f"{type(image_processor).__name__} gives pixel_values of shape {tuple(pixels.shape)}; refinement handles "
            "tiles (..., 3, height, width) and patches with `image_grid_thw`. Use unrefined anchors with this model."
        )
    height, width = pixels.shape[-2:]
    # Tiles that no image reaches are padding.
    blank = [Image.new("RGB", image.size, colour) for colour in ("black", "white")]
    black, white = (encode_image(processor, one)["pixel_values"].reshape(-1, 3 * height * width) for one in blank)
    used = max(1, int((black != white).any(dim=1).sum()))
    # A grid of all of them, or of all but one, which is the whole image made small.
    counts = sorted({used, max(1, used - 1)})
    sizes = [(rows * height, n // rows * width) for n in counts for rows in range(1, n + 1) if n % rows == 0]
    sizes.sort(key=lambda size: abs(math.log(size[0] / size[1] * image.width / image.height)))
    # Without tiles, some processors show nothing but the whole image made small.
    longest = (image_processor.size or {}).get("longest_edge")
    sizes += [(height, width)] + ([(longest, longest)] if longest else [])
    return list(dict.fromkeys(sizes)), used


def _read_layout(processor, height: int, width: int) -> PixelLayout | None:
    """Reads off a processor where it takes each element of `pixel_values` from; `None` if it does more than that."""
    mean, std = image_statistics(processor)
    low, high = (0 - mean) / std, (1 - mean) / std

    def shown(array: np.ndarray) -> torch.Tensor:
        return encode_image(processor, Image.fromarray(array))["pixel_values"]

    def levels(values: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
        return ((values * std.flatten()[channel] + mean.flatten()[channel]) / LEVEL).round().long()

    area = height * width
    places = np.arange(area).reshape(height, width, 1)
    # An image whose channels differ, the digits of each pixel's place in base 256, and noise to check the result with.
    # Its colours are no digits of any place at once: only padding is the same in all images.
    images = [np.broadcast_to(np.array([160, 205, 250], dtype=np.uint8), (height, width, 3))]
    images += [np.broadcast_to((places >> shift) & 255, (height, width, 3)).astype(np.uint8) for shift in (0, 8, 16)]
    images += [np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)]
    outputs = [shown(np.ascontiguousarray(array)) for array in images]
    shape = tuple(outputs[0].shape)
    if any(tuple(output.shape) != shape for output in outputs):
        return None
    colours, *digits, noise = (output.flatten() for output in outputs)

    flat_colours = (torch.tensor([160.0, 205.0, 250.0]) * LEVEL - mean.flatten()) / std.flatten()
    channel = (colours[:, None] - flat_colours).abs().argmin(dim=1)
    place = sum(levels(values, channel) << shift for values, shift in zip(digits, (0, 8, 16)))
    index = channel * area + place.clamp(0, area - 1)
    original = normalise(Image.fromarray(images[-1]), low, high)
    tolerance = 0.1 * LEVEL / std.max()
    copied = (original.flatten()[index] - noise).abs() < tolerance
    padding = torch.stack([colours, *digits]).sub(noise).abs().amax(dim=0) < tolerance
    constants, which = torch.unique(noise[padding], return_inverse=True)
    index = index.masked_scatter(padding, 3 * area + which)

    tiles = math.prod(shape[:-3]) if len(shape) >= 4 else 1
    small = ~(copied | padding).view(tiles, -1).all(dim=1)
    empty = torch.zeros(0, 0)
    layout = PixelLayout(height, width, shape, index, constants, small, empty, empty, low, high)
    if not small.any():
        return layout
    if len(shape) < 4:
        return None
    declared = getattr(processor.image_processor, "resample", None)
    # The torchvision backend has no Lanczos filter and takes the bicubic one for it.
    for resample in (declared, Image.Resampling.BICUBIC):
        rows, columns = (_resampling_matrix(*sizes, resample) for sizes in ((height, shape[-2]), (width, shape[-1])))
        layout = PixelLayout(height, width, shape, index, constants, small, rows, columns, low, high)
        if (layout(original[None]).flatten() - noise).abs().max() < tolerance_of(layout, std):
            return layout
    return None


def tolerance_of(layout: PixelLayout, std: torch.Tensor) -> float:
    """How far 8-bit storage may move `pixel_values`: half a level, with room to spare. Where the image is made small, two
    steps of resampling are rounded as well, and the filter amplifies a little."""
    return (4 if layout.small.any() else 2) * LEVEL / std.min().item()


def _resampling_matrix(size: int, new_size: int, resample: int | None) -> torch.Tensor:
    """`(new_size, size)`: PIL's resampling along one axis, read off the images of unit vectors."""
    resample = Image.Resampling.BICUBIC if resample is None else Image.Resampling(int(resample))
    return torch.from_numpy(
        np.array(Image.fromarray(np.eye(size, dtype=np.float32)).resize((size, new_size), resample))
    )
