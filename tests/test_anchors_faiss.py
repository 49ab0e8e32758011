"""A pool with a FAISS index of its embeddings gives the same anchors, without being embedded."""

import numpy as np
import pytest
from word_space import WordEncoder, word_pool

from space_peft.anchors import embeddings, select_anchors


faiss = pytest.importorskip("faiss")


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD_ROWS", 100)
    pool = word_pool(2500)
    return pool.filter(lambda caption: caption is not None, input_columns="caption")


def vectors(pool, encoder=None):
    return (encoder or WordEncoder()).embed_texts(pool["caption"][:]).numpy()


def with_index(pool, array, **settings):
    indexed = pool.select(range(len(pool)))
    indexed.add_faiss_index_from_external_arrays(array, "words", dtype=np.float32, **settings)
    return indexed


def anchors_of(pool, encoder=None, **settings):
    settings = {"k": 30, "cache_dir": False, "progress": False, "faiss_index": "words"} | settings
    return select_anchors("word1 word2", pool, encoder=encoder or WordEncoder(), **settings)


@pytest.mark.parametrize("index", ["inner product", "L2", "HNSW16"])
@pytest.mark.parametrize("limits", [{}, {"threshold": 0.1, "upper_threshold": 0.7, "diversity": 0.5}])
def test_same_anchors_as_without(pool, index, limits):
    how = {"inner product": {"metric_type": faiss.METRIC_INNER_PRODUCT}, "L2": {}, "HNSW16": {"string_factory": index}}
    indexed, encoder = with_index(pool, vectors(pool), **how[index]), WordEncoder()
    assert anchors_of(indexed, encoder, **limits).to_dict() == anchors_of(pool, faiss_index=None, **limits).to_dict()
    assert encoder.texts == 1 + 16  # the concept's, and those that check the index


def test_what_its_own_search_finds_is_the_shortlist(pool):
    from space_peft.anchors.picking import scan

    z, target = vectors(pool), WordEncoder().embed_texts(["word1 word2"])[0].numpy()
    index = faiss.IndexFlatIP(z.shape[1])
    index.add(z)
    scores, _ = index.search(target[None], 200)
    monolith = embeddings.PoolEmbeddings(len(z), 16, {i: lambda i=i: z[i * 100 : i * 100 + 100] for i in range(25)})
    np.testing.assert_allclose(scan(monolith, target, np.zeros(len(z), bool), 200).scores, scores[0], atol=1e-6)


def test_index_that_does_not_fit(pool):
    z = vectors(pool)
    with pytest.raises(ValueError, match=r"no index 'words', it has \[\].*add_faiss_index"):
        anchors_of(pool)
    with pytest.raises(ValueError, match="2 vectors of 16 dimensions; the pool has"):
        anchors_of(with_index(pool, z[:2]))
    with pytest.raises(ValueError, match="vectors of 16 dimensions; .* the encoder 8 dimensions"):
        anchors_of(with_index(pool, z), WordEncoder(dim=8))
    for other in (z * 2, z[::-1], -z):
        with pytest.raises(ValueError, match="holds other vectors than encoder 'words' gives for row 0"):
            anchors_of(with_index(pool, np.ascontiguousarray(other)))
    compressed = with_index(pool, z, string_factory="PQ2x4", train_size=2000)
    with pytest.raises(ValueError, match="not compressed"):
        anchors_of(compressed)


def test_an_index_is_not_copied_with_the_pool(pool, monkeypatch):
    indexed = with_index(pool, vectors(pool))
    monkeypatch.setattr(faiss.IndexFlat, "__deepcopy__", None, raising=False)
    monkeypatch.setattr(faiss.IndexFlat, "__getstate__", None, raising=False)
    assert len(anchors_of(indexed)) == len(anchors_of(indexed, faiss_index=None)) == 30
    assert indexed.list_indexes() == ["words"]
