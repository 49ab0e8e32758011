"""Embeddings of a pool, made, stored and read a shard at a time: memory stays bounded, and a killed run goes on where
it was.

`Dataset.map` with a cache file would do for a run that is never interrupted: it keeps nothing of an unfinished file,
and does not notice a damaged one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..data.pictures import RECIPE
from ..distributed.processes import gather_objects, rank_and_size
from ..records.io import atomic_path
from ..records.stages import bar
from .encoders import Encoder
from .pool import Pool, undecodable
from .processes import fail_together


# What a killed run loses at most, and what is in memory at a time. It does not depend on the number of processes, so
# that they can all use the same cache.
SHARD_ROWS = 1024
# Nobody takes so long to write a shard: an older temporary file is what a killed run left.
_ABANDONED_AFTER = 3600.0  # seconds


@dataclass(frozen=True)
class PoolEmbeddings:
    """The embeddings of a pool that this process looks after, on disk or in memory.

    Attributes:
        rows (`int`): Of the whole pool.
        dim (`int`): `d`.
        shards (`dict[int, Callable[[], np.ndarray]]`): By number, what reads it: `(b, d)` float32. Shard `i` begins at
            row `i * SHARD_ROWS`.
    """

    rows: int
    dim: int
    shards: dict[int, Callable[[], np.ndarray]]

    def row_ranges(self) -> list[range]:
        """Which rows of the pool these are, a range for each shard, ascending."""
        return [_rows_of(number, self.rows) for number in sorted(self.shards)]

    def blocks(self) -> Iterator[tuple[range, np.ndarray]]:
        """The shards in ascending order, as rows of the pool and their embeddings `(b, d)` float32; NaN rows where
        there was nothing to embed.

        Raises:
            RuntimeError: If a file was damaged or removed since the pool was embedded.
        """
        for number in sorted(self.shards):
            yield _rows_of(number, self.rows), self.shards[number]()


def embed_pool(
    pool: Pool,
    encoder: Encoder,
    dim: int,
    *,
    batch_size: int = 32,
    cache_dir: str | os.PathLike | bool | None = None,
    skip_undecodable: bool = False,
    progress: bool = True,
) -> PoolEmbeddings:
    """Embeds what the cache does not hold of a pool; each of several processes its share.

    Args:
        pool (`Pool`): From `open_pool`.
        encoder (`Encoder`): What embeds; `encoder.reads` says whether it reads the images or the captions.
        dim (`int`): `d`, as it is of the encoder's texts.
        batch_size (`int`, defaults to 32): Rows at a time.
        cache_dir (`str` or `False`, *optional*): Folder for the embeddings, by default `space_peft` in the Hugging
            Face cache; `False` keeps them in memory. The pool's folder in it is named after the pool's and the
            encoder's fingerprints and holds a file for every shard, which appears only when complete and is used as long
            as the images (or captions) are the same: their bytes are read and compared, because a pool of paths has the
            same fingerprint whatever the files hold. Reading takes about a second for a gigabyte.
        skip_undecodable (`bool`, defaults to `False`): Whether rows that hold no usable image become NaN instead of
            an error.
        progress (`bool`, defaults to `True`): Whether to show a progress bar (in the first process).

    Returns:
        `PoolEmbeddings`: All shards; with several processes those that this one found or made.

    Raises:
        ValueError: If an image does not decode (the row is named), or the encoder gives NaN, infinities or vectors of
            another length.
    """
    rank, processes = rank_and_size()
    shards: dict[int, Callable[[], np.ndarray]] = {}
    missing = []

    column = pool.image_column if encoder.reads == "image" else pool.caption_column
    if column is None:
        raise ValueError(f"encoder {encoder.name!r} reads captions, and the pool has none.")
    contents: dict[int, str] = {}

    def file_of(folder: Path, number: int) -> _ShardFile:
        rows = _rows_of(number, len(pool))
        if number not in contents:
            contents[number] = pool.content(rows, column)
        return _ShardFile(folder / f"{number:06d}.safetensors", len(rows), dim, contents[number])

    def usable(file: _ShardFile) -> bool:
        block = file.read()
        if block is None and file.path.exists() and not file.outdated():
            warnings.warn(f"{file.path} is damaged: its rows are embedded again.", stacklevel=3)
        # Rows that an earlier call was allowed to skip are tried again by one that is not: it has to raise.
        may_skip = encoder.reads == "caption" or skip_undecodable
        return block is not None and (may_skip or not np.isnan(block[:, 0]).any())

    with fail_together():
        folder = _cache_folder(pool, encoder, cache_dir, column)
        for number in range(-(-len(pool) // SHARD_ROWS))[rank::processes]:
            if folder is not None and usable(file_of(folder, number)):
                shards[number] = file_of(folder, number)
            else:
                missing.append(number)
    # Dealt out anew: what a killed run had finished may have been one process' share.
    mine = sorted(number for part in gather_objects(missing) for number in part)[rank::processes]
    shown = bar(
        "Embedding the pool",
        sum(len(_rows_of(number, len(pool))) for number in mine),
        unit="row",
        show=progress and rank == 0 and bool(mine),
        leave=True,
    )
    # A process that fails tells the others when their shares are done: nothing of what they embed is lost.
    with fail_together(), shown:
        for number in mine:
            rows = _rows_of(number, len(pool))
            # By the bytes before they are embedded: what is changed meanwhile is noticed the next time.
            file = None if folder is None else file_of(folder, number)
            block = np.empty((len(rows), dim), dtype=np.float32)
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                block[start : start + len(batch)] = embed_rows(pool, encoder, batch, dim, skip_undecodable)
                shown.update(len(batch))
            if file is None:
                shards[number] = partial(np.asarray, block)
            else:
                shards[number] = file
                file.write(block)
    return PoolEmbeddings(len(pool), dim, shards)


def indexed_embeddings(data: Dataset, name: str, pool: Pool, encoder: Encoder, dim: int) -> PoolEmbeddings:
    """The embeddings that a FAISS index of the dataset holds; nothing but a few rows is embedded, to check them.

    They are read from the index and scored like any others, instead of being searched: a search gives the same best
    rows, but neither the mean of the pool nor the counts of what a threshold leaves out.

    Args:
        data (`datasets.Dataset`): The pool as given, with its index.
        name (`str`): Of the index.
        pool (`Pool`): The same, opened.
        encoder (`Encoder`): With which the index was made.
        dim (`int`): `d`.

    Raises:
        ValueError: If there is no such index, it does not hold its vectors as they are, or they are not this encoder's.
    """
    if name not in data.list_indexes():
        raise ValueError(
            f"the pool has no index {name!r}, it has {data.list_indexes()}: add one with `pool.add_faiss_index(...)`, "
            "or leave `faiss_index` out."
        )
    index = getattr(data.get_index(name), "faiss_index", None)
    if index is None or (index.ntotal, index.d) != (len(pool), dim):
        shape = "no FAISS vectors" if index is None else f"{index.ntotal} vectors of {index.d} dimensions"
        raise ValueError(f"index {name!r} has {shape}; the pool has {len(pool)} rows, the encoder {dim} dimensions.")
    rows = np.unique(np.linspace(0, len(pool) - 1, 16).astype(int))
    own = embed_rows(pool, encoder, rows, dim, skip_undecodable=True)
    kept = np.stack([index.reconstruct_n(int(row), 1)[0] for row in rows])
    known = ~np.isnan(own[:, 0])
    # Wide enough for another batch size or bfloat16, far below the distance of two images.
    different = np.linalg.norm(kept - own, axis=1)[known] > 0.05
    if different.any():
        raise ValueError(
            f"index {name!r} holds other vectors than encoder {encoder.name!r} gives for row "
            f"{int(rows[known][different][0])}: make it with this encoder (vectors of length 1, not compressed), or leave "
            "`faiss_index` out."
        )
    rank, processes = rank_and_size()
    numbers = range(-(-len(pool) // SHARD_ROWS))[rank::processes]
    ranges = {number: _rows_of(number, len(pool)) for number in numbers}
    return PoolEmbeddings(
        len(pool), dim, {number: partial(index.reconstruct_n, r.start, len(r)) for number, r in ranges.items()}
    )


def embed_rows(pool: Pool, encoder: Encoder, rows: Sequence[int], dim: int, skip_undecodable: bool) -> np.ndarray:
    """Embeds some rows of a pool in one batch: `(len(rows), d)` float32, NaN where there is nothing to embed.

    Raises:
        ValueError: As `embed_pool`.
    """
    reads_images = encoder.reads == "image"
    values: list[Any]  # Each a picture, or a text, or the exception instead.
    if reads_images:
        values = pool.images(rows)
    else:
        values = [caption or ValueError("the row has no caption") for caption in pool.captions(rows)]
    bad = np.array([isinstance(value, Exception) for value in values])
    if bad.any() and reads_images and not skip_undecodable:
        first = int(np.flatnonzero(bad)[0])
        raise undecodable(int(rows[first]), values[first])
    embeddings = np.full((len(rows), dim), np.nan, dtype=np.float32)
    if not bad.all():
        good: list[Any] = [value for value in values if not isinstance(value, Exception)]
        vectors = encoder.embed_images(good) if reads_images else encoder.embed_texts(good)
        embeddings[~bad] = _check_vectors(vectors, dim, encoder, np.asarray(rows)[~bad])
    return embeddings


def _check_vectors(vectors, dim: int, encoder: Encoder, rows: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.shape != (len(rows), dim):
        raise ValueError(
            f"encoder {encoder.name!r} gave an array of shape {vectors.shape} for {len(rows)} rows, expected "
            f"({len(rows)}, {dim}), as long as its embedding of the concept's name."
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"encoder {encoder.name!r} gave NaN or infinity for pool row {int(rows[~finite][0])} "
            f"({int((~finite).sum())} rows of its batch): load the model in float32 or bfloat16, or take the row out of "
            "the pool."
        )
    return vectors


def _rows_of(number: int, rows: int) -> range:
    return range(number * SHARD_ROWS, min((number + 1) * SHARD_ROWS, rows))


@dataclass(frozen=True)
class _ShardFile:
    path: Path
    rows: int
    dim: int
    content: str  # the digest of what was embedded

    def write(self, block: np.ndarray) -> None:
        with atomic_path(self.path) as temporary:
            # One key: of several, safetensors would write any first.
            save_file(
                {"embeddings": block}, temporary, metadata={"crc32 content": f"{zlib.crc32(block)} {self.content}"}
            )

    def read(self) -> np.ndarray | None:
        """The shard, or `None` if there is none, it is not as it was written, or of another content."""
        try:
            with safe_open(self.path, "numpy") as file:
                noted = (file.metadata() or {}).get("crc32 content")
                block = file.get_tensor("embeddings")
        except (OSError, SafetensorError):
            return None
        whole = block.shape == (self.rows, self.dim) and block.dtype == np.float32
        return block if whole and noted == f"{zlib.crc32(block)} {self.content}" else None

    def outdated(self) -> bool:
        """Whether the file is whole, but of another content, or of a version that did not note it."""
        with contextlib.suppress(OSError, SafetensorError), safe_open(self.path, "numpy") as file:
            metadata = file.metadata() or {}
            return "crc32" in metadata or metadata.get("crc32 content", self.content).rpartition(" ")[2] != self.content
        return False

    def __call__(self) -> np.ndarray:
        block = self.read()
        if block is None:
            raise RuntimeError(f"{self.path} was removed or damaged while it was in use: call again to rebuild it.")
        return block


def _cache_folder(pool: Pool, encoder: Encoder, cache_dir, column: str) -> Path | None:
    if cache_dir is False:
        return None
    if cache_dir is None or cache_dir is True:
        cache_dir = Path(datasets.config.HF_CACHE_HOME).expanduser() / "space_peft"
    key = "\n".join(
        [pool.fingerprint, str(len(pool)), str(SHARD_ROWS), encoder.reads, str(column), encoder.fingerprint, RECIPE]
    )
    folder = Path(cache_dir) / f"embeddings-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    # Before hours of embedding, not after: a folder that cannot be written is an error at once.
    folder.mkdir(parents=True, exist_ok=True)
    for temporary in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process may have finished or removed it
            if time.time() - temporary.stat().st_mtime > _ABANDONED_AFTER:
                temporary.unlink()
    return folder
