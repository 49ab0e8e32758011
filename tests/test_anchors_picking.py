"""Picking rows from a pool's embeddings, a shard at a time, against doing it with the whole pool at once in float64."""

from functools import partial

import numpy as np
import pytest

from space_peft.anchors import embeddings as embeddings_module
from space_peft.anchors import picking
from space_peft.anchors.embeddings import PoolEmbeddings
from space_peft.anchors.picking import pick, scan


@pytest.fixture(params=[3, 64, 1024])
def shard_rows(request, monkeypatch):
    monkeypatch.setattr(embeddings_module, "SHARD_ROWS", request.param)
    return request.param


def in_shards(z):
    size = embeddings_module.SHARD_ROWS
    blocks = {i: z[i * size : (i + 1) * size] for i in range(-(-len(z) // size))}
    return PoolEmbeddings(len(z), z.shape[1], {i: partial(np.asarray, block) for i, block in blocks.items()})


def none_named(z):
    return np.zeros(len(z), dtype=bool)


def directions(random, n, d):
    z = random.normal(size=(n, d)) + 0.5
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def whole_pool_reference(z, target, named, k, lower, upper, diversity, duplicate_threshold, shortlist):
    """The rule in float64 with a full sort: `(rows, counts of what was left out)`."""
    z = z.astype(np.float64)
    known = ~np.isnan(z[:, 0])
    scores = z @ target.astype(np.float64)
    counts = {"nothing_to_embed": int((~known).sum()), "caption": int((known & named).sum())}
    free = known & ~named
    counts["above_upper_threshold"] = int((free & (scores > upper)).sum())
    free &= ~(scores > upper)
    counts["below_threshold"] = int((free & (scores < lower)).sum())
    free &= ~(scores < lower)
    ordered = sorted(np.flatnonzero(free), key=lambda row: (-scores[row], row))
    centred = z - z[known].mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    while True:
        rows, chosen, duplicates = list(ordered[:shortlist]), [], 0
        while len(chosen) < k and rows:
            likeness = {row: max([centred[row] @ centred[other] for other in chosen], default=0.0) for row in rows}
            best = max(rows, key=lambda row: (1 - diversity) * scores[row] - diversity * likeness[row])
            rows.remove(best)
            chosen.append(best)
            if duplicate_threshold is not None:
                kept = [row for row in rows if centred[row] @ centred[best] <= duplicate_threshold]
                duplicates, rows = duplicates + len(rows) - len(kept), kept
        if len(chosen) == k or shortlist >= len(ordered):
            return chosen, {**counts, "near_duplicate": duplicates}
        shortlist *= 4


@pytest.mark.parametrize("seed", range(12))
def test_shards_give_what_a_full_sort_gives(seed, shard_rows, monkeypatch):
    random = np.random.default_rng(seed)
    n, d, k = int(random.integers(5, 300)), int(random.integers(3, 20)), int(random.integers(1, 9))
    monkeypatch.setattr(picking, "SHORTLIST", 1)  # 20 k then
    z = directions(random, n, d)
    z[random.random(n) < 0.3] = z[0]  # ties, and duplicates that use the shortlist up
    z[random.random(n) < 0.1] = np.nan
    z[-1] = directions(random, 1, d)
    named = random.random(n) < 0.2
    target = directions(random, 1, d)[0]
    limits = {"threshold": random.choice([None, 0.2]), "upper_threshold": random.choice([None, 0.8])}
    settings = {"diversity": float(random.choice([0, 0.1, 0.5])), "duplicate_threshold": random.choice([None, 0.98])}
    rows, scores, found = pick(in_shards(z), target, named, k, **limits, **settings)
    expected, counts = whole_pool_reference(
        z,
        target,
        named,
        k,
        -np.inf if limits["threshold"] is None else limits["threshold"],
        np.inf if limits["upper_threshold"] is None else limits["upper_threshold"],
        *settings.values(),
        shortlist=20 * k,
    )
    assert rows.tolist() == expected and found.excluded == counts
    np.testing.assert_allclose(scores, z[rows].astype(np.float64) @ target, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_ties_go_to_the_lower_row_wherever_it_is(seed, shard_rows):
    """Coordinates of few bits: all products are exact, so many scores are equal and their order is known."""
    random = np.random.default_rng(seed)
    z = random.integers(-2, 3, size=(500, 4)).astype(np.float32) / 4
    target = np.array([0.5, 0.5, -0.5, 0.5], dtype=np.float32)
    exact = z.astype(np.float64) @ target
    for size in (1, 10, 200, 499, 500, 900):
        found = scan(in_shards(z), target, none_named(z), size)
        assert found.rows.tolist() == sorted(range(500), key=lambda row: (-exact[row], row))[:size]
        assert (found.scores == exact[found.rows]).all() and (found.vectors == z[found.rows]).all()
        assert (found.lowest, found.highest) == (exact.min(), exact.max())


def test_mean_and_scores_do_not_depend_on_the_shards(monkeypatch):
    z = directions(np.random.default_rng(0), 1000, 17)
    z[5] = np.nan
    found = {}
    for size in (1, 7, 100, 5000):
        monkeypatch.setattr(embeddings_module, "SHARD_ROWS", size)
        found[size] = scan(in_shards(z), z[0], none_named(z), 20)
        np.testing.assert_allclose(found[size].mean, np.nanmean(z.astype(np.float64), axis=0), atol=1e-7)
        assert (found[size].rows == found[1].rows).all() and (found[size].scores == found[1].scores).all()


def test_memory_is_that_of_the_shortlist(shard_rows):
    z = directions(np.random.default_rng(0), 2000, 8)
    found = scan(in_shards(z[np.argsort(z @ z[0])]), z[0], none_named(z), 5)  # the worst order: every row is better
    assert found.vectors.shape == (5, 8) and found.vectors.base is None and found.candidates == 2000


@pytest.mark.parametrize("diversity", [0.0, 0.1, 0.5, 1.0])
def test_maximal_marginal_relevance_follows_its_formula(diversity):
    z = directions(np.random.default_rng(0), 60, 8)
    rows, _, found = pick(in_shards(z), z[7], none_named(z), 12, diversity=diversity, duplicate_threshold=None)
    expected, _ = whole_pool_reference(z, z[7], none_named(z), 12, -np.inf, np.inf, diversity, None, 1000)
    assert rows.tolist() == expected and found.excluded["near_duplicate"] == 0


def test_shortlist_grows_when_duplicates_use_it_up():
    random = np.random.default_rng(0)
    z = np.concatenate([np.tile(directions(random, 1, 8), (1500, 1)), directions(random, 20, 8)])
    rows, _, found = pick(in_shards(z), z[0], none_named(z), 5, diversity=0.0, duplicate_threshold=0.99)
    assert len(rows) == 5 and rows[0] == 0 and (rows[1:] >= 1500).all() and found.excluded["near_duplicate"] == 1499
