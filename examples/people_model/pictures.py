"""The pictures that models are trained on, and, apart from them, those that they are measured on."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from parts import BACKGROUNDS
from PIL import Image


NEAR = 14  # how far a colour may be from the background's to be it; palettes move colours a little


@dataclass(frozen=True)
class Pictures:
    """Pictures of one part of the archive.

    Args:
        rgba (`torch.Tensor`): uint8, premultiplied, `(n, 4, 64, 64)`. Plain backgrounds are transparent, so that others can
            be put behind.
        images (`list[PIL.Image.Image]`): As they are stored.
        person (`torch.Tensor`): `(n,)`, place of the person in the list they were read from.
        part (`list[str]`): Of each.
    """

    rgba: torch.Tensor
    images: list[Image.Image]
    person: torch.Tensor
    part: list[str]


def read_pictures(people: Sequence[Mapping], *parts: str) -> Pictures:
    """Pictures of people, in the order of the archive.

    Args:
        people (`list[dict]`): Rows of the archive.
        parts (`str`): Of `"train"`, `"test"` and `"unseen"`.
    """
    rows = [
        (i, picture) for i, person in enumerate(people) for picture in person["pictures"] if picture["part"] in parts
    ]
    images = [Image.open(io.BytesIO(picture["image"]["bytes"])).convert("RGB") for _, picture in rows]
    rgba = np.stack([_without_background(np.asarray(image), picture) for image, (_, picture) in zip(images, rows)])
    return Pictures(
        torch.from_numpy(rgba).permute(0, 3, 1, 2).contiguous(),
        images,
        torch.tensor([i for i, _ in rows]),
        [picture["part"] for _, picture in rows],
    )


def _without_background(rgb: np.ndarray, picture: Mapping) -> np.ndarray:
    opaque = np.full(rgb.shape[:2], True)
    if picture["shade"] == "plain":
        colour = np.array([int(BACKGROUNDS[picture["background"]][i : i + 2], 16) for i in (1, 3, 5)])
        opaque = np.abs(rgb.astype(int) - colour).max(-1) > NEAR
    alpha = (opaque * 255).astype(np.uint8)[..., None]
    return np.concatenate([rgb * opaque[..., None], alpha], -1).astype(np.uint8)
