"""Which of the candidates become anchors: greedy maximal marginal relevance without near-duplicates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


# Candidates looked at to begin with; more only where they do not suffice.
SHORTLIST = 1000
_BLOCK = 65536


def blockwise(embeddings: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`function` of every row, a block of rows at a time: a mapped file of millions of rows need not fit in memory."""
    starts = range(0, len(embeddings), _BLOCK)
    return np.concatenate([function(np.asarray(embeddings[start : start + _BLOCK])) for start in starts])


def pool_mean(embeddings: np.ndarray) -> np.ndarray:
    """Mean of the rows that are not NaN, `(d,)`."""
    total, count = np.zeros(embeddings.shape[1]), 0
    for start in range(0, len(embeddings), _BLOCK):
        block = np.asarray(embeddings[start : start + _BLOCK], dtype=np.float64)
        known = ~np.isnan(block[:, 0])
        total += block[known].sum(axis=0)
        count += int(known.sum())
    return (total / max(count, 1)).astype(np.float32)


def pick(
    embeddings: np.ndarray,
    scores: np.ndarray,
    candidates: np.ndarray,
    k: int,
    *,
    diversity: float,
    duplicate_threshold: float | None,
) -> tuple[np.ndarray, int]:
    """Picks up to `k` candidates by greedy maximal marginal relevance (Carbonell and Goldstein 1998).

    Each step takes the largest `(1 - diversity) s - diversity max_chosen cos(z - m, z_chosen - m)`; among the best
    `max(1000, 20 k)` scores, and among more of them only if near-duplicates use those up.

    Args:
        embeddings (`np.ndarray`): `(n, d)`, rows of length 1.
        scores (`np.ndarray`): `(n,)` cosines with the concept.
        candidates (`np.ndarray`): Rows that may be picked.
        k (`int`): How many to pick.
        diversity (`float`): In [0, 1].
        duplicate_threshold (`float`, *optional*): Centred cosine above which a candidate duplicates a chosen one.

    Returns:
        `tuple[np.ndarray, int]`: Chosen rows in the order of choice, and how many candidates were dropped as
        near-duplicates of them.
    """
    # Stable, so that ties go to the lower row.
    ordered = candidates[np.argsort(-scores[candidates], kind="stable")]
    mean = pool_mean(embeddings)
    size = max(SHORTLIST, 20 * k)
    while True:
        chosen, duplicates = _greedy(embeddings, scores, ordered[:size], mean, k, diversity, duplicate_threshold)
        if len(chosen) == k or size >= len(ordered):
            return chosen, duplicates
        size *= 4


def _greedy(embeddings, scores, rows, mean, k, diversity, duplicate_threshold) -> tuple[np.ndarray, int]:
    order = np.argsort(rows)  # a mapped file is read forwards
    z = np.empty((len(rows), embeddings.shape[1]), dtype=np.float32)
    z[order] = embeddings[rows[order]]
    z -= mean
    z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    likeness = np.zeros(len(rows), dtype=np.float32)  # to the nearest chosen one; none is chosen yet
    free = np.ones(len(rows), dtype=bool)
    chosen, duplicates = [], 0
    while len(chosen) < k and free.any():
        relevance = (1 - diversity) * scores[rows] - diversity * likeness
        best = int(np.argmax(np.where(free, relevance, -np.inf)))
        free[best] = False
        cosine = z @ z[best]  # (n,)
        likeness = np.maximum(likeness, cosine) if chosen else cosine
        chosen.append(best)
        if duplicate_threshold is not None:
            duplicate = free & (cosine > duplicate_threshold)
            duplicates += int(duplicate.sum())
            free &= ~duplicate
    return rows[chosen], duplicates
