"""What the constraint costs: steps, memory, statistics, decomposition, and how each grows. Ratios, measured in turns.

    python benchmarks/engine.py              # everything, about 20 minutes on one core
    python benchmarks/engine.py --smoke      # every measurement once on tiny sizes, for CI
    python benchmarks/engine.py --only fit   # one part, merged into the results

The two sides of a ratio alternate in one process (memory: in a process each), with one thread unless OMP_NUM_THREADS
says otherwise, and the median of at least five ratios is kept. On a machine with a GPU add `--device cuda`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from engine_parts import decomposition, fitting, growth, steps  # noqa: E402

from space_peft.records.io import write_json  # noqa: E402
from space_peft.records.versions import versions  # noqa: E402


PARTS = {"decomposition": decomposition, "fit": fitting, "steps": steps, "growth": growth}


def machine(device: str) -> dict:
    import torch

    used = versions("torch", "transformers", "peft", "accelerate")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    threads = torch.get_num_threads()
    return {"platform": platform.platform(), "cores": os.cpu_count(), "threads": threads, "gpu": gpu, **used}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat: does it run?")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="run these parts and keep the others' results")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "engine.json"))
    parser.add_argument("--plot", default=str(Path(__file__).parents[1] / "docs" / "images" / "engine_costs.png"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # a child of `steps`: one trainer, its peak memory
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(steps.peak_memory(args.memory_of, args.smoke, args.device)))
        return 0

    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(output.read_text()) if output.exists() else {}
    content.update(command="python " + " ".join(sys.argv), machine=machine(args.device))
    for name in args.only or PARTS:
        print(f"-- {name}", flush=True)
        content.update(PARTS[name].measure(args.smoke, args.device))
        write_json(output, content)  # after every part: an interrupted benchmark keeps what it has
    if "growth" in content:
        growth.draw(content["growth"], tempfile.mktemp(suffix=".png") if args.smoke else args.plot)
    keys = ("step_ratio", "step_ratio_vs_stock_lora", "memory_ratio", "fit_ratio", "fit_vs_eva", "fit_vs_corda")
    for key in keys:
        print(f"{key:26s} {content.get(key)}")
    for row in content.get("decomposition", []):
        print(row)
    return 0


def child(arguments: list[str]) -> dict:
    """Runs this script in a fresh process and reads the JSON it prints last."""
    command = [sys.executable, __file__, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
