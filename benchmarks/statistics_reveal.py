"""What published statistics reveal: how well can an image or a text that was among the retained rows be told from a fresh one?

    python benchmarks/statistics_reveal.py            # embedded model, statistics of 20, 100 and 300 rows
    python benchmarks/statistics_reveal.py --smoke

Whoever holds a candidate puts it through the public base model and looks how well its inputs fit the published second
moments: for each layer, the mean of `h^T C^-1 h` over the candidate's tokens, from the eigenpairs and the rest that are stored.
Members fit better. Reported is the area under the ROC curve (0.5: chance), of the best single layer chosen on half of the
candidates and scored on the other half, for images and for texts. Members and fresh candidates are drawn alike.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import sys
from pathlib import Path

from erase_demo import machine

from space_peft.records.io import write_json


def misfits(model, processor, rows: list[dict], statistics) -> dict[str, list[float]]:
    """By layer, of each row: the mean over its tokens of `h^T C^-1 h / d`."""
    from space_peft.modeling.prompts import encode_conversations
    from space_peft.null_space.collecting import linear_layers
    from space_peft.null_space.observing import observe_inputs

    layers = {name: module for name, module in linear_layers(model, None).items() if name in statistics}
    scores: dict[str, list[float]] = {name: [] for name in layers}

    def visit(name, x, parts):
        moment = statistics[name]
        h = x.reshape(-1, x.shape[-1]).double()
        basis, values, rest = moment.vectors.double(), moment.values.double(), max(moment.rest, 1e-12)
        along = h @ basis
        outside = (h.square().sum(1) - along.square().sum(1)).clamp(min=0) / rest
        scores[name].append(float(((along.square() / values.clamp(min=rest)).sum(1) + outside).mean()) / moment.dim)

    batches = (encode_conversations(processor, [row]) for row in rows)
    observe_inputs(model, batches, layers, visit, progress=False)
    return {name: own for name, own in scores.items() if len(own) == len(rows)}


def told_apart(members: dict[str, list[float]], fresh: dict[str, list[float]]) -> dict:
    from space_peft.suites.statistics import auc

    # Members have the smaller misfits.
    half = {name: auc(fresh[name][::2], own[::2]) for name, own in members.items()}
    best = max(half, key=half.get)
    return {"layer": best, "auc": round(auc(fresh[best][1::2], members[best][1::2]), 3), "layers": len(half)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[20, 100, 300], help="images, and texts, of each statistics"
    )
    parser.add_argument(
        "--candidates", type=int, default=60, help="members and fresh ones that are scored, of each kind"
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "statistics_reveal.json")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.candidates = [8], 6
    os.environ.update(HF_HUB_OFFLINE="1")
    import torch

    torch.set_num_threads(1)
    from space_peft import collect_statistics
    from space_peft.demo import DEMO_QUESTIONS, load_demo_images, load_demo_model
    from space_peft.demo.probes import TEXT_CONFIRM_QUESTIONS
    from space_peft.modeling.prompts import conversation

    model, processor = load_demo_model()
    images = load_demo_images()
    draw = random.Random(0)
    kinds = dict(zip(images["name"], images["kind"], strict=True))
    order = list(range(len(images)))
    draw.shuffle(order)
    shown = [conversation(DEMO_QUESTIONS.naming[0], answer=images[i]["name"], image=images[i]["image"]) for i in order]
    texts = [
        conversation(question.format(name=name, kind=kind), answer="yes" if kinds[name] == kind else "no")
        for question in TEXT_CONFIRM_QUESTIONS
        for name in kinds
        for kind in sorted(set(kinds.values()))
    ]
    draw.shuffle(texts)
    results = []
    for count in args.rows:
        statistics = collect_statistics(model, processor, shown[:count] + texts[:count], progress=False)
        few = min(args.candidates, count)
        row = {"rows": count}
        for kind, pool in (("images", shown), ("texts", texts)):
            members = misfits(model, processor, pool[:few], statistics)
            fresh = misfits(model, processor, pool[-few:], statistics)
            row[kind] = told_apart(members, fresh)
        results.append(row)
        print(row, flush=True)
    write_json(args.output, {"command": "python " + shlex.join(sys.argv), "machine": machine(), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
