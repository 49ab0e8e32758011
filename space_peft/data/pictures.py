"""Pictures as users have them: what counts as one, and the one way in which it becomes RGB."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps


# How pictures become RGB; part of the key of what is computed from them and kept. 2: wide modes scaled, EXIF applied.
RECIPE = "2"
# What Pillow converts to RGB without clipping, and with alpha. Other modes are refused, not guessed.
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_WIDE = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
# Where a text points to a picture, a film or a sound instead of holding words.
_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".mp4", ".webm", ".mov", ".avi", ".mkv", ".wav", ".mp3", ".flac", ".ogg"),
)


def open_picture(picture: Any) -> Image.Image:
    """The PIL image behind a picture; its file is opened, not yet decoded.

    Args:
        picture (`PIL.Image.Image`, `str`, `os.PathLike`, `bytes` or `dict`): An image, the path of a file, a file's
            bytes, or `{"bytes": ..., "path": ...}` as `datasets.Image(decode=False)` gives them.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is a URL, or there is no such file, or Pillow does not know what it holds.
    """
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, dict) and {"bytes", "path"} >= {key for key in picture if picture[key] is not None}:
        given = picture.get("bytes") if picture.get("bytes") is not None else picture.get("path")
        if given is not None:
            return open_picture(given)
        raise ValueError("the picture holds neither bytes nor a path; drop its row, or fill it in.")
    if isinstance(picture, (str, os.PathLike)):
        if "://" in str(picture) or str(picture).startswith("data:"):
            raise ValueError(
                f"the picture is the URL {str(picture)[:80]!r}, and nothing is downloaded here; load it first, e.g. with "
                "`transformers.image_utils.load_image(url)`."
            )
        if not Path(picture).is_file():
            raise ValueError(f"the picture is the path {str(picture)[:200]!r}, and there is no such file.")
    elif not isinstance(picture, (bytes, bytearray)):
        hint = ""
        if hasattr(picture, "shape"):
            hint = "; take the images without a format (`dataset.with_format(None)`), or make one: `Image.fromarray`"
        raise TypeError(
            f"expected a PIL image, got {type(picture).__name__}; the path or the bytes of a file will do as well{hint}."
        )
    try:
        return Image.open(io.BytesIO(picture) if isinstance(picture, (bytes, bytearray)) else picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = f"of {len(picture)} bytes" if isinstance(picture, (bytes, bytearray)) else repr(str(picture))
        raise ValueError(f"the picture {name} is none that Pillow opens: {error}.") from error


def load_rgb(image: Any) -> Image.Image:
    """Returns a decoded RGB image of 8 bits a channel, the right way up, transparent parts on white.

    Every part of the library that shows a picture to a model makes it RGB here, so that it looks the same to all. Values
    of more than 8 bits are scaled, never clipped: of 16-bit images ("I;16") 65535 is white; floats ("F") are in [0, 1] or
    else in [0, 255]; 32-bit ones ("I") are in [0, 255] or else in [0, 65535].

    Args:
        image (`PIL.Image.Image`): In any mode (L, P, RGBA, CMYK, I;16, F, ...).

    Raises:
        TypeError: If it is no PIL image.
        ValueError: If its file does not decode, or its values are in none of these ranges.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"expected a PIL image, got {type(image).__name__}; open files with `PIL.Image.open`, and cast the column of a "
            "dataset with `dataset.cast_column('image', Image())`."
        )
    try:
        image.load()  # PIL reads lazily: a broken file shows only now.
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in _WIDE:
            image = _eight_bits(image)
        if image.mode not in (*_PLAIN, *_ALPHA):
            raise ValueError(f"its mode is {image.mode!r}; convert it to RGB yourself")
        if image.mode in _ALPHA or "transparency" in image.info:
            image = image.convert("LA") if image.mode == "La" else image
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, "white")
            canvas.alpha_composite(image)
            image = canvas
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {getattr(image, 'filename', '') or image!r} does not decode: {error}.") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of integers or floats as "L"; Pillow would clip them at 255."""
    values = np.asarray(image).astype(np.float64)  # (h, w)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    limits = {"F": (1, 255), "I": (255, 65535)}.get(image.mode, (65535,))
    white = next((limit for limit in limits if high <= limit), None)
    if white is None or not low >= 0 or not np.isfinite(values).all():
        raise ValueError(
            f"its values, of mode {image.mode!r}, go from {low:g} to {high:g}; expected [0, {limits[0]}]"
            + (f" or [0, {limits[-1]}]" if limits[1:] else "")
            + ": scale it yourself"
        )
    grey = np.rint(values * (255 / white)).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255  # transparent parts are on white
    return Image.fromarray(grey)


def refers_to_media(text: str) -> bool:
    """Whether a text is the URL or the path of a picture, film or sound, or holds one as a data URL."""
    if text.startswith(("data:image/", "data:video/", "data:audio/")):
        return True
    place = text.strip().lower().partition("?")[0] if len(text) <= 4096 else ""
    return place.endswith(_SUFFIXES) and len(place.split()) == 1
