"""Random changes of drawings, so that a tower trained on a few drawings per concept does not learn them by heart."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def on_white(rgba: torch.Tensor) -> torch.Tensor:
    """Premultiplied RGBA in [0, 1] `(n, 4, h, w)` -> RGB on white `(n, 3, h, w)`."""
    return rgba[:, :3] + (1 - rgba[:, 3:])


def augment(
    rgba: torch.Tensor,
    size: int,
    generator: torch.Generator,
    *,
    amount: float,
    white: float = 0.9,
    colour: float = 1.0,
    patches: float = 0.0,
) -> torch.Tensor:
    """Rotate, shear, scale, shift, flip, recolour and partly cover each drawing.

    Args:
        rgba (`torch.Tensor`): uint8, premultiplied, `(n, 4, h, w)`.
        size (`int`): Side of the images returned.
        generator (`torch.Generator`): Source of all randomness.
        amount (`float`): Strength, 0 (mirror images only) to 1.
        white (`float`): Share of images left on white; the others get a random gradient.
        colour (`float`): Share of `amount` for hue, saturation and brightness; small where colours tell things apart.
        patches (`float`): Share of images on random patches of colour instead.

    Returns:
        `torch.Tensor`: RGB in [0, 1], `(n, 3, size, size)`.
    """
    n = rgba.shape[0]

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def spread(*shape: int) -> torch.Tensor:  # uniform in +-1/2, scaled by `amount`
        return (rand(*shape) - 0.5) * amount

    # Geometry: the matrix maps output to input coordinates, so a larger zoom is a smaller object.
    angle, shear, aspect = spread(n) * 0.7, spread(n) * 0.3, 1 + spread(n) * 0.3
    zoom = 1 / (1 - 0.3 * amount + (0.1 + 0.35 * amount) * rand(n))
    flip = torch.where(rand(n) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [
        torch.stack([cos * zoom * flip * aspect, (shear - sin) * zoom, spread(n) * 0.3], -1),
        torch.stack([sin * zoom * flip, cos * zoom / aspect, spread(n) * 0.3], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [n, 4, size, size], align_corners=False)
    moved = F.grid_sample(rgba.float() / 255, grid, align_corners=False)
    rgb, alpha = moved[:, :3], moved[:, 3:]

    # Colour: hue turn about the grey axis (small for most), saturation, brightness.
    tinge = amount * colour
    turn = spread(n) * 1.2 * colour
    turn = torch.where(rand(n) < 0.6, turn * 0.4, turn)
    cos, sin = torch.cos(turn), torch.sin(turn)
    same, left, right = cos + (1 - cos) / 3, (1 - cos) / 3 - sin / 3**0.5, (1 - cos) / 3 + sin / 3**0.5
    matrix = torch.stack(
        [torch.stack(row, -1) for row in ((same, left, right), (right, same, left), (left, right, same))], 1
    )
    rgb = torch.einsum("nij,njhw->nihw", matrix, rgb)
    saturation = 1 - 0.7 * tinge + (0.2 + 0.9 * tinge) * rand(n, 1, 1, 1)
    saturation = torch.where(rand(n, 1, 1, 1) < 0.1 * tinge, torch.zeros(()), saturation)
    grey = rgb.mean(1, keepdim=True)
    rgb = (grey + (rgb - grey) * saturation) * (1 + 0.6 * colour * spread(n, 1, 1, 1))

    # Background.
    ramp = torch.linspace(0, 1, size).view(1, 1, 1, size)
    background = rand(n, 3, 1, 1) * (1 - ramp) + rand(n, 3, 1, 1) * ramp
    background = torch.where(rand(n, 1, 1, 1) < white, torch.ones(()), background)
    if patches:
        coarse = F.interpolate(rand(n, 3, 6, 6), size=size, mode="bilinear")
        background = torch.where(rand(n, 1, 1, 1) < patches, coarse, background)
    image = rgb + (1 - alpha) * background

    # A square of one colour over 40 % * amount of the images.
    side = int(size * 0.3)
    corner = (rand(2, n) * (size - side)).long()[..., None]
    line = torch.arange(size)[None]
    inside = (line >= corner) & (line < corner + side)  # (2, n, size)
    covered = inside[0][:, None, :, None] & inside[1][:, None, None, :] & (rand(n, 1, 1, 1) < 0.4 * amount)
    image = torch.where(covered, rand(n, 3, 1, 1), image)
    noise = torch.randn(n, 3, size, size, generator=generator) * 0.03 * rand(n, 1, 1, 1)
    return (image + noise).clamp(0, 1)
