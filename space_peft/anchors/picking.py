"""Which rows of a pool become anchors: the best scores in one pass over the shards, then greedy maximal marginal
relevance without near-duplicates among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..distributed.processes import gather_objects
from .embeddings import PoolEmbeddings
from .processes import fail_together


# Candidates looked at to begin with; more only where they do not suffice.
SHORTLIST = 1000
# Sums of whole numbers do not depend on their order, so any division of the shards among processes gives the same mean.
_GRID = 2.0**32


@dataclass
class Scan:
    """What one pass over a pool's embeddings finds.

    Attributes:
        rows (`np.ndarray`): `(m,)`, the candidates of the best scores, best first, ties by row.
        scores (`np.ndarray`): `(m,)` float32, theirs.
        vectors (`np.ndarray`): `(m, d)` float32, their embeddings.
        candidates (`int`): How many there are in all.
        known (`int`): How many rows have an embedding.
        excluded (`dict[str, int]`): Why the other rows are no candidates.
        lowest (`float`), highest (`float`): Of all scores.
        total (`np.ndarray`): `(d,)` int64, the sum of all embeddings, in units of 2^-32.
    """

    rows: np.ndarray
    scores: np.ndarray
    vectors: np.ndarray
    candidates: int = 0
    known: int = 0
    excluded: dict[str, int] = field(default_factory=dict)
    lowest: float = np.inf
    highest: float = -np.inf
    total: Any = 0

    @property
    def mean(self) -> np.ndarray:
        """`m`, the mean of all embeddings, `(d,)` float32."""
        return (self.total / (_GRID * max(self.known, 1))).astype(np.float32)


def dots(z: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """`z @ vector`, `(n, d)` with `(d,)`, but the same for a row whatever rows are beside it: a BLAS product may round
    it otherwise in another place, and equal rows would no longer tie."""
    return np.einsum("nd,d->n", z, vector)


def scan(
    embeddings: PoolEmbeddings,
    target: np.ndarray,
    named: np.ndarray,
    size: int,
    *,
    threshold: float | None = None,
    upper_threshold: float | None = None,
) -> Scan:
    """Scores a pool block by block, remembering only the best; the same in every process.

    Args:
        embeddings (`PoolEmbeddings`): `(n, d)` in all, rows of length 1.
        target (`np.ndarray`): `(d,)`, `e_c`.
        named (`np.ndarray`): `(n,)` bool, rows that may not be picked; read for the rows that this process holds.
        size (`int`): How many of the best to remember.
        threshold (`float`, *optional*): Lowest score accepted.
        upper_threshold (`float`, *optional*): Highest score accepted.

    Returns:
        `Scan`: Over the shards of all processes.
    """
    with fail_together():
        part = _scan_own(embeddings, target, named, size, threshold, upper_threshold)
    return _merge(part, size)


def _scan_own(embeddings, target, named, size, threshold, upper_threshold) -> Scan:
    found = Scan(np.empty(0, np.int64), np.empty(0, np.float32), np.empty((0, embeddings.dim), np.float32))
    found.total = np.zeros(embeddings.dim, dtype=np.int64)
    found.excluded = dict.fromkeys(("nothing_to_embed", "caption", "above_upper_threshold", "below_threshold"), 0)
    for rows, block in embeddings.blocks():
        scores = dots(block, target)  # (b,)
        candidate = ~np.isnan(scores)
        found.excluded["nothing_to_embed"] += int((~candidate).sum())
        if not candidate.any():
            continue
        found.known += int(candidate.sum())
        found.total += np.rint(block[candidate].sum(axis=0, dtype=np.float64) * _GRID).astype(np.int64)
        found.lowest = min(found.lowest, float(scores[candidate].min()))
        found.highest = max(found.highest, float(scores[candidate].max()))
        for reason, drop in (
            ("caption", named[rows.start : rows.stop]),
            ("above_upper_threshold", scores > (np.inf if upper_threshold is None else upper_threshold)),
            ("below_threshold", scores < (-np.inf if threshold is None else threshold)),
        ):
            found.excluded[reason] += int((candidate & drop).sum())
            candidate &= ~drop
        found.candidates += int(candidate.sum())
        # Blocks come in ascending order: a row that ties with the last of a full list is a higher one, and loses.
        better = candidate & (scores > (found.scores[-1] if len(found.rows) == size else -np.inf))
        if better.any():
            _keep_best(
                found,
                np.concatenate([found.rows, rows.start + np.flatnonzero(better)]),
                np.concatenate([found.scores, scores[better]]),
                np.concatenate([found.vectors, block[better]]),
                size,
            )
    return found


def _keep_best(found: Scan, rows: np.ndarray, scores: np.ndarray, vectors: np.ndarray, size: int) -> None:
    order = np.lexsort((rows, -scores))[:size]
    found.rows, found.scores, found.vectors = rows[order], scores[order], vectors[order]


def _merge(part: Scan, size: int) -> Scan:
    """The scan of all shards from the scans of each process' shards."""
    vectors = part.vectors
    part.vectors = np.empty((0, 0), np.float32)  # only those of the best of all travel
    parts = gather_objects(part)
    merged = Scan(
        np.concatenate([p.rows for p in parts]),
        np.concatenate([p.scores for p in parts]),
        part.vectors,
        candidates=sum(p.candidates for p in parts),
        known=sum(p.known for p in parts),
        excluded={reason: sum(p.excluded[reason] for p in parts) for reason in part.excluded},
        lowest=min(p.lowest for p in parts),
        highest=max(p.highest for p in parts),
        total=sum(p.total for p in parts),
    )
    order = np.lexsort((merged.rows, -merged.scores))[:size]
    merged.rows, merged.scores = merged.rows[order], merged.scores[order]
    own = np.isin(part.rows, merged.rows)
    pieces = gather_objects((part.rows[own], vectors[own]))
    rows, vectors = (np.concatenate(piece) for piece in zip(*pieces, strict=True))
    by_row = np.argsort(rows)
    merged.vectors = vectors[by_row[np.searchsorted(rows, merged.rows, sorter=by_row)]]
    return merged


def pick(
    embeddings: PoolEmbeddings,
    target: np.ndarray,
    named: np.ndarray,
    k: int,
    *,
    threshold: float | None = None,
    upper_threshold: float | None = None,
    diversity: float,
    duplicate_threshold: float | None,
) -> tuple[np.ndarray, np.ndarray, Scan]:
    """Picks up to `k` rows by greedy maximal marginal relevance (Carbonell and Goldstein 1998).

    Each step takes the largest `(1 - diversity) s - diversity max_chosen cos(z - m, z_chosen - m)`; among the best
    `max(1000, 20 k)` scores, and among more of them only if near-duplicates use those up.

    Args:
        embeddings, target, named, threshold, upper_threshold: As for `scan`.
        k (`int`): How many to pick.
        diversity (`float`): In [0, 1].
        duplicate_threshold (`float`, *optional*): Centred cosine above which a candidate duplicates a chosen one.

    Returns:
        `tuple[np.ndarray, np.ndarray, Scan]`: Chosen rows in the order of choice, their scores, and the last scan, whose
        `excluded` counts near-duplicates of them, too.
    """
    size = max(SHORTLIST, 20 * k)
    while True:
        found = scan(embeddings, target, named, size, threshold=threshold, upper_threshold=upper_threshold)
        chosen, duplicates = _greedy(found, k, diversity, duplicate_threshold)
        if len(chosen) == k or size >= found.candidates:
            found.excluded["near_duplicate"] = duplicates
            return found.rows[chosen], found.scores[chosen], found
        size *= 4


def _greedy(found: Scan, k: int, diversity: float, duplicate_threshold: float | None) -> tuple[list[int], int]:
    z = found.vectors - found.mean
    z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    likeness = np.zeros(len(z), dtype=np.float32)  # to the nearest chosen one; none is chosen yet
    free = np.ones(len(z), dtype=bool)
    chosen: list[int] = []
    duplicates = 0
    while len(chosen) < k and free.any():
        relevance = (1 - diversity) * found.scores - diversity * likeness
        best = int(np.argmax(np.where(free, relevance, -np.inf)))
        free[best] = False
        cosine = dots(z, z[best])  # (m,)
        likeness = np.maximum(likeness, cosine) if chosen else cosine
        chosen.append(best)
        if duplicate_threshold is not None:
            duplicate = free & (cosine > duplicate_threshold)
            duplicates += int(duplicate.sum())
            free &= ~duplicate
    return chosen, duplicates
