"""The rendered drawings as training tensors: those of the concepts, and those of all other emoji.

The other emoji only serve the warm start of the vision tower. The unseen style is dropped while loading, so that no
training code can reach it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from concepts import KINDS, UNSEEN_STYLE
from PIL import Image


DRAWING_SIZE = 72  # a little more than the model's 64, for the augmentation to zoom in


@dataclass(frozen=True)
class Drawings:
    """Drawings of the trained styles.

    Args:
        rgba (`torch.Tensor`): uint8, premultiplied, `(n, 4, 72, 72)`.
        white (`list[PIL.Image.Image]`): The same on white, 96 x 96, as they are in `images.parquet`.
        concept (`torch.Tensor`): `(n,)`; `i < len(names)` is a concept, larger values are other emoji.
        style (`list[str]`): `(n,)`.
        names (`list[str]`): Concept names.
        kinds (`list[str]`): Kind of each concept.
        n_other (`int`): Number of other emoji.
    """

    rgba: torch.Tensor
    white: list[Image.Image]
    concept: torch.Tensor
    style: list[str]
    names: list[str]
    kinds: list[str]
    n_other: int


def paste_on_white(pixels: np.ndarray) -> Image.Image:
    """RGBA `(h, w, 4)` uint8 -> RGB image on white."""
    drawing = Image.fromarray(pixels, "RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")


def load_drawings(work: Path) -> Drawings:
    """Read `<work>/emoji.npz`, without the unseen style."""
    with np.load(work / "emoji.npz") as file:
        images, emoji, style, listed, groups = (file[k] for k in ("images", "emoji", "style", "names", "groups"))
    position = {name: i for i, name in enumerate(listed.tolist())}
    rows = [(name, kind, position[emoji]) for kind, names in KINDS.items() for name, emoji in names.items()]
    index = {source: i for i, (_, _, source) in enumerate(rows)}
    # Symbols are squares with a sign: they teach nothing about objects. One drawing of a thing cannot show what two
    # styles share.
    counts = np.bincount(emoji[style != UNSEEN_STYLE], minlength=len(listed))
    for i in range(len(listed)):
        if i not in index and groups[i] != "Symbols" and counts[i] >= 2:
            index[i] = len(index)

    keep = [j for j in range(len(emoji)) if style[j] != UNSEEN_STYLE and emoji[j] in index]
    rgba = np.stack(
        [
            np.asarray(Image.fromarray(images[j], "RGBA").convert("RGBa").resize((DRAWING_SIZE,) * 2, Image.LANCZOS))
            for j in keep
        ]
    )
    return Drawings(
        rgba=torch.from_numpy(rgba).permute(0, 3, 1, 2).contiguous(),
        white=[paste_on_white(images[j]) for j in keep],
        concept=torch.tensor([index[emoji[j]] for j in keep]),
        style=[str(style[j]) for j in keep],
        names=[name for name, _, _ in rows],
        kinds=[kind for _, kind, _ in rows],
        n_other=len(index) - len(rows),
    )
