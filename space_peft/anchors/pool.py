"""Reading a pool of images: its checks, its captions, and its embeddings with their cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, Value
from PIL import Image
from tqdm.auto import tqdm

from .._io import atomic_path
from ..prompts import load_rgb
from .encoders import Encoder


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

    def captions(self) -> list[str | None] | None:
        """One caption a row, several of a row joined by a line break, class labels by name; `None` without captions."""
        if self.caption_column is None:
            return None
        feature = self.data.features[self.caption_column]
        values = self.data.select_columns([self.caption_column])[:][self.caption_column]
        if isinstance(feature, ClassLabel):
            return [None if value is None or value < 0 else feature.int2str(value) for value in values]
        return ["\n".join(v for v in value if v) if isinstance(value, list) else value for value in values]

    def images(self, rows: Sequence[int]) -> list[Image.Image | Exception]:
        """RGB images of some rows; where one does not decode, the exception instead of the image."""
        column = self.data.select_columns([self.image_column])
        try:
            images = column[list(rows)][self.image_column]
        except Exception:  # whatever a decoder raises: read again one by one to find the rows it happened in
            images = [self._one(column, row) for row in rows]
        return [_to_rgb(image) for image in images]

    def _one(self, column: Dataset, row: int):
        try:
            return column[int(row)][self.image_column]
        except Exception as error:  # see `images`: handed to the caller, who knows whether to skip or to raise
            return error


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
        ValueError: If it is empty, or a column is missing or of another type.
    """
    if isinstance(pool, IterableDataset):
        raise TypeError(
            "got an IterableDataset as pool; anchors are picked over the whole pool, which "
            "needs random access. Store a "
            "part of it: `Dataset.from_list(list(pool.take(10_000)), features=pool.features)`."
        )
    if isinstance(pool, DatasetDict):
        raise TypeError(
            f"got a DatasetDict as pool; pass one of its splits, e.g. `pool[{next(iter(pool), 'train')!r}]`."
        )
    if not isinstance(pool, Dataset):
        raise TypeError(f"expected the pool to be a `datasets.Dataset`, got {type(pool).__name__}.")
    if len(pool) == 0:
        raise ValueError("the pool is empty: anchors are chosen among its images, so give a dataset with rows.")
    for what, column in (("image", image_column), ("caption", caption_column), ("id", id_column)):
        if column is not None and column not in pool.column_names:
            raise ValueError(
                f"the pool has no column {column!r}, its columns are {pool.column_names}: set `{what}_column`."
            )
    fingerprint = pool._fingerprint
    pool = pool.with_format(None)
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


def embed_pool(
    pool: Pool,
    encoder: Encoder,
    *,
    batch_size: int = 32,
    cache_dir: str | os.PathLike | bool | None = None,
    skip_undecodable: bool = False,
    progress: bool = True,
) -> np.ndarray:
    """Embeds every row of a pool, or reads its embeddings from the cache.

    Args:
        pool (`Pool`): From `open_pool`.
        encoder (`Encoder`): What embeds; `encoder.reads` says whether it reads the images or the captions.
        batch_size (`int`, defaults to 32): Rows at a time.
        cache_dir (`str` or `False`, *optional*): Folder for the embeddings, by default `space_peft` in the Hugging
            Face cache; `False` for none. A file is named after the pool's and the encoder's fingerprints and
            appears only when complete.
        skip_undecodable (`bool`, defaults to `False`): Whether rows that hold no usable image become NaN instead of
            an error.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        `np.ndarray`: `(n, d)` float32, rows of length 1; NaN rows where there was nothing to embed. Mapped from the
        cache file where there is one, so that it need not fit in memory.

    Raises:
        ValueError: If an image does not decode (the row is named), or the encoder gives NaN or infinities.
    """
    path = _cache_path(pool, encoder, cache_dir)
    embeddings = None
    if path is not None and path.exists():
        embeddings = np.load(path, mmap_mode="r", allow_pickle=False)
        missing = np.flatnonzero(np.isnan(embeddings[:, 0]))
        if len(missing) and encoder.reads == "image" and not skip_undecodable:
            row = int(missing[0])
            raise undecodable(row, pool.images([row])[0])
        return embeddings
    if path is None:
        return _embed_rows(
            pool, encoder, batch_size, skip_undecodable, progress, lambda shape: np.empty(shape, np.float32)
        )
    with atomic_path(path) as temporary:
        create = lambda shape: np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)  # noqa: E731
        embeddings = _embed_rows(pool, encoder, batch_size, skip_undecodable, progress, create)
        embeddings.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _embed_rows(pool, encoder, batch_size, skip_undecodable, progress, create) -> np.ndarray:
    captions = pool.captions() if encoder.reads == "caption" else None
    embeddings = None
    starts = range(0, len(pool), batch_size)
    for start in tqdm(starts, desc=f"embedding the pool ({encoder.name})", unit="batch", disable=not progress):
        rows = np.arange(start, min(start + batch_size, len(pool)))
        if captions is None:
            values = pool.images(rows)
        else:
            values = [captions[row] or ValueError("the row has no caption") for row in rows]
        bad = np.array([isinstance(value, Exception) for value in values])
        if bad.any() and captions is None and not skip_undecodable:
            first = int(np.flatnonzero(bad)[0])
            raise undecodable(int(rows[first]), values[first])
        good = [value for value in values if not isinstance(value, Exception)]
        if not good:
            if embeddings is None:
                continue  # nothing known yet about d; filled in below
            embeddings[rows] = np.nan
            continue
        vectors = encoder.embed_images(good) if captions is None else encoder.embed_texts(good)
        vectors = _check_vectors(vectors, len(good), encoder, rows[~bad])
        if embeddings is None:
            embeddings = create((len(pool), vectors.shape[1]))
            embeddings[:start] = np.nan
        embeddings[rows[bad]] = np.nan
        embeddings[rows[~bad]] = vectors
    if embeddings is None:
        what = "images decodes" if captions is None else "captions has text"
        raise ValueError(f"none of the pool's {len(pool)} {what}: there is nothing to choose anchors from.")
    return embeddings


def _check_vectors(vectors: np.ndarray, n: int, encoder: Encoder, rows: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != n:
        raise ValueError(
            f"encoder {encoder.name!r} gave an array of shape {vectors.shape} for {n} rows, expected ({n}, d)."
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"encoder {encoder.name!r} gave NaN or infinity for pool row "
            f"{int(rows[~finite][0])} ({int((~finite).sum())} "
            "rows of its batch): load the model in float32 or bfloat16, or take the row out of the pool."
        )
    return vectors


def undecodable(row: int, error) -> ValueError:
    return ValueError(
        f"the image in row {row} of the pool does not decode ({type(error).__name__}: {error}). Take the row out, or "
        "pass `skip_undecodable=True` to leave such rows out and count them."
    )


def _cache_path(pool: Pool, encoder: Encoder, cache_dir) -> Path | None:
    if cache_dir is False:
        return None
    if cache_dir is None or cache_dir is True:
        cache_dir = Path(datasets.config.HF_CACHE_HOME).expanduser() / "space_peft"
    folder = Path(cache_dir)
    # Before hours of embedding, not after: a folder that cannot be written is an error at once.
    folder.mkdir(parents=True, exist_ok=True)
    column = pool.image_column if encoder.reads == "image" else pool.caption_column
    key = "\n".join([pool.fingerprint, str(len(pool)), encoder.reads, str(column), encoder.fingerprint])
    return folder / f"embeddings-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
