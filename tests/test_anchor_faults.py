"""Embedding a pool into the cache: killed, truncated, damaged, it ends with what an undisturbed run gives."""

import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
from word_space import WordEncoder, word_pool

from space_peft.anchors import embeddings as embeddings_module
from space_peft.anchors import select_anchors
from space_peft.anchors.embeddings import embed_pool
from space_peft.anchors.pool import open_pool


ROWS, SHARD_ROWS, BATCH = 2030, 32, 8  # 64 shards, the last one shorter
PROCESSES = multiprocessing.get_context("forkserver")
# Imported once: a child then starts in milliseconds, and its time goes to what is tested.
PROCESSES.set_forkserver_preload(["space_peft.anchors.embeddings", "word_space"])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(embeddings_module, "SHARD_ROWS", SHARD_ROWS)


@pytest.fixture(scope="module")
def pool():
    return word_pool(ROWS)


def embed(pool, folder, encoder):
    settings = {"batch_size": BATCH, "cache_dir": folder, "progress": False}
    return embed_pool(open_pool(pool), encoder, encoder.dim, **settings)


def as_array(embeddings):
    return np.concatenate([block for _, block in embeddings.blocks()])


@pytest.fixture(scope="module")
def undisturbed(pool):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings_module, "SHARD_ROWS", SHARD_ROWS)
        return as_array(embed(pool, False, WordEncoder()))


def shards_in(folder):
    return sorted(folder.rglob("*.safetensors"))


def kill_in_write(moment, countdown):
    """Makes this process kill itself in the given moment of writing its shard number `countdown`."""

    def now():
        nonlocal countdown
        countdown -= 1
        return countdown == 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    real_save, real_replace = embeddings_module.save_file, os.replace

    def save_half(tensors, path, metadata):
        real_save(tensors, path, metadata)
        if now():
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def replace(source, target):
        if moment == "before the rename" and now():
            die()
        real_replace(source, target)
        if moment == "after the rename" and now():
            die()

    if moment == "half written":
        embeddings_module.save_file = save_half
    else:
        os.replace = replace


class KilledEncoder(WordEncoder):
    """Some seconds after a given batch the process is killed, wherever it is then. Counted in batches, because a busy
    machine may not come to its first one in any fixed time."""

    def __init__(self, batches, delay):
        super().__init__(seconds=0.004)
        self.batches, self.delay = batches, delay

    def embed_texts(self, texts):
        if self.batches == 0:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        self.batches -= 1
        return super().embed_texts(texts)


def child(pool, folder, after, moment, countdown):
    embeddings_module.SHARD_ROWS = SHARD_ROWS
    if moment is not None:
        kill_in_write(moment, countdown)
    embed(pool, folder, WordEncoder() if after is None else KilledEncoder(*after))


def run_and_kill(pool, folder, *, after=None, moment=None, countdown=0):
    """One run that is killed `after` some batches and seconds, or in a `moment` of a write."""
    process = PROCESSES.Process(target=child, args=(pool, folder, after, moment, countdown))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def check_resumes(pool, folder, undisturbed, kills):
    """`kills` one after the other, then a run that is left alone."""
    finished = [0]
    for kill in kills:
        run_and_kill(pool, folder, **kill)
        finished.append(len(shards_in(folder)))
    # No run threw away what another had finished, and none of them came to the end.
    assert finished == sorted(finished) and 0 < finished[-1] < 64
    encoder = WordEncoder()
    np.testing.assert_array_equal(as_array(embed(pool, folder, encoder)), undisturbed)
    # Only the shards that were missing were embedded.
    assert 0 < encoder.texts <= (64 - finished[-1]) * SHARD_ROWS


def test_killed_in_every_phase_of_a_write(pool, tmp_path, undisturbed):
    moments = ("half written", "before the rename", "after the rename")
    check_resumes(pool, tmp_path, undisturbed, [{"moment": m, "countdown": 3} for m in moments])
    # What is left of the killed writes is removed once it is surely nobody's.
    leftovers = list(tmp_path.rglob(".*.tmp"))
    assert len(leftovers) == 2
    os.utime(leftovers[0], times=(time.time() - 4000,) * 2)
    embed(pool, tmp_path, WordEncoder())
    assert list(tmp_path.rglob(".*.tmp")) == leftovers[1:]


def test_killed_at_20_random_moments(pool, tmp_path, undisturbed):
    random = np.random.default_rng(1)
    check_resumes(
        pool,
        tmp_path,
        undisturbed,
        [{"after": (int(random.integers(12)), random.uniform(0.0, 0.016))} for _ in range(20)],
    )


def test_truncated_shards_are_embedded_again(pool, tmp_path, undisturbed):
    embed(pool, tmp_path, WordEncoder())
    path = shards_in(tmp_path)[5]
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for length in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1, *random.integers(len(whole), size=5)):
        path.write_bytes(whole[:length])
        encoder = WordEncoder()
        with pytest.warns(UserWarning, match="000005.safetensors is damaged"):
            again = embed(pool, tmp_path, encoder)
        assert 0 < encoder.texts <= SHARD_ROWS and path.read_bytes() == whole
        np.testing.assert_array_equal(as_array(again), undisturbed)


def test_a_flipped_bit_anywhere_is_seen(pool, tmp_path, undisturbed):
    embed(pool, tmp_path, WordEncoder())
    path = shards_in(tmp_path)[63]
    whole = bytearray(path.read_bytes())
    random = np.random.default_rng(0)
    # Every byte of the header (its first 8 give its length), and some of the data.
    header = 8 + int.from_bytes(whole[:8], "little")
    opened = open_pool(pool)
    content = opened.content(range(63 * SHARD_ROWS, ROWS), opened.caption_column)
    file = embeddings_module._ShardFile(path, ROWS - 63 * SHARD_ROWS, 16, content)
    assert file.read() is not None and not file.outdated()
    for position in (*range(header), *random.integers(header, len(whole), size=40)):
        damaged = whole.copy()
        damaged[position] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        assert file.read() is None, position
    with pytest.warns(UserWarning, match="000063.safetensors is damaged"):
        np.testing.assert_array_equal(as_array(embed(pool, tmp_path, WordEncoder())), undisturbed)


def test_shards_damaged_while_in_use_are_not_read(pool, tmp_path):
    embeddings = embed(pool, tmp_path, WordEncoder())
    shards_in(tmp_path)[1].unlink()
    blocks = embeddings.blocks()
    next(blocks)
    with pytest.raises(RuntimeError, match="000001.safetensors was removed or damaged"):
        next(blocks)


def test_what_was_embedded_before_an_error_is_kept(pool, tmp_path, undisturbed):
    class Failing(WordEncoder):
        def embed_texts(self, texts):
            if self.texts > 500:
                raise RuntimeError("out of memory")
            return super().embed_texts(texts)

    failing = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        embed(pool, tmp_path, failing)
    finished = len(shards_in(tmp_path))
    whole_shards = np.cumsum([caption is not None for caption in pool["caption"]])[SHARD_ROWS - 1 :: SHARD_ROWS]
    assert finished == (whole_shards <= failing.texts).sum() > 10 and not list(tmp_path.rglob(".*.tmp"))
    encoder = WordEncoder()
    np.testing.assert_array_equal(as_array(embed(pool, tmp_path, encoder)), undisturbed)
    assert encoder.texts <= (64 - finished) * SHARD_ROWS


def test_a_damaged_cache_does_not_change_the_anchors(pool, tmp_path):
    settings = {"encoder": WordEncoder(), "k": 20, "batch_size": BATCH, "cache_dir": tmp_path, "progress": False}
    before = select_anchors("word1 word2", pool, **settings)
    for path in shards_in(tmp_path)[::7]:
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.warns(UserWarning, match="is damaged"):
        after = select_anchors("word1 word2", pool, **settings)
    assert after.to_dict() == before.to_dict()
