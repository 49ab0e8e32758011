"""Six requests one after another on the embedded model: do earlier concepts stay forgotten, and does the rest stay?

    python benchmarks/continual.py                                # SPACE and CVF, with and without protection
    python benchmarks/continual.py --keep last                    # answers and features held to the last model's
    python benchmarks/continual.py --methods space --requests 2   # a part of it

Each request is trained on the model with the earlier ones folded in, with the settings that `compare.py` chose. After each,
every image of every concept requested so far is asked for its name, and so are images of concepts never requested that the
original model named (reserved ones in trained styles, and those in the unseen style). With one torch thread a second run
gives the same figures.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from compare_parts.methods import METHODS
from compare_parts.recipes import adapter, options


# Validation concepts of `erase_demo.py`: the settings were not chosen on a sequence.
REQUESTS = ("fox", "tractor", "lemon", "crown", "penguin", "trumpet")


RESULTS = Path(__file__).parent / "results"
COMPARED = {"space": "SPACE", "cvf": "NS-CVF"}
"""What `compare.py` calls the methods."""


def run_sequence(method: str, protected: bool, keep: str, requests: tuple[str, ...], seed: int) -> dict:
    """Serves all requests; returns what was left of each concept and of the rest after each of them."""
    from demo_runs import DemoSettings, make_anchors
    from transformers.trainer_callback import PrinterCallback

    from space_peft import CVFConfig, CVFTrainer, ErasureLedger, SpaceConfig, SpaceTrainer
    from space_peft.data.names import mentions
    from space_peft.demo import DEMO_QUESTIONS, load_demo_images, load_demo_model
    from space_peft.demo.data import UNSEEN_STYLE
    from space_peft.demo.probes import demo_retain_rows, demo_split
    from space_peft.modeling.prompts import generate_answers

    compared = METHODS[COMPARED[method]]
    chosen = json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))["chosen"][compared.name]
    images = load_demo_images()
    model, processor = load_demo_model()
    original = load_demo_model()[0].eval() if keep == "original" else None
    own = {name: images.filter(lambda other, name=name: other == name, input_columns="name") for name in requests}
    others = demo_split(images)[1].filter(lambda name: name not in requests, input_columns="name")

    def answers(rows):
        question = [DEMO_QUESTIONS.naming[0]] * len(rows)
        return generate_answers(model, processor, question, images=list(rows["image"]))

    known = [i for i, (answer, name) in enumerate(zip(answers(others), others["name"])) if answer == name]
    others = others.select(known)
    unseen = [style == UNSEEN_STYLE for style in others["style"]]

    def measure(served):
        right = [answer == name for answer, name in zip(answers(others), others["name"])]
        kept = {
            kind: sum(ok for ok, new in zip(right, unseen) if new == wanted) / unseen.count(wanted)
            for kind, wanted in (("retain", False), ("retain_unseen_style", True))
        }
        named = {name: [mentions(answer, [name]) for answer in answers(own[name])] for name in served}
        return {"forget": {name: sum(said) / len(said) for name, said in named.items()}, **kept}

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ledger = ErasureLedger(Path(folder, "ledger"))
        for number, concept in enumerate(requests, start=1):
            start = time.perf_counter()
            public = demo_split(images, concept)[0]
            # What was asked to be forgotten is in no data that is kept afterwards.
            gone = requests[:number]
            public = public.filter(lambda name, gone=gone: name not in gone, input_columns="name")
            fields = {
                **options(compared), **chosen,
                "output_dir": str(Path(folder, "out")), "seed": seed, "use_cpu": True, "report_to": "none",
                "save_strategy": "no", "disable_tqdm": True, "canary_items": 0,
            }  # fmt: skip
            shared = {
                "retain_dataset": demo_retain_rows(concept, public, seed=seed),
                "processing_class": processor,
                "questions": DEMO_QUESTIONS,
                "peft_config": adapter(compared),
                "keep_model": original,
                "protect": ledger.protect if protected else (),
            }
            if method == "space":
                _, anchors = make_anchors(concept, public, model, processor, DemoSettings(), seed)
                trainer = SpaceTrainer(model, SpaceConfig(**fields), anchors=anchors, **shared)
            else:
                trainer = CVFTrainer(model, CVFConfig(**fields), forget_dataset=own[concept], **shared)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            model = ledger.add(trainer)
            seconds = round(time.perf_counter() - start, 1)
            rows.append({"request": concept, "steps": trainer.state.global_step, "seconds": seconds, **measure(gone)})
            print(method, "protected" if protected else "free", json.dumps(rows[-1]), flush=True)
    first = {row["request"]: row["forget"][row["request"]] for row in rows}
    last = rows[-1]
    return {
        "method": method,
        "protected": protected,
        "keep": keep,
        "seed": seed,
        "known_images": len(known),
        # The most that any concept came back after its own request.
        "rebound": max(row["forget"][name] - first[name] for row in rows for name in row["forget"]),
        "forget": sum(last["forget"].values()) / len(last["forget"]),
        "retain": last["retain"],
        "retain_unseen_style": last["retain_unseen_style"],
        "retain_all": (last["retain"] * unseen.count(False) + last["retain_unseen_style"] * unseen.count(True))
        / len(known),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=("space", "cvf"), default=["space", "cvf"])
    parser.add_argument("--protect", nargs="+", choices=("yes", "no"), default=["yes", "no"])
    parser.add_argument(
        "--keep", choices=("original", "last"), default="original", help="whose answers or features are kept"
    )
    parser.add_argument("--requests", type=int, default=len(REQUESTS), help="serve the first so many")
    parser.add_argument("--seed", type=int, default=0)
    default = RESULTS / "continual.json"
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    results = json.loads(arguments.output.read_text())["runs"] if arguments.output.exists() else []
    requests = REQUESTS[: arguments.requests]
    for method in arguments.methods:
        for protect in arguments.protect:
            result = run_sequence(method, protect == "yes", arguments.keep, requests, arguments.seed)
            same = ("method", "protected", "keep", "seed")
            results = [run for run in results if any(run.get(key) != result[key] for key in same)] + [result]
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps({"requests": requests, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
