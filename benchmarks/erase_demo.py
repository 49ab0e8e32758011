"""Erase concepts from the embedded model with default settings, and ablate one choice at a time.

    python benchmarks/erase_demo.py --concepts 12 --seeds 3              # the default
    python benchmarks/erase_demo.py --ablations --concepts 3 --seeds 1   # the ablations, added to the same file
    python benchmarks/erase_demo.py --ablations --concepts 3 --seeds 1 --variants "without refinement" "one anchor, raw"
    python benchmarks/erase_demo.py --first_defaults --output first.json # with the defaults up to November 2026
    python benchmarks/erase_demo.py --smoke                              # one concept, a few steps, for CI

Every run is one (variant, concept, seed), with one torch thread so that a second run gives the same figures. Finished
runs are kept in a `.rows.jsonl` beside the output: an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from defaults import adapter_fields, training_fields
from kept_rows import KeptRows

from space_peft.records.io import write_json
from space_peft.records.versions import versions


# Spread over kinds; none of them was used to choose a default (those are in VALIDATION).
CONCEPTS = (
    "owl", "shark", "spider", "cactus", "banana", "carrot", "pizza", "rocket", "castle", "guitar", "hammer",
    "alarm clock",
)  # fmt: skip
VALIDATION = ("fox", "penguin", "tractor", "trumpet", "lemon", "birthday cake", "crown", "microscope")

FIRST_DEFAULTS = {
    "strength": 0.3,
    "training": {"learning_rate": 5e-3, "stop_threshold": 0.02, "suppression_margin": 2.0, "keep_weight": 20.0},
}
"""The library's defaults before the comparison chose others (docs/decisions.md)."""

KEYS = (
    "forget", "generality", "free_form", "forms", "same_kind", "retain", "retain_sentences", "retain_unseen_style",
    "siblings", "text", "text_target", "fluency",
)  # fmt: skip

# What each variant changes of `DemoSettings`.
VARIANTS: dict[str, dict] = {
    "default": {},
    "random anchors": {"selection": "random"},
    "random anchors, raw": {"selection": "random", "refine_steps": 0},
    "one anchor": {"anchors": 1},
    "one anchor, raw": {"anchors": 1, "refine_steps": 0},
    "threshold too low": {"lowest": True},
    "threshold too low, raw": {"lowest": True, "refine_steps": 0},
    "without refinement": {"refine_steps": 0},
    "without constraint": {"constraint": "none"},
    "hard constraint": {"constraint": "hard"},
    "target vision": {"training": {"target": "vision"}},
    "target all": {"training": {"target": "all"}},
    "target all, without repulsion": {"training": {"target": "all", "repulsion_weight": 0.0}},
    "stopped at p = 0.02": {"training": {"stop_threshold": 0.02}},
    "fixed 60 steps": {"training": {"stop_threshold": None}},
    "t = 0.005": {"strength": 0.005},
    "t = 0.01": {"strength": 0.01},
    "t = 0.03": {"strength": 0.03},
    "t = 0.1": {"strength": 0.1},
    "t = 0.1, keep 60": {"strength": 0.1, "training": {"keep_weight": 60.0}},
    "t = 1, no keep loss": {"strength": 1.0, "training": {"keep_weight": 0.0}},
    "t = 1, keep 60": {"strength": 1.0, "training": {"keep_weight": 60.0}},
    "no constraint, no keep loss": {"constraint": "none", "training": {"keep_weight": 0.0}},
    "rows of short answers only": {"training": {"own_answers": False}},
    "not asked again": {"training": {"refresh_steps": None}},
    "says the kind": {"training": {"overwrite": "kind"}},
    "refuses": {"training": {"overwrite": "refusal"}},
    "without margin": {"training": {"suppression_margin": 0.0}},
    "update projection only": {"project_gradient": False},
    "all eigenvectors": {"max_rank": None},
    "16 eigenvectors, t = 0.03": {"max_rank": 16, "strength": 0.03},
    "16 tokens a row": {"tokens_per_row": 16},
}


def run_concept(task: tuple[str, list[tuple[str, int]], dict, int]) -> list[dict]:
    """All runs of one concept, in one process: the unadapted model is asked once. Returns one row a run."""
    concept, runs, extra, every = task
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    from demo_runs import DemoSettings, erase

    before, anchors, rows = None, {}, []
    with tempfile.TemporaryDirectory() as folder:
        for variant, seed in runs:
            change = {**VARIANTS[variant], **extra}
            change["training"] = {**extra.get("training", {}), **VARIANTS[variant].get("training", {})}
            settings = DemoSettings(**change)
            key = (
                settings.selection,
                settings.anchors,
                settings.refine_steps,
                settings.threshold,
                settings.lowest,
                seed,
            )
            if key not in anchors:
                anchors[key] = prepare_anchors(concept, settings, seed)
            refined = anchors[key]
            run = erase(concept, folder, refined, seed=seed, settings=settings, before=before, every=every)
            before = run.before
            report = run.report
            entropy = [e["feature_entropy"] for e in run.trainer.state.log_history if "feature_entropy" in e]
            rows.append(
                {
                    "variant": variant,
                    "concept": concept,
                    "seed": seed,
                    **{name: report.after[name]["value"] for name in KEYS},
                    "n": {name: report.after[name]["n"] for name in KEYS},
                    "parts": {k: v["value"] for k, v in report.after["generality"]["parts"].items()},
                    "before": {name: report.before[name]["value"] for name in KEYS},
                    "speech": {
                        key: [getattr(report, when)["free_form"][key] for when in ("before", "after")]
                        for key in ("perplexity", "repetition")
                    },
                    "steps": run.trainer.state.global_step,
                    "entropy": [entropy[0], entropy[-1]],
                    "p_name": mean(refined["p_name_after"]) if "p_name_after" in refined.column_names else None,
                    "change": run.trainer.certificate.max_relative_change,
                    "seconds": report.seconds,
                }
            )
    return rows


def prepare_anchors(concept, settings, seed):
    from demo_runs import make_anchors

    from space_peft.demo import load_demo_images, load_demo_model
    from space_peft.demo.probes import demo_split

    public, _ = demo_split(load_demo_images(), concept)
    return make_anchors(concept, public, *load_demo_model(), settings, seed)[1]


def library_defaults() -> dict:
    """What a variant leaves to the library."""
    from demo_runs import DemoSettings

    from space_peft import SpaceConfig, SpaceLoraConfig

    adapter = adapter_fields(SpaceLoraConfig())
    return {"training": training_fields(SpaceConfig), "adapter": adapter, "demo": asdict(DemoSettings())}


def mean(values) -> float:
    return statistics.fmean(values)


def summarise(rows: list[dict]) -> tuple[dict, dict]:
    """Mean over all runs, and its standard error over concepts (the seeds of a concept are not independent)."""
    means, errors = {}, {}
    for key in KEYS:
        values = [row[key] for row in rows if row[key] is not None]
        means[key] = round(mean(values), 4)
        per_concept = [
            mean([row[key] for row in rows if row["concept"] == c and row[key] is not None])
            for c in dict.fromkeys(row["concept"] for row in rows)
        ]
        errors[key] = (
            round(statistics.stdev(per_concept) / len(per_concept) ** 0.5, 4) if len(per_concept) > 1 else None
        )
    means["steps"] = round(mean([row["steps"] for row in rows]), 1)
    return means, errors


def table(results: dict[str, tuple[dict, dict, int]]) -> str:
    """Markdown: one line a variant, mean ± standard error."""
    lines = ["| variant | runs | " + " | ".join(KEYS) + " | steps |", "|---" * (len(KEYS) + 3) + "|"]
    for variant, (means, errors, n) in results.items():
        cells = [f"{means[k]:.3f}" + (f" ± {errors[k]:.3f}" if errors[k] is not None else "") for k in KEYS]
        lines.append(f"| {variant} | {n} | " + " | ".join(cells) + f" | {means['steps']} |")
    return "\n".join(lines)


def machine() -> dict:

    used = versions("torch", "transformers", "peft", "datasets")
    return {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(), **used}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=12, help="how many of the listed concepts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ablations", action="store_true", help="run every variant instead of the default one")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="run these variants")
    parser.add_argument("--validation", action="store_true", help="use the concepts defaults were chosen on")
    parser.add_argument("--first_defaults", action="store_true", help="the library's earlier defaults in every variant")
    parser.add_argument("--set", default="{}", help="JSON of DemoSettings to change in every variant")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="one concept, few steps: does it run?")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "erase_demo.json"))
    args = parser.parse_args()
    extra = {**(FIRST_DEFAULTS if args.first_defaults else {}), **json.loads(args.set)}
    pool = VALIDATION if args.validation else CONCEPTS
    # Evenly spaced, because the list is sorted by kind.
    concepts = pool[:: max(1, len(pool) // args.concepts)][: args.concepts]
    variants = args.variants or (list(VARIANTS) if args.ablations else ["default"])
    seeds = range(args.seeds)
    if args.smoke:
        concepts, seeds, variants = CONCEPTS[:1], range(1), ["default"]
        extra = {"anchors": 4, "refine_steps": 5, "training": {"max_steps": 3, "per_device_train_batch_size": 4}}

    output = Path(args.output)
    kept = KeptRows(output, extra=extra, defaults=library_defaults())
    done = {(row["variant"], row["concept"], row["seed"]) for row in kept.rows}
    tasks = []
    for concept in concepts:
        runs = [(v, s) for v in variants for s in seeds if (v, concept, s) not in done]
        # Small tasks, so that an interrupted benchmark loses little; runs with the same anchors stay together.
        tasks += [(concept, runs[i : i + 6], extra, 8 if args.smoke else 1) for i in range(0, len(runs), 6)]
    from tqdm import tqdm

    total = sum(len(task[1]) for task in tasks)
    # Workers are fresh processes with one thread each: two processes with two threads on two cores thrash.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.workers) as executor, tqdm(total=total, desc="runs") as bar:
        for new in executor.map(run_concept, tasks):
            kept.add(new)
            bar.update(len(new))

    wanted = {(v, c, s) for v in variants for c in concepts for s in seeds}
    rows = [row for row in kept.rows if (row["variant"], row["concept"], row["seed"]) in wanted]
    results = {}
    for variant in variants:
        chosen = [row for row in rows if row["variant"] == variant]
        results[variant] = (*summarise(chosen), len(chosen))
    print(table(results))
    content = json.loads(output.read_text()) if output.exists() else {}
    record = {"command": "python " + shlex.join(sys.argv), "machine": machine(), "concepts": list(concepts)}
    if variants == ["default"]:
        means, errors, _ = results["default"]
        content = {**record, "mean": means, "stderr": errors, "rows": rows, "ablations": content.get("ablations", {})}
    else:
        summary = {v: {"mean": m, "stderr": e, "runs": n} for v, (m, e, n) in results.items()}
        content["ablations"] = {**record, "variants": summary, "rows": rows}
    write_json(output, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
