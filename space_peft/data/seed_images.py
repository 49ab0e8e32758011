"""Images made of a number: a test picture for any model that needs no file, and is the same on every machine.

A recipe never changes once it is released; a new one gets a new name, and pictures are stored with the name of theirs.
"""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image


RECIPE = "space_peft.seed_image.v1"
_GRID = 4
_SHAPES = 3


def seed_image(seed: int, width: int, height: int) -> Image.Image:
    """A smooth field of colours with three plain shapes on it, drawn from a seed.

    Only raw PCG64 output, sums, products and comparisons of float64 are used: NumPy guarantees the former to stay, IEEE
    754 the latter, so the picture is the same to the last bit everywhere.

    Args:
        seed (`int`): 0 or more.
        width (`int`): In pixels.
        height (`int`): In pixels.

    Returns:
        `PIL.Image.Image`: RGB.
    """
    source = np.random.PCG64(seed)

    def draw(*shape: int) -> np.ndarray:
        """Uniform in [0, 1)."""
        raw = source.random_raw(int(np.prod(shape)))
        return ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)

    y = (np.arange(height) + 0.5) / height
    x = (np.arange(width) + 0.5) / width
    image = _between(_between(draw(_GRID, _GRID, 3), y).transpose(1, 0, 2), x).transpose(1, 0, 2)  # (h, w, 3)
    for _ in range(_SHAPES):
        kind, middle_y, middle_x, half_y, half_x = draw(5)
        half_y, half_x = 0.1 + 0.25 * half_y, 0.1 + 0.25 * half_x
        across, down = np.abs(x - middle_x) / half_x, np.abs(y - middle_y) / half_y  # (w,), (h,)
        if kind < 1 / 3:
            inside = (across * across)[None, :] + (down * down)[:, None] < 1
        elif kind < 2 / 3:
            inside = (across < 1)[None, :] & (down < 1)[:, None]
        else:
            inside = across[None, :] + down[:, None] < 1
        image[inside] = draw(3)
    return Image.fromarray((image * 255 + 0.5).astype(np.uint8))


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an RGB image's size and pixels: the same for every file that holds the same picture."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.convert("RGB").tobytes()).hexdigest()


def _between(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Linear interpolation along the first dimension `(k, ...)`, at n places in [0, 1]: `(n, ...)`."""
    place = at * (len(rows) - 1)
    below = np.minimum(place.astype(np.int64), len(rows) - 2)
    share = (place - below).reshape(-1, *[1] * (rows.ndim - 1))
    return rows[below] * (1 - share) + rows[below + 1] * share
