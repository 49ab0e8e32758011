"""Reading a pool of images: its checks, its images and its captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, Value
from datasets.utils.file_utils import xopen
from PIL import Image

from ..data.pictures import load_rgb
from ..data.rows import check_kind


CAPTION_COLUMNS = ("caption", "captions", "name", "title", "text", "label")
ID_COLUMNS = ("id", "image_id")


@dataclass(frozen=True)
class Pool:
    """A checked pool and the columns that are read from it."""

    data: Dataset
    fingerprint: str
    image_column: str
    caption_column: str | None
    id_column: str | None

    def __len__(self) -> int:
        return len(self.data)

    def content(self, rows: Sequence[int], column: str) -> str:
        """A digest of what a column of some rows holds: of captions the text, of images the encoded bytes, which are read
        from their files where the pool holds paths. Pictures at an address on the network count by the address."""
        digest = hashlib.sha256()
        if column != self.image_column:
            digest.update(json.dumps(self.captions(rows)).encode())
            return digest.hexdigest()
        for start in range(0, len(rows), 64):  # Large pictures by the thousand would fill the memory.
            for image in self._encoded[rows[start : start + 64]][column]:
                digest.update(hashlib.sha256(_encoded_bytes(image)).digest())
        return digest.hexdigest()

    def files_digest(self) -> str | None:
        """A digest of the files that hold the pictures; `None` if the pool holds all of them itself, so that its fingerprint
        says which they are."""
        column = self.image_column
        if not any(chunk.field("bytes").null_count for chunk in self.data.data.column(column).chunks):
            return None  # Arrow knows without reading a picture.
        digest = hashlib.sha256()
        for start in range(0, len(self), 64):
            for image in self._encoded[start : start + 64][column]:
                if image is not None and image["bytes"] is None:
                    digest.update(hashlib.sha256(_encoded_bytes(image)).digest())
        return digest.hexdigest()

    @cached_property
    def _encoded(self) -> Dataset:
        return self._only_images.cast_column(self.image_column, datasets.Image(decode=False))

    # Made once: `select_columns` looks at every record batch of the table, and a large pool is read in many batches.
    @cached_property
    def _only_images(self) -> Dataset:
        return self.data.select_columns([self.image_column])

    @cached_property
    def _only_captions(self) -> Dataset:
        return self.data.select_columns([self.caption_column])

    def captions(self, rows: Sequence[int]) -> list[str | None]:
        """One caption for each of some rows, several of a row joined by a line break, class labels by name; `None` where
        a row has none, as all of a pool without captions."""
        if self.caption_column is None:
            return [None] * len(rows)
        feature = self.data.features[self.caption_column]
        values = self._only_captions[rows][self.caption_column]
        if isinstance(feature, ClassLabel):
            return [None if value is None or value < 0 else feature.int2str(value) for value in values]
        return ["\n".join(v for v in value if v) if isinstance(value, list) else value for value in values]

    def images(self, rows: Sequence[int]) -> list[Image.Image | Exception]:
        """RGB images of some rows; where one does not decode, the exception instead of the image."""
        try:
            images = self._only_images[rows][self.image_column]
        except Exception:  # whatever a decoder raises: read again one by one to find the rows it happened in
            images = [self._one(row) for row in rows]
        return [_to_rgb(image) for image in images]

    def _one(self, row: int):
        try:
            return self._only_images[int(row)][self.image_column]
        except Exception as error:  # see `images`: handed to the caller, who knows whether to skip or to raise
            return error


def _encoded_bytes(image: dict | None) -> bytes:
    if image is None or image["bytes"] is None and image["path"] is None:
        return b"no image"
    if image["bytes"] is not None:
        return image["bytes"]
    path = image["path"]
    if "://" in path and not Path(path.rpartition("::")[2]).exists():
        return f"address {path}".encode()
    try:
        with xopen(path, "rb") as file:
            return file.read()
    except OSError as error:  # Embedding the row says what is wrong with it; once it is there it is another content.
        return f"unreadable {path} {type(error).__name__}".encode()


def _to_rgb(image) -> Image.Image | Exception:
    if image is None:
        return ValueError("the row holds no image")
    if isinstance(image, Exception):
        return image
    try:
        return load_rgb(image)
    except ValueError as error:
        return error


def open_pool(
    pool: Dataset, *, image_column: str = "image", caption_column: str | None = None, id_column: str | None = None
) -> Pool:
    """Checks a pool and finds its columns.

    Args:
        pool (`datasets.Dataset`): With a column of images.
        image_column (`str`, defaults to `"image"`): That column.
        caption_column (`str`, *optional*): Strings, lists of strings or class labels. Default: the first such column
            among "caption", "captions", "name", "title", "text", "label", if any.
        id_column (`str`, *optional*): The rows' own identifiers. Default: "id" or "image_id", if any.

    Raises:
        TypeError: If it is no `datasets.Dataset`.
        ValueError: If it is empty, has a transform, or a column is missing or of another type.
    """
    check_kind(pool, "pool")
    if not isinstance(pool, Dataset):
        raise TypeError(f"expected the pool to be a `datasets.Dataset`, got {type(pool).__name__}.")
    if len(pool) == 0:
        raise ValueError("the pool is empty: anchors are chosen among its images, so give a dataset with rows.")
    for what, column in (("image", image_column), ("caption", caption_column), ("id", id_column)):
        if column is not None and column not in pool.column_names:
            raise ValueError(
                f"the pool has no column {column!r}, its columns are {pool.column_names}: set `{what}_column`."
            )
    if pool.format["type"] == "custom":
        raise ValueError("the pool has a transform, which would not be applied; store its result with `pool.map`.")
    fingerprint = pool._fingerprint
    # Without format and search indexes, which `with_format` and others would copy, however large they are.
    pool = Dataset(pool.data, info=pool.info, split=pool.split, indices_table=pool._indices, fingerprint=fingerprint)
    feature = pool.features[image_column]
    if not isinstance(feature, datasets.Image):
        raise ValueError(
            f"column {image_column!r} of the pool holds {feature}, expected images: set "
            "`image_column`, or cast it with "
            f"`pool.cast_column({image_column!r}, datasets.Image())`."
        )
    if not feature.decode:
        pool = pool.cast_column(image_column, datasets.Image())
    if caption_column is None:
        caption_column = next((c for c in CAPTION_COLUMNS if c in pool.features and _is_text(pool.features[c])), None)
    elif not _is_text(pool.features[caption_column]):
        raise ValueError(
            f"caption column {caption_column!r} holds {pool.features[caption_column]}, "
            "expected strings, lists of strings "
            "or class labels."
        )
    if id_column is None:
        id_column = next((c for c in ID_COLUMNS if isinstance(pool.features.get(c), Value)), None)
    return Pool(pool, fingerprint, image_column, caption_column, id_column)


def _is_text(feature) -> bool:
    if isinstance(feature, ClassLabel):
        return True
    inner = getattr(feature, "feature", feature)
    return isinstance(inner, Value) and inner.dtype in ("string", "large_string")


def undecodable(row: int, error) -> ValueError:
    return ValueError(
        f"the image in row {row} of the pool does not decode ({type(error).__name__}: {error}). Take the row out, or "
        "pass `skip_undecodable=True` to leave such rows out and count them."
    )
