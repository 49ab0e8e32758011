"""How many rows, tokens and steps an erasure is planned for."""

from __future__ import annotations

import math
from dataclasses import dataclass


# Tokens of a picture where neither the model's config nor the user says.
_PICTURE = 256


@dataclass(frozen=True)
class Workload:
    """
    What is going to be run.

    Args:
        rows (`int`): Retained rows.
        image_tokens (`int`): Of these tokens a row's picture takes so many; 0 for rows without pictures.
        row_tokens (`int`): Tokens of a row in the language model, its picture's included.
        patches (`int`): Tokens of a row's picture in the vision tower.
        steps (`int`, defaults to 60): Optimiser steps.
        batch_size (`int`, defaults to 16): Rows of a step.

    Raises:
        ValueError: If a number is negative, or a row has less tokens than its picture.
    """

    rows: int
    image_tokens: int
    row_tokens: int
    patches: int
    steps: int = 60
    batch_size: int = 16

    def __post_init__(self):
        for name, least in (("rows", 1), ("image_tokens", 0), ("row_tokens", 1), ("patches", 0), ("steps", 0),
                            ("batch_size", 1)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` is {value!r}; expected an integer of at least {least}.")
        if self.row_tokens < self.image_tokens:
            raise ValueError(
                f"a row of {self.row_tokens} tokens cannot hold a picture of {self.image_tokens}: `row_tokens` counts the "
                "picture's, too."
            )

    @classmethod
    def of(
        cls, config, *, rows: int, image_tokens: int | None = None, row_tokens: int | None = None, **options
    ) -> Workload:
        """Fills in what a model's config says of its pictures.

        Args:
            config (`PretrainedConfig`): Of a multimodal model.
            rows (`int`): Retained rows.
            image_tokens (`int`, *optional*): By default those of one picture (one tile) as the config has it; 256 where a
                picture's size decides.
            row_tokens (`int`, *optional*): By default the picture's and 64.
            options: `steps` and `batch_size`.
        """
        patches, merged = picture_tokens(config)
        if image_tokens is None:
            image_tokens = merged
        row_tokens = image_tokens + 64 if row_tokens is None else row_tokens
        return cls(rows, image_tokens, row_tokens, math.ceil(image_tokens * patches / merged), **options)

    def tokens(self, part: str) -> int:
        """Tokens of a row that a part of the model sees. Logits are made of answers alone, hence 0 for the head."""
        return {"tower": self.patches, "projector": self.image_tokens, "language": self.row_tokens, "other": 0}[part]

    def of_kind(self, kind: str, part: str) -> int:
        """The same for one kind of token, "image" or "text"."""
        if part in ("tower", "projector"):
            return self.tokens(part)
        return self.image_tokens if kind == "image" else self.row_tokens - self.image_tokens


def picture_tokens(config) -> tuple[int, int]:
    """Tokens of one picture in the tower, and in the language model: `(patches, image tokens)`, both at least 1.

    Args:
        config (`PretrainedConfig`): Of a multimodal model.
    """
    vision = getattr(config, "vision_config", None)

    def side(name: str) -> int | None:
        value = getattr(vision, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        return value if isinstance(value, int) and value > 0 else None

    ratio = getattr(config, "downsample_ratio", None)
    merge = side("spatial_merge_size") or getattr(config, "scale_factor", None) or (round(1 / ratio) if ratio else 1)
    size, patch = side("image_size"), side("patch_size")
    patches = (size // patch) ** 2 if size and patch else _PICTURE * merge**2
    merged = getattr(config, "mm_tokens_per_image", None) or max(patches // merge**2, 1)
    return max(patches, 1), merged
