"""TPAS over a large pool of given embeddings."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from tpas import WaveEncoder, load_pool, make_pool

from space_peft import select_anchors

from .clocks import timed


def measure(rows: int, dim: int, k: int, device: str) -> dict:
    """`select_anchors` with its embeddings in files, and the scores alone as one product on the device.

    Args:
        rows (`int`): Of the pool.
        dim (`int`): Length of an embedding.
        k (`int`): Anchors.
        device (`str`): "cuda" or "cpu".
    """
    with tempfile.TemporaryDirectory() as name:
        make_pool(Path(name), rows)
        pool, encoder = load_pool(Path(name)), WaveEncoder(dim)
        options = {"encoder": encoder, "k": k, "batch_size": 4096, "cache_dir": name, "progress": False}
        _, first = timed(lambda: select_anchors("picture 12", pool, **options), device)
        anchors, again = timed(lambda: select_anchors("picture 12", pool, **options), device)
        numbers = [f"picture {i}" for i in range(rows)]
        parts = [encoder.embed_texts(numbers[i : i + 65536]) for i in range(0, rows, 65536)]
    z = torch.from_numpy(np.concatenate(parts)).to(device)
    target = torch.from_numpy(encoder.embed_texts(["picture 12"])[0]).to(device)
    shortlist = min(max(1000, 20 * k), rows)
    (z @ target).topk(shortlist)  # warm
    best, scored = timed(lambda: (z @ target).topk(shortlist).indices.tolist(), device)
    # Row 12 is named, and left out by its caption; all others that were picked are among the best scores.
    if not set(anchors["pool_row"]) <= set(best):
        raise SystemExit("the device's scores find another shortlist than `select_anchors`")
    return {
        "rows": rows, "dim": dim, "k": k, "with_embedding": first, "from_files": again, "scores_on_device": scored,
    }  # fmt: skip
