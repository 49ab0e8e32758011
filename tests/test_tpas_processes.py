"""Anchors selected by several processes together are those that one process selects."""

import importlib.util
import json
import os
import warnings

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from colour_space import ColourEncoder, make_pool
from word_space import WordEncoder, word_pool

from space_peft.anchors import anchor_info, embeddings, picking, select_anchors


# Its processes import everything anew; how embeddings are shared and merged is tested in one process always.
pytestmark = pytest.mark.slow

PROCESSES = 2


def colours(n):
    return np.random.default_rng(0).integers(0, 256, size=(n, 3)).tolist()


def indexed_pool():
    """A pool with a FAISS index of its embeddings."""
    pool = word_pool(1000).filter(lambda caption: caption is not None, input_columns="caption", keep_in_memory=True)
    vectors = WordEncoder().embed_texts(pool["caption"][:]).numpy()
    pool.add_faiss_index_from_external_arrays(vectors, "words", dtype=np.float32)
    return {"concept": "word3", "pool": pool, "encoder": WordEncoder(), "faiss_index": "words"}


def case(name, rank, folder):
    """What process `rank` of the case called `name` asks for; `rank` -1 is the one process alone."""
    shared = {"k": 25, "batch_size": 8, "progress": False, "cache_dir": folder}
    if name == "index":
        return shared | indexed_pool()
    words = {"concept": "word3", "pool": word_pool(1000), "encoder": WordEncoder(), "duplicate_threshold": None}
    images = {"concept": "red", "pool": make_pool(colours(1500)), "encoder": ColourEncoder()}
    images |= {"exclude_by_caption": False, "duplicate_threshold": 0.8, "k": 9}
    return (
        shared
        | {
            "cache": words,
            "no cache": words | {"cache_dir": False},
            # Not on a shared file system: each process finds only its own files.
            "own folders": words | {"cache_dir": folder / str(rank)},
            "thresholds": words | {"threshold": 0.2, "upper_threshold": 0.7, "diversity": 0.5, "k": 40},
            "duplicates use up the shortlist": images,
            "fewer shards than processes": words | {"pool": word_pool(20), "k": 5},
        }[name]
    )


CASES = ["cache", "no cache", "own folders", "thresholds", "duplicates use up the shortlist"]
CASES += ["fewer shards than processes"] + ["index"] * bool(importlib.util.find_spec("faiss"))


def shrink():
    embeddings.SHARD_ROWS, picking.SHORTLIST = 32, 1


def selected(settings):
    with warnings.catch_warnings(record=True):
        anchors = select_anchors(settings.pop("concept"), settings.pop("pool"), **settings)
    info = anchor_info(anchors)
    return {
        "info": info,
        "texts": getattr(settings["encoder"], "texts", 0),
        **anchors.remove_columns("image").to_dict(),
    }


def outcome(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def failing(rank, folder):
    """One process cannot embed; the other is told, and what it embedded is kept."""
    settings = case("cache", rank, folder)
    if rank == 1:
        settings["encoder"].embed_images = settings["encoder"].embed_texts = _out_of_memory
        settings["encoder"].calls = 0
    return outcome(lambda: selected(settings))


def _out_of_memory(texts):
    if texts != ["word3"]:
        raise MemoryError("no memory left")
    return WordEncoder().embed_texts(texts)


def different(rank, folder):
    return outcome(lambda: selected(case("cache", rank, folder) | {"k": 25 + rank}))


def bad_name(rank, folder):
    return outcome(lambda: selected(case("cache", rank, folder) | ({"concept": " "} if rank == 0 else {})))


def worker(rank, folder):
    shrink()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    results = {name: selected(case(name, rank, folder / name)) for name in CASES}
    results["cache again"] = selected(case("cache", rank, folder / "cache"))
    # As after a kill: what is missing was all one process' share.
    for path in sorted((folder / "cache").rglob("*.safetensors"))[:24:2]:
        torch.distributed.barrier()
        path.unlink(missing_ok=True)
    torch.distributed.barrier()
    results["resumed"] = selected(case("cache", rank, folder / "cache"))
    for function in (failing, different, bad_name):
        results[function.__name__] = function(rank, folder / function.__name__)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    # Gloo looks for an interface by the host's name, which need not resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=PROCESSES)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD_ROWS", 32)
    monkeypatch.setattr(picking, "SHORTLIST", 1)


def without_texts(result):
    return {key: value for key, value in result.items() if key != "texts"}


@pytest.mark.parametrize("name", CASES)
def test_every_process_has_what_one_alone_selects(results, name, tmp_path):
    alone = selected(case(name, -1, tmp_path))
    assert len(alone["rank"]) > 4
    for result in results[1]:
        assert without_texts(result[name]) == json.loads(json.dumps(without_texts(alone)))


def test_the_shortlist_case_does_grow(results, tmp_path, monkeypatch):
    sizes = []
    real = picking._scan_own
    monkeypatch.setattr(picking, "_scan_own", lambda *args: sizes.append(args[3]) or real(*args))
    selected(case("duplicates use up the shortlist", -1, tmp_path))
    assert len(sizes) > 1


def test_each_embeds_half(results):
    pool = word_pool(1000)
    embedded = [result["cache"]["texts"] - 1 for result in results[1]]  # one text is the concept's
    assert sum(embedded) == sum(caption is not None for caption in pool["caption"])
    assert abs(embedded[0] - embedded[1]) < 0.1 * sum(embedded)
    assert [result["cache again"]["texts"] for result in results[1]] == [1, 1]


def test_a_resumed_run_is_shared_evenly(results, tmp_path):
    alone = selected(case("cache", -1, tmp_path))
    embedded = [result["resumed"]["texts"] - 1 for result in results[1]]
    assert min(embedded) > 5 * 32 * 0.9, embedded  # of 12 missing shards, all of process 0's share
    for result in results[1]:
        assert without_texts(result["resumed"]) == json.loads(json.dumps(without_texts(alone)))


def test_an_error_in_one_reaches_all(results):
    folder, (first, second) = results
    assert second["failing"] == "MemoryError: no memory left"
    assert first["failing"].startswith("RuntimeError: process 1 failed") and "MemoryError" in first["failing"]
    assert len(list((folder / "failing").rglob("*.safetensors"))) == 16  # process 0's share of 32
    for result in (first, second):
        assert result["different"].startswith("ValueError: the processes were asked for different anchors")
        assert "'k': (25, 26)" in result["different"]
    assert first["bad_name"].startswith("ValueError: the concept's name is empty")
    assert second["bad_name"].startswith("RuntimeError: process 0 failed")
