"""An erasure on a card, at the sizes that people use: one command for whoever has one.

    python benchmarks/gpu.py                       # 7B and 3B, in bfloat16 and in 4 bits
    python benchmarks/gpu.py --shapes 3B --bits 16
    python benchmarks/gpu.py --smoke               # tiny, on a CPU, everything once, no result file
    python benchmarks/gpu.py --table               # the table of docs/costs.md from the results

Models are LLaVAs with language models of the shapes of Qwen2.5 and random weights: what they say is nonsense, what they
cost is what a trained one costs. Where the card has no room, a smaller setting is taken and the result says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from gpu_parts import pool  # noqa: E402
from gpu_parts.shapes import SHAPES, Setting, build, settings_for  # noqa: E402
from gpu_parts.table import table  # noqa: E402
from gpu_parts.work import Measured, Sizes  # noqa: E402

from space_peft.records.io import write_json  # noqa: E402
from space_peft.records.versions import versions  # noqa: E402


PIECES = ("steps", "kernels", "fitting", "asking", "refinement", "erasure")
RESULTS = Path(__file__).parent / "results" / "gpu.json"


def machine(device: str) -> dict:
    card = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        card = {"card": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1),
                "cards": torch.cuda.device_count()}  # fmt: skip
    return {**card, **versions("torch", "transformers", "peft", "accelerate", "bitsandbytes")}


def measure(setting: Setting, sizes: Sizes, device: str, dtype: torch.dtype, pieces) -> dict:
    """One shape; raises `torch.OutOfMemoryError` where it does not fit after all."""
    print("--", setting, flush=True)
    model, processor = build(setting, device, dtype)
    measured = Measured(model, processor, setting, SHAPES[setting.shape].image, sizes, device)
    for piece in pieces:
        getattr(measured, piece)()
    return {"setting": setting.to_dict(), **measured.results}


def first_that_fits(wanted: str, bits: int, smoke: bool, device: str, dtype: torch.dtype, pieces) -> dict:
    """Measures the setting most like the one wanted that the card has room for."""
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    for setting in settings_for(wanted, bits, memory, Sizes(smoke).rows):
        try:
            return measure(setting, Sizes(smoke), device, dtype, pieces)
        except torch.OutOfMemoryError as error:
            print(f"no room: {str(error)[:200]}", flush=True)
        # Not inside `except`: the error's frames would keep the model.
        gc.collect()
        torch.cuda.empty_cache()
    return {"setting": {"wanted": wanted, "bits": bits, "said": "this card has room for none of the shapes"}}


def on_two(shape: str, bits: int) -> dict | None:
    """The steps again in two processes, a card each; `None` where there is one card only."""
    if torch.cuda.device_count() < 2:
        return None
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run(
        [*command, "--child", "--shapes", shape, "--bits", str(bits)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(shape: str, bits: int, smoke: bool, device: str, dtype: torch.dtype) -> None:
    """What each of two processes does."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    result = first_that_fits(shape, bits, smoke, device, dtype, ["steps"])
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result), flush=True)


def has_bitsandbytes() -> bool:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7B", "3B"])
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 4), default=[16, 4])
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES), help="these pieces alone")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU, everything once: does it run?")
    parser.add_argument("--table", action="store_true", help="print the table of results that are there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # one of two processes
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.output.read_text(encoding="utf-8"))))
        return 0
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    dtype = torch.bfloat16
    if args.child:
        child(args.shapes[0], args.bits[0], args.smoke, device, dtype)
        return 0
    if device == "cpu" and not args.smoke:
        raise SystemExit("no CUDA device is here; --smoke runs everything once on tiny shapes.")
    if args.smoke:
        args.shapes, args.bits = ["tiny"], [16]
    elif 4 in args.bits and not has_bitsandbytes():
        print("bitsandbytes is not installed: 4 bits are left out", flush=True)
        args.bits = [bits for bits in args.bits if bits != 4]
    start = time.perf_counter()
    content: dict = {"command": "python " + " ".join(sys.argv), "machine": machine(device), "runs": []}
    for shape in args.shapes:
        for bits in args.bits:
            run = first_that_fits(shape, bits, args.smoke, device, dtype, args.only)
            if not args.smoke and "steps" in args.only and (both := on_two(shape, bits)) is not None:
                run["two_processes"] = both
            content["runs"].append(run)
            if not args.smoke:
                write_json(args.output, content)  # after every shape: an interrupted run keeps what it has
    sizes = Sizes(args.smoke)
    content["tpas"] = pool.measure(sizes.pool, sizes.dim, sizes.anchors, device)
    if not args.smoke:
        write_json(args.output, content)
    print(table(content))
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
