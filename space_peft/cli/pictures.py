"""Pictures that a command is given."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
from datasets import Dataset
from PIL import Image

from ..data.loading import load_rows
from ..data.pictures import load_rgb, open_picture
from ..evaluation.named_images import NAME_COLUMNS, split_by_name
from ..records.folder import ANCHORS_PICTURE_NAME


def draw_sheet(anchors: Dataset, folder: Path, concept: str) -> None:
    """Draws each public image beside what it became, in a file of the folder.

    Args:
        anchors (`datasets.Dataset`): Anchors, refined or not.
        folder (`pathlib.Path`): Of the run.
        concept (`str`): Its name.
    """
    from ..evaluation.plots import plot_anchors  # matplotlib

    plot_anchors(anchors, folder / ANCHORS_PICTURE_NAME, concept=concept)


def load_pictures(place: str) -> Dataset:
    """Pictures with all that is said of them, from whatever [`load_rows`] reads.

    Args:
        place (`str`): Folder, file or Hub id. Of a folder with folders in it, their names are the column `label`.

    Raises:
        FileNotFoundError: If there is nothing at that place.
        ValueError: If there is no picture, or no column `image` of them.
    """
    images = load_rows(place)
    if "image" not in images.column_names:
        raise ValueError(f"{place!r} has the columns {images.column_names}; expected a column `image`.")
    if not isinstance(images.features["image"], datasets.Image):
        raise ValueError(
            f"the column `image` of {place!r} holds {images.features['image']}; expected pictures, or the paths of files."
        )
    return images


def load_target_images(place: str, concept: str | None, aliases: Sequence[str] = ()) -> list[Image.Image]:
    """The pictures of a concept alone, decoded: those with its name, where names are given; all of them otherwise.

    Says on the error stream how many others were left out.

    Args:
        place (`str`): See [`load_pictures`].
        concept (`str`, *optional*): The concept's name; without it the pictures may not have several names.
        aliases (`list[str]`, *optional*): Other names of it.

    Raises:
        FileNotFoundError: If there is nothing at that place.
        ValueError: If no picture is the concept's, it is not said which are, or one does not decode; the message names its
            file.
    """
    stored = load_pictures(place).cast_column("image", datasets.Image(decode=False))
    if concept is None:
        column = next((name for name in NAME_COLUMNS if name in stored.column_names), None)
        if column is not None and len(set(stored[column])) > 1:
            raise ValueError(
                f"the pictures in {place!r} have several names (column {column!r}); say with --concept which of them is the "
                "erased one."
            )
        found = tuple(stored["image"])
    else:
        found = split_by_name(stored, concept, aliases).target
    if left := len(stored) - len(found):
        print(f"{left} of {len(stored)} pictures in {place} show other things and are left out", file=sys.stderr)
    return [load_rgb(open_picture(picture)) for picture in found]


def load_images(place: str) -> list[Image.Image]:
    """The pictures alone, decoded.

    Args:
        place (`str`): See [`load_pictures`].

    Raises:
        FileNotFoundError: If there is nothing at that place.
        ValueError: If there is no picture, or one does not decode; the message names its file.
    """
    stored = load_pictures(place).cast_column("image", datasets.Image(decode=False))["image"]
    return [load_rgb(open_picture(picture)) for picture in stored]
