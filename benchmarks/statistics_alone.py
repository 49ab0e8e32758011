"""Erasure without retained data: the constraint comes from statistics of the base model, made once for all requests.

    python benchmarks/statistics_alone.py                            # embedded model, 12 concepts x 2 seeds
    python benchmarks/statistics_alone.py --medium --concepts 6 --seeds 1    # the medium model (examples/medium_model)
    python benchmarks/statistics_alone.py --smoke                    # one concept, few steps: does it run?

The statistics' data show 40 of the 120 concepts, none of which is ever a target here; the model itself answered about them.
What is scored: the others, which nobody listed (`unlisted`, `unlisted_unseen_style`), beside the usual probes. Variants:
`statistics` (no retained row anywhere), `no_constraint` (the same losses and nothing that retains), `keep` (the same data as
retained rows: t = 1 and L_keep at 60). Finished runs are kept in a `.rows.jsonl` beside the output, one for each model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from defaults import adapter_fields, training_fields
from erase_demo import CONCEPTS, VALIDATION, machine
from kept_rows import KeptRows

from space_peft.records.io import write_json


KEYS = (
    "forget", "generality", "free_form", "forms", "retain", "retain_sentences", "retain_unseen_style", "siblings", "text",
    "text_target", "unlisted", "unlisted_unseen_style", "perplexity_ratio",
)  # fmt: skip
LISTED = 40
# Of a trainer that only trains: it keeps and shows nothing beside the adapter.
QUIET = {
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "canary_items": 0, "logging_strategy": "no",
}  # fmt: skip
# Targets of the medium model: none of them is listed either.
MEDIUM_CONCEPTS = (
    "banana", "owl", "castle", "guitar", "rocket", "carrot", "pizza", "hammer", "shark", "cactus", "camera", "piano",
    "helicopter",
)  # fmt: skip
VARIANTS: dict[str, dict] = {
    "statistics": {},
    "no_constraint": {"adapter": {"constraint": "none"}},
    "keep": {"rows": True, "training": {"keep_weight": 60.0, "learning_rate": 2e-3}, "adapter": {"strength": 1.0}},
    # To choose defaults by, on the validation concepts.
    "t = 0.01": {"adapter": {"strength": 0.01}},
    "t = 0.03": {"adapter": {"strength": 0.03}},
    "120 steps": {"training": {"max_steps": 120}},
    "without text about it": {"about": False},
    "16 eigenvectors, t = 0.03": {"adapter": {"max_rank": 16, "strength": 0.03}},
}


def listed_names(names: list[str]) -> set[str]:
    """The concepts that the statistics' data show: evenly spread over the alphabet, none of them a target."""
    free = sorted(set(names) - {*CONCEPTS, *VALIDATION, *MEDIUM_CONCEPTS})
    return {free[i * len(free) // LISTED] for i in range(LISTED)}


def data_rows(model, processor, public, questions, about: Sequence[str], general: Sequence[str]) -> list[dict]:
    """The statistics' data: the model's own answers about images of the listed concepts, about their names in words, and
    to general questions."""
    from space_peft import retained_answers

    options = {"max_new_tokens": 24, "progress": False, "batch_size": 64}
    rows = retained_answers(model, processor, public, questions=questions, per_image=3, **options)
    asked = [question.format(name=name) for name in sorted(set(public["name"])) for question in about]
    return rows + retained_answers(model, processor, questions=[*asked, *general], **options)


def by_listing(probes, before, after, listed: set[str]) -> dict[str, float]:
    """Kept shares over the concepts that the statistics' data do not show."""
    scores = {}
    for key, probe_name in (("unlisted", "retain"), ("unlisted_unseen_style", "retain_unseen_style")):
        kept = []
        for probe in probes:
            if probe.name != probe_name:
                continue
            both = zip(before.rows(probe.name, probe.part), after.rows(probe.name, probe.part), strict=True)
            kept += [
                now["hit"]
                for row, (was, now) in zip(probe.rows, both, strict=True)
                if was["hit"] and row["name"] not in listed
            ]
        scores[key] = statistics.fmean(kept)
        scores[f"n_{key}"] = len(kept)
    return scores


def scores_of(probes, before, after, listed: set[str]) -> dict:
    """Every score of a run, with the numbers of rows as `n`."""
    asked = [key for key in KEYS if key in after.scores]
    scores = {key: after.scores[key]["value"] for key in asked} | by_listing(probes, before, after, listed)
    return {**scores, "n": {key: after.scores[key]["n"] for key in asked}}


def run_embedded(task: tuple[str, list[tuple[str, int]], str, dict]) -> list[dict]:
    """All runs of one concept."""
    concept, runs, folder, limits = task
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    from datasets import load_from_disk
    from demo_runs import DemoSettings, make_anchors

    from space_peft.demo import DEMO_QUESTIONS, load_demo_images, load_demo_model
    from space_peft.demo.probes import demo_probes, demo_split
    from space_peft.evaluation import evaluate_probes

    images, (model, processor) = load_demo_images(), load_demo_model()
    public, _ = demo_split(images, concept)
    probes = demo_probes(concept, images)
    if limits:
        probes = [dataclasses.replace(probe, rows=list(probe.rows)[::8]) for probe in probes]
    before = evaluate_probes(model, processor, probes, progress=False)
    listed = set(load_from_disk(f"{folder}/public")["name"])
    settings = DemoSettings(**limits.get("demo", {}))
    anchors, done = {}, []
    for variant, seed in runs:
        if seed not in anchors:
            anchors[seed] = make_anchors(concept, public, model, processor, settings, seed)[1]
        began = time.perf_counter()
        trainer = train(variant, seed, folder, load_demo_model()[0], processor, anchors[seed], DEMO_QUESTIONS, limits)
        seconds = time.perf_counter() - began
        after = evaluate_probes(trainer.model, processor, probes, baseline=before, progress=False)
        scores = scores_of(probes, before, after, listed)
        done.append({"variant": variant, "concept": concept, "seed": seed, **scores, "seconds": round(seconds, 1)})
    return done


def run_medium(task: tuple[str, list[tuple[str, int]], str, dict, str, list]) -> list[dict]:
    """All runs of one concept on the medium model, with the library's defaults, as `erase_medium` makes them."""
    import medium_runs as medium

    concept, runs, folder, limits, work, known = task
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    from datasets import load_from_disk

    listed = set(load_from_disk(f"{folder}/public")["name"])
    known_as = medium.MediumConcept(concept, Path(work), known)
    if not known_as.is_known and not limits:
        return [{"concept": concept, "seed": None, "variant": None, "named_before": known_as.named}]
    from tasks import QUESTIONS

    done = []
    for variant, seed in runs:
        anchors = known_as.anchors(seed, limits.get("refine_steps", medium.REFINE_STEPS))
        own = {**limits, "training": {"bf16": medium.fast_bf16(), **medium.QUICK, **limits.get("training", {})}}
        began = time.perf_counter()
        model, _ = medium.load(known_as.work)
        trainer = train(variant, seed, folder, model, known_as.processor, anchors, QUESTIONS, own)
        seconds = time.perf_counter() - began
        after, in_words = known_as.asked_again(trainer.model.merge_and_unload().eval())
        scores = {**scores_of(known_as.probes, known_as.before, after, listed), **in_words}
        done.append({"variant": variant, "concept": concept, "seed": seed, **scores, "seconds": round(seconds, 1)})
    return done


def train(variant: str, seed: int, folder: str, model, processor, anchors, questions, limits: dict):
    """One erasure; returns the trainer."""
    from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer

    change = VARIANTS[variant]
    training = {**limits.get("training", {}), **change.get("training", {})}
    if not change.get("about", True):
        questions = dataclasses.replace(questions, about=())
    given = {"statistics": f"{folder}/statistics"}
    if change.get("rows"):
        given = {"retain_dataset": stored_rows(folder)}
    with tempfile.TemporaryDirectory() as output:
        trainer = SpaceTrainer(
            model,
            SpaceConfig(output, **QUIET, seed=seed, **training),
            anchors=anchors,
            processing_class=processor,
            questions=questions,
            peft_config=SpaceLoraConfig(**{"r": 8, "lora_alpha": 16, **change.get("adapter", {})}),
            **given,
        )
        trainer.train()
    return trainer


def stored_rows(folder: str) -> list[dict]:
    from datasets import load_from_disk

    rows = load_from_disk(f"{folder}/rows")
    return [{**row, "images": row["images"] or []} for row in rows]


def prepare(folder: Path, model, processor, images, questions, general: Sequence[str], smoke: bool) -> dict:
    """The statistics, and the rows they were made of, in a folder; made once."""
    from datasets import Dataset, Features, Image, List, Value, load_from_disk

    from space_peft import collect_statistics
    from space_peft.demo.probes import demo_split

    if (folder / "made.json").exists():
        return json.loads((folder / "made.json").read_text())
    public, _ = demo_split(images)
    listed = listed_names(images["name"])
    public = public.select([i for i, name in enumerate(public["name"]) if name in listed])
    if smoke:
        public = public.select(range(0, len(public), 8))
    public.save_to_disk(folder / "public")
    public = load_from_disk(folder / "public")
    asked = (*questions.naming, *questions.open)
    rows = data_rows(model, processor, public, asked, questions.about, general)
    message = [{"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}]
    features = Features({"prompt": message, "completion": message, "images": List(Image())})
    Dataset.from_list(rows, features=features).save_to_disk(folder / "rows")
    began = time.perf_counter()
    made = collect_statistics(model, processor, rows, progress=False)
    made.save(folder / "statistics")
    record = {
        "listed": sorted(listed),
        "rows": len(rows),
        "bytes": made.num_bytes,
        "seconds": round(time.perf_counter() - began, 1),
    }
    (folder / "made.json").write_text(json.dumps(record))
    return record


def summarise(rows: list[dict]) -> dict:
    means = {}
    for key in KEYS:
        values = [row[key] for row in rows if row.get(key) is not None]
        means[key] = round(statistics.fmean(values), 4) if values else None
    return {"mean": means, "runs": len(rows), "seconds": round(statistics.median(row["seconds"] for row in rows), 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["statistics", "no_constraint", "keep"])
    parser.add_argument("--validation", action="store_true", help="use the concepts that defaults are chosen on")
    parser.add_argument("--medium", action="store_true", help="the medium model instead of the embedded one")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/space-peft/medium_model").expanduser())
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("outputs/statistics_alone"), help="for statistics and rows")
    parser.add_argument("--smoke", action="store_true", help="one concept, few steps: does it run?")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "statistics_alone.json")
    args = parser.parse_args()
    limits = {}
    if args.smoke:
        args.concepts, args.seeds, args.folder, args.variants = 1, 1, args.folder / "smoke", ["statistics"]
        limits = {
            "demo": {"anchors": 4, "refine_steps": 2},
            "refine_steps": 2,
            "training": {"max_steps": 2, "per_device_train_batch_size": 4},
        }
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    which = "medium" if args.medium else "embedded"
    folder, model = args.folder / which, None
    if args.medium:
        import medium_runs

        model = medium_runs.model_digest(args.work)
        folder = args.folder / f"{which}_{model}"
    made, more, pool = (begin_medium if args.medium else begin_embedded)(args, folder)
    from space_peft import SpaceConfig, SpaceLoraConfig

    defaults = {
        "training": training_fields(SpaceConfig),
        "adapter": adapter_fields(SpaceLoraConfig()),
        "limits": limits,
    }
    kept = KeptRows(
        args.output.with_name(f"{args.output.stem}_{which}.json"), defaults=defaults, made=made, model=model
    )
    with ProcessPoolExecutor(args.workers) as executor:
        while True:
            unknown = {row["concept"] for row in kept.rows if row["variant"] is None}
            left = [concept for concept in pool if concept not in unknown]
            concepts = left[: args.concepts] if args.medium else left[:: max(1, len(left) // args.concepts)]
            concepts = concepts[: args.concepts]
            done = {(row["variant"], row["concept"], row["seed"]) for row in kept.rows}
            wanted = {(v, c, s) for s in range(args.seeds) for v in args.variants for c in concepts}
            tasks = [
                (c, runs, str(folder), limits, *more)
                for c in concepts
                if (runs := [(v, s) for s in range(args.seeds) for v in args.variants if (v, c, s) not in done])
            ]
            if not tasks:
                break
            run = run_medium if args.medium else run_embedded
            for task in as_completed([executor.submit(run, task) for task in tasks]):
                kept.add(task.result())
                for row in task.result():
                    print({key: row.get(key) for key in ("concept", "seed", "variant", *KEYS)}, flush=True)
    rows = [row for row in kept.rows if (row["variant"], row["concept"], row["seed"]) in wanted]
    result = {v: summarise([row for row in rows if row["variant"] == v]) for v in args.variants}
    content = json.loads(args.output.read_text()) if args.output.exists() else {}
    content[which] = {
        "command": "python " + shlex.join(sys.argv), "machine": machine(), "concepts": concepts,
        "passed_over": sorted(unknown), "statistics_of": made, "defaults": defaults, **result, "rows": rows,
    }  # fmt: skip
    write_json(args.output, content)
    print(json.dumps(result, indent=1))
    return 0


def begin_embedded(args, folder: Path) -> tuple[dict, tuple, list[str]]:
    """The statistics, what else a task holds, and the concepts to choose from."""
    from space_peft.demo import DEMO_QUESTIONS, load_demo_images, load_demo_model

    images = load_demo_images()
    made = prepare(folder, *load_demo_model(), images, DEMO_QUESTIONS, (), args.smoke)
    known = set(images["name"])
    return made, (), [name for name in (VALIDATION if args.validation else CONCEPTS) if name in known]


def begin_medium(args, folder: Path) -> tuple[dict, tuple, list[str]]:
    """As `begin_embedded`; a task holds the model's folder and the questions in words that are tested, too."""
    import medium_runs as medium

    known, facts = medium.known_questions(args.work, 4 if args.smoke else 200)
    from tasks import GENERAL, QUESTIONS

    from space_peft.demo import load_demo_images

    general = (*GENERAL, *facts)[:: 40 if args.smoke else 1]
    with medium.half_precision():
        made = prepare(folder, *medium.load(args.work), load_demo_images(), QUESTIONS, general, args.smoke)
    return made, (str(args.work), known), list(VALIDATION if args.validation else MEDIUM_CONCEPTS)


if __name__ == "__main__":
    sys.exit(main())
