"""The same erasures, judged on pictures from another source: the stamps of Tux Paint.

    python benchmarks/other_domain.py

Anchors, retained data and settings are those of the demo, drawings alone. Erased is every concept of which the deployed
model recognises at least one stamp; judged are the stamps it recognises, those of the concept (to be forgotten) and those
of all others (to be kept). The stamps are fetched into a cache folder, see `stamps.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))


def on_white(image):
    """A stamp in the middle of a white square, as the demo images are."""
    from PIL import Image

    from space_peft.data.pictures import load_rgb

    image = load_rgb(image)
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def named_stamps(model, processor, candidates: list[tuple[str, object]]) -> list[bool]:
    """Whether the answer to the first naming question is the stamp's name."""
    from space_peft.demo import DEMO_QUESTIONS
    from space_peft.evaluation.metrics import normalize_answer
    from space_peft.modeling.prompts import generate_answers

    questions = [DEMO_QUESTIONS.naming[0]] * len(candidates)
    answers = generate_answers(model, processor, questions, images=[image for _, image in candidates])
    return [normalize_answer(a) == normalize_answer(name) for a, (name, _) in zip(answers, candidates, strict=True)]


def candidates() -> list[tuple[str, object]]:
    """Stamps whose caption mentions exactly one of the demo's names, with that name."""
    from stamps import stamps

    from space_peft.data.names import mentions
    from space_peft.demo import demo_concepts

    names, pool, found = demo_concepts(), stamps(), []
    for row, caption in enumerate(pool["caption"]):
        mentioned = [name for name in names if mentions(caption, [name], names)]
        if len(mentioned) == 1:
            found.append((mentioned[0], row))
    return [(name, on_white(pool[row]["image"])) for name, row in found]


def known_stamps() -> tuple[list[tuple[str, object]], int]:
    """The stamps that the deployed model recognises, and how many it was asked about."""
    from space_peft.demo import load_demo_model

    asked = candidates()
    known = named_stamps(*load_demo_model(), asked)
    return [stamp for stamp, ok in zip(asked, known, strict=True) if ok], len(asked)


def run(task: tuple[str, int]) -> dict:
    """One erasure with default settings."""
    concept, seed = task
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    from space_peft.demo import load_demo_model
    from space_peft.demo.pipeline import erase_demo

    stamps, _ = known_stamps()
    with tempfile.TemporaryDirectory() as folder:
        result = erase_demo(concept, folder, seed=seed, progress=False)
    named = named_stamps(result.trainer.model, load_demo_model()[1], stamps)
    target = [ok for ok, (name, _) in zip(named, stamps, strict=True) if name == concept]
    others = [ok for ok, (name, _) in zip(named, stamps, strict=True) if name != concept]
    scores = {
        key: result.report.after[key]["value"] for key in ("forget", "generality", "retain", "retain_unseen_style")
    }
    return {
        "concept": concept, "seed": seed, "stamps_named": sum(target), "stamps": len(target), "others_named": sum(others),
        "others": len(others), **scores,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "other_domain.json"))
    args = parser.parse_args()
    from tqdm import tqdm

    from space_peft.records.io import write_json

    stamps, asked = known_stamps()
    tasks = [(concept, seed) for seed in range(args.seeds) for concept in sorted({name for name, _ in stamps})]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.workers) as executor:
        rows = list(tqdm(executor.map(run, tasks), total=len(tasks), desc="erasures"))
    total = {key: sum(row[key] for row in rows) for key in ("stamps_named", "stamps", "others_named", "others")}
    write_json(
        args.output,
        {
            "command": "python benchmarks/other_domain.py",
            "asked": asked,
            "recognised": len(stamps),
            **total,
            "rows": rows,
        },
    )
    print(json.dumps(total))
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
