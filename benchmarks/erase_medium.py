"""Erase concepts from the medium model, which answers in sentences, with the library's defaults.

    python examples/medium_model/join.py                              # builds the model once (see examples/medium_model)
    python benchmarks/erase_medium.py --concepts 8 --seeds 2          # the default
    python benchmarks/erase_medium.py --concepts 3 --seeds 1 --variants default "first default"
    python benchmarks/erase_medium.py --smoke                         # one concept, few steps: does it run?

None of the concepts was used to choose a default; those that the model does not name on 0.9 of their pictures, in short
answers and in sentences, are passed over. Finished runs are kept in a `.rows.jsonl` beside the output: an interrupted
benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from defaults import adapter_fields, training_fields
from erase_demo import VALIDATION, machine
from kept_rows import KeptRows
from medium_runs import (
    ANCHORS,
    BATCH_SIZE,
    QUICK,
    REFINE_STEPS,
    MediumConcept,
    fast_bf16,
    half_precision,
    known_questions,
    load,
    model_digest,
)

from space_peft.data.names import mentions
from space_peft.data.pictures import load_rgb
from space_peft.data.seed_images import pixel_hash
from space_peft.modeling.prompts import answer_text
from space_peft.modeling.rendering import text_of
from space_peft.records.io import write_json


# In this order, as far as the model knows them; spread over kinds.
CONCEPTS = (
    "banana", "owl", "castle", "guitar", "rocket", "carrot", "pizza", "hammer", "shark", "cactus", "camera", "piano",
    "helicopter", "mushroom", "penguin", "bicycle", "umbrella", "tiger", "strawberry", "anchor",
)  # fmt: skip
KEYS = (
    "forget", "generality", "free_form", "forms", "same_kind", "retain", "retain_sentences", "retain_unseen_style",
    "siblings", "text", "text_target", "perplexity_ratio", "sentence_perplexity_ratio", "repetition",
)  # fmt: skip
# What each variant changes: fields of SpaceConfig and of SpaceLoraConfig, and which text is retained (`retained`).
VARIANTS: dict[str, dict] = {
    "default": {},
    # The default when there were rows of short answers alone.
    "first default": {
        "training": {"own_answers": False, "keep_weight": 60.0, "learning_rate": 2e-3},
        "adapter": {"strength": 1.0, "max_rank": 18},
    },
    "short rows": {"training": {"own_answers": False}},
    "keep loss": {"training": {"keep_weight": 60.0}, "adapter": {"strength": 1.0}},
    "18 eigenvectors, t = 0.03": {"adapter": {"strength": 0.03, "max_rank": 18}},
    "twice the steps": {"training": {"max_steps": 120}},
    "says the kind": {"training": {"overwrite": "kind"}},
    "no constraint": {"training": {"keep_weight": 0.0}, "adapter": {"constraint": "none"}},
    "t = 0.002": {"adapter": {"strength": 0.002}},
    "t = 0.005": {"adapter": {"strength": 0.005}},
    "all eigenvectors": {"adapter": {"max_rank": None}},
    "little text": {"text": "general"},
    "text about names": {"text": "names"},
    "half of the concepts shown": {"concepts": 60},
}
# All: whoever has a pool for anchors has pictures of other things.
RETAINED_CONCEPTS = 120


def retained(known_as: MediumConcept, facts: list[str], shown: int) -> dict[str, list[dict]]:
    """What the constraint is fitted on: the model's own answers about other pictures, and to questions in words.

    Returns:
        `dict[str, list[dict]]`: The rows, by how much text they hold: "general" questions, those and some about other
            "names", or "all": facts, too, which are not those that are tested.
    """
    from tasks import QUESTIONS, TARGET_TEXT

    from space_peft import retained_answers

    concept, base = known_as.concept, base_answers(known_as.model, known_as.processor, known_as.work, facts, shown)
    own = [place for place, name in enumerate(known_as.images["name"]) if name == concept]
    own_pictures = {pixel_hash(load_rgb(image)) for image in known_as.images.select(own)["image"]}
    pictures = [
        row
        for row in base["pictures"]
        if pixel_hash(row["images"][0]) not in own_pictures and not mentions(answer_text(row), [concept])
    ]
    own_text = [question.format(name=concept) for question in QUESTIONS.about]
    others = [row for row in base["names"] if not any(question in text_of(row["prompt"]) for question in own_text)]

    def asked(questions) -> list[dict]:
        options = {"max_new_tokens": 24, "batch_size": 64, "progress": False}
        return retained_answers(known_as.model, known_as.processor, questions=questions, **options)

    general = pictures + base["general"] + 8 * asked([q.format(name=concept) for q in TARGET_TEXT])
    about = general + 8 * asked(own_text) + others
    return {"general": general, "names": about, "all": about + base["facts"]}


def base_answers(model, processor, work: Path, facts: list[str], shown: int) -> dict[str, list[dict]]:
    """The answers of the unadapted model that every request shares, asked once and kept beside it: about a picture of
    `shown` of the concepts, to general questions, about the names shown, and to `facts`."""
    from tasks import GENERAL, QUESTIONS

    from space_peft import retained_answers
    from space_peft.demo import load_demo_images
    from space_peft.demo.probes import demo_split

    public, _ = demo_split(load_demo_images())
    first = {name: i for i, name in reversed(list(enumerate(public["name"])))}
    names = sorted(first)
    names = names[:: max(1, len(names) // shown)]
    folder = work / f"answers_{model_digest(work)}"
    folder.mkdir(exist_ok=True)
    options = {"max_new_tokens": 24}
    about = [question.format(name=name) for name in names for question in QUESTIONS.about]
    with half_precision():
        pictures = retained_answers(
            model, processor, public.select([first[name] for name in names]),
            questions=(*QUESTIONS.naming[:1], *QUESTIONS.open), cache=folder / f"pictures_{shown}.jsonl", **options,
        )  # fmt: skip
        words = {
            key: retained_answers(model, processor, questions=questions, batch_size=64, cache=folder / file, **options)
            for key, questions, file in (
                ("general", GENERAL, "general.jsonl"),
                ("names", about, f"names_{shown}.jsonl"),
                ("facts", facts, "facts.jsonl"),
            )
        }
    return {"pictures": pictures, **words}


def shown_in(variant: str) -> int:
    """Of how many concepts a picture is retained."""
    return VARIANTS[variant].get("concepts", RETAINED_CONCEPTS)


def numbers_shown(variants: Iterable[str]) -> set[int]:
    return {shown_in(variant) for variant in variants}


def judged(known_as: MediumConcept, results) -> dict:
    """How fluent its sentences about the target's pictures are."""
    from space_peft.evaluation import judge_sentences

    with half_precision():
        all_scores = judge_sentences(results, known_as.probes, known_as.model, known_as.processor, batch_size=48).scores
    return all_scores["free_form"]


def run(task: tuple[str, list[tuple[int, list[str]]], str, dict, list, list]) -> list[dict]:
    """All runs of one concept, in one process: the unadapted model is asked once, a seed's anchors are made once."""
    concept, runs, work, limits, known, facts = task
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer

    known_as = MediumConcept(concept, Path(work), known)
    started, seconds, refined = time.perf_counter(), {}, set()

    def lap(stage: str) -> None:
        nonlocal started
        seconds[stage] = round(time.perf_counter() - started)
        started = time.perf_counter()

    if not known_as.is_known and not limits:
        return [{"concept": concept, "seed": None, "variant": None, "named_before": known_as.named}]
    text = known_as.text
    lap("evaluate_before")
    from tasks import QUESTIONS

    with half_precision():
        rows = {shown: retained(known_as, facts, shown) for shown in numbers_shown(v for _, own in runs for v in own)}
    lap("retained")
    speech_before = judged(known_as, known_as.before)
    done = []
    for seed, variant in [(seed, variant) for seed, own in runs for variant in own]:
        change, anchors = VARIANTS[variant], known_as.anchors(seed, limits.get("refine_steps", REFINE_STEPS))
        if seed not in refined:  # Those of another variant with the same seed took no time.
            lap("anchors")
            refined.add(seed)
        training = {**limits.get("training", {}), **change.get("training", {})}
        with tempfile.TemporaryDirectory() as folder:
            trainer = SpaceTrainer(
                model=load(known_as.work)[0],
                args=SpaceConfig(
                    output_dir=folder, seed=seed, use_cpu=True, bf16=fast_bf16(), report_to="none", save_strategy="no",
                    disable_tqdm=True, canary_items=0, logging_strategy="no", **QUICK, **training,
                ),
                anchors=anchors,
                retain_dataset=rows[shown_in(variant)][change.get("text", "all")],
                processing_class=known_as.processor,
                peft_config=SpaceLoraConfig(**{"r": 8, "lora_alpha": 16, **change.get("adapter", {})}),
                questions=QUESTIONS,
                probes=known_as.probes,
            )  # fmt: skip
            trainer.train()
        lap(f"erase, {variant}")
        merged = trainer.model.merge_and_unload().eval()
        after, in_words = known_as.asked_again(merged)
        speech = judged(known_as, after)
        lap(f"evaluate, {variant}")
        scores = {key: after.scores[key]["value"] for key in KEYS if key in after.scores}
        scores |= in_words
        scores["sentence_perplexity_ratio"] = speech["perplexity"] / speech_before["perplexity"]
        scores["repetition"] = speech["repetition"] - speech_before["repetition"]
        done.append(
            {
                "variant": variant,
                "concept": concept,
                "seed": seed,
                **{key: round(value, 5) for key, value in scores.items()},
                "before": {key: known_as.before.scores[key]["value"] for key in KEYS if key in known_as.before.scores},
                "n": {key: after.scores[key]["n"] for key in KEYS if key in after.scores}
                | {"text": sum(text["right"])},
                "rows_to_forget": [len(trainer.forget.given), len(trainer.train_dataset.rows)],
                "p_name_on_anchors": statistics.fmean(anchors["p_name_after"]),
                "answers": [
                    {key: record[key] for key in ("question", "answer")}
                    for name, part in (("forget", None), ("generality", "naming"), ("free_form", None))
                    for record in after.rows(name, part)
                ],
                "lost": [
                    {"probe": name, **{key: record[key] for key in ("question", "expected", "answer")}}
                    for name in ("retain", "retain_sentences", "retain_unseen_style", "siblings")
                    for record in after.rows(name)
                    if record["known"] and not record["hit"]
                ],
                "seconds": dict(seconds),
            }
        )
    return done


def summarise(rows: list[dict]) -> dict:
    return {key: round(statistics.fmean(row[key] for row in rows if row[key] is not None), 4) for key in KEYS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=8, help="how many of the listed concepts")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default"])
    parser.add_argument("--validation", action="store_true", help="use the concepts defaults were chosen on")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/space-peft/medium_model").expanduser())
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="one concept, few steps: does it run?")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "erase_medium.json"))
    args = parser.parse_args()
    if not (args.work / "model" / "figures.json").exists():
        raise SystemExit(f"{args.work / 'model'} holds no model: run examples/medium_model/join.py --work {args.work}.")
    limits = {}
    if args.smoke:
        args.concepts, args.seeds = 1, 1
        limits = {"refine_steps": 2, "knowledge": 4, "training": {"max_steps": 2}}
    from space_peft import SpaceConfig, SpaceLoraConfig

    defaults = {
        "training": training_fields(SpaceConfig),
        "adapter": adapter_fields(SpaceLoraConfig()),
        "limits": limits,
    }
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    known, facts = known_questions(args.work, limits.get("knowledge", 200))
    settings = {
        "anchors": ANCHORS, "refine_steps": REFINE_STEPS, "batch_size": BATCH_SIZE,
        "retained_concepts": RETAINED_CONCEPTS, "retained_facts": len(facts),
        "model": model_digest(args.work),
    }  # fmt: skip
    loaded = load(args.work)
    for shown in numbers_shown(args.variants):
        base_answers(*loaded, args.work, facts, shown)  # Before the workers want them.
    output = Path(args.output)
    kept = KeptRows(output, defaults=defaults, settings=settings)
    rows = kept.rows
    unknown = {row["concept"] for row in rows if row["variant"] is None}
    concepts = VALIDATION if args.validation else [concept for concept in CONCEPTS if concept not in VALIDATION]
    started: set[str] = set()

    def to_start() -> list:
        """Tasks of concepts that are wanted and not begun; one that is passed over makes room for another."""
        finished = {(row["concept"], row["seed"], row["variant"]) for row in rows}
        tasks = []
        for concept in [concept for concept in concepts if concept not in unknown][: args.concepts]:
            missing = {
                seed: [v for v in args.variants if (concept, seed, v) not in finished] for seed in range(args.seeds)
            }
            missing = [(seed, own) for seed, own in missing.items() if own]
            if missing and concept not in started:
                tasks.append((concept, missing, str(args.work), limits, known, facts))
        started.update(task[0] for task in tasks)
        return tasks

    with ProcessPoolExecutor(args.workers) as executor:
        pending = {executor.submit(run, task) for task in to_start()}
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for new in [task.result() for task in finished]:
                kept.add(new)
                unknown |= {row["concept"] for row in new if row["variant"] is None}
                for row in new:
                    print({key: row.get(key) for key in ("concept", "seed", "variant", *KEYS)}, flush=True)
            pending |= {executor.submit(run, task) for task in to_start()}
    chosen = [concept for concept in concepts if concept not in unknown][: args.concepts]
    wanted = [row for row in rows if row["concept"] in chosen and row["seed"] < args.seeds]
    groups = {variant: [row for row in wanted if row["variant"] == variant] for variant in args.variants}
    content = {
        "command": "python " + shlex.join(sys.argv),
        "machine": machine(),
        "settings": {**settings, "defaults": defaults},
        "concepts": chosen,
        "passed_over": sorted(unknown),
        "mean": summarise(groups[args.variants[0]]),
        "variants": {variant: {"mean": summarise(own), "runs": len(own)} for variant, own in groups.items()},
        "rows": wanted,
    }
    write_json(output, content)
    print(json.dumps(content["variants"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
