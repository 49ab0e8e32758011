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
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from defaults import adapter_fields, training_fields
from erase_demo import VALIDATION, machine
from kept_rows import KeptRows

from space_peft.records.io import write_json


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "medium_model"
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
    "all eigenvectors": {"adapter": {"max_rank": None}},
    "little text": {"text": "general"},
    "text about names": {"text": "names"},
}
# To save time on two cores; everything else is the library's.
ANCHORS, REFINE_STEPS, BATCH_SIZE, RETAINED_CONCEPTS = 12, 60, 6, 60


def load(work: Path):
    """The medium model in float32, and its processor."""
    import efficientnet  # noqa: F401  (registers the tower)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(work / "model", dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(work / "model")


def probes_of(concept: str, images):
    """The library's standard probes: all pictures of the target, all siblings, and a part of the others."""
    from tasks import QUESTIONS

    from space_peft.demo import UNSEEN_STYLE
    from space_peft.demo.probes import demo_split
    from space_peft.evaluation import build_probes

    _, reserved = demo_split(images, concept)
    rows = [{"question": QUESTIONS.naming[0], "answer": row["name"], **row} for row in reserved]
    kinds = dict(zip(images["name"], images["kind"], strict=True))
    others = [row for row in rows if row["name"] != concept]
    trained = [row for row in others if row["style"] != UNSEEN_STYLE]
    siblings = [row for row in others if row["kind"] == kinds[concept]]
    held_out = QUESTIONS.open_held_out
    opened = [row for row in siblings if row["style"] != UNSEEN_STYLE] + trained[::6]
    opened = [{**row, "question": held_out[i % len(held_out)]} for i, row in enumerate(opened)]
    return build_probes(
        concept,
        questions=QUESTIONS,
        target_images=[row["image"] for row in rows if row["name"] == concept],
        retain_rows=trained[::3],
        retain_unseen_rows=[row for row in others if row["style"] == UNSEEN_STYLE][::3],
        retain_open_rows=opened,
        sibling_rows=siblings,
        same_kind=[kinds[concept], *(name for name, kind in kinds.items() if kind == kinds[concept])],
    )


def retained(concept: str, public, model, processor, facts: list[str]) -> dict[str, list[dict]]:
    """What the constraint is fitted on: the model's own answers about other pictures, and to questions in words.

    Returns:
        `dict[str, list[dict]]`: The rows, by how much text they hold: "general" questions, those and some about other
            "names", or "all": facts, too, which are not those that are tested.
    """
    from tasks import GENERAL, QUESTIONS, TARGET_TEXT

    from space_peft import retained_answers

    names = sorted(set(public["name"]))
    shown = set(names[:: max(1, len(names) // RETAINED_CONCEPTS)])
    first = {name: i for i, name in reversed(list(enumerate(public["name"])))}
    pictures = public.select(sorted(first[name] for name in shown))
    options = {"max_new_tokens": 24, "progress": False}
    rows = retained_answers(
        model, processor, pictures, questions=(*QUESTIONS.naming[:1], *QUESTIONS.open), names=[concept], **options
    )
    options["batch_size"] = 64

    def asked(questions) -> list[dict]:
        return retained_answers(model, processor, questions=questions, **options)

    general = rows + asked(GENERAL) + 8 * asked([q.format(name=concept) for q in TARGET_TEXT])
    others = [q.format(name=name) for name in sorted(shown - {concept}) for q in QUESTIONS.about]
    about = general + 8 * asked([q.format(name=concept) for q in QUESTIONS.about]) + asked(others)
    return {"general": general, "names": about, "all": about + asked(facts)}


def measure_text(model, processor, concept: str, known: list[tuple[str, str]], before: dict | None) -> dict:
    """Knowledge in words: of what was answered right before, the share still right; the passage; the target's words."""
    from tasks import PASSAGE, TARGET_TEXT_HELD_OUT, is_right
    from text_knowledge import KNOWLEDGE_TOKENS, perplexity, token_agreement

    from space_peft.modeling.prompts import generate_answers

    said = generate_answers(model, processor, [question for question, _ in known], max_new_tokens=KNOWLEDGE_TOKENS)
    right = [
        any(is_right(answer, form) for form in expected.split("|"))
        for answer, (_, expected) in zip(said, known, strict=True)
    ]
    target = [question.format(name=concept) for question in TARGET_TEXT_HELD_OUT]
    answers = generate_answers(model, processor, target, max_new_tokens=24) if before is None else before["target"]
    kept = right if before is None else [now for was, now in zip(before["right"], right, strict=True) if was]
    return {
        "right": right,
        "text": statistics.fmean(kept),
        "text_target": token_agreement(model, processor, target, answers),
        "perplexity": perplexity(model, processor, PASSAGE),
        "target": answers,
    }


def run(task: tuple[str, list[tuple[int, list[str]]], str, dict, list, list]) -> list[dict]:
    """All runs of one concept, in one process: the unadapted model is asked once, a seed's anchors are made once."""
    concept, runs, work, limits, known, facts = task
    sys.path.insert(0, str(EXAMPLE))
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from tasks import QUESTIONS

    from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer, refine_anchors, select_anchors
    from space_peft.demo import load_demo_images
    from space_peft.demo.probes import demo_split
    from space_peft.evaluation import evaluate_probes, judge_sentences

    images = load_demo_images()
    public, _ = demo_split(images, concept)
    model, processor = load(Path(work))
    probes = probes_of(concept, images)
    started, seconds, refined = time.perf_counter(), {}, {}

    def lap(stage: str) -> None:
        nonlocal started
        seconds[stage] = round(time.perf_counter() - started)
        started = time.perf_counter()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bf16()):
        before = evaluate_probes(model, processor, probes, progress=False, batch_size=48)
        named = [before.scores[key]["value"] for key in ("forget", "free_form")]
        if min(named) < 0.9 and not limits:
            return [{"concept": concept, "seed": None, "variant": None, "named_before": named}]
        text = measure_text(model, processor, concept, known, None)
        lap("evaluate_before")
        rows = retained(concept, public, model, processor, facts)
        lap("retained")
        raw = select_anchors(
            concept, public, k=ANCHORS, cache_dir=False, model=model, processor=processor, progress=False
        )
        lap("select")
    done = []
    for seed, variant in [(seed, variant) for seed, own in runs for variant in own]:
        if seed not in refined:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bf16()):
                refined[seed] = refine_anchors(
                    raw, model=model, processor=processor, questions=QUESTIONS, seed=seed, progress=False,
                    steps=limits.get("refine_steps", REFINE_STEPS),
                )  # fmt: skip
            lap("refine")
        anchors, change = refined[seed], VARIANTS[variant]
        training = {**limits.get("training", {}), **change.get("training", {})}
        with tempfile.TemporaryDirectory() as folder:
            trainer = SpaceTrainer(
                model=load(Path(work))[0],
                args=SpaceConfig(
                    output_dir=folder, seed=seed, use_cpu=True, bf16=fast_bf16(), report_to="none", save_strategy="no",
                    disable_tqdm=True, canary_items=0, fit_batch_size=48, per_device_train_batch_size=BATCH_SIZE,
                    logging_strategy="no", **training,
                ),
                anchors=anchors,
                retain_dataset=rows[change.get("text", "all")],
                processing_class=processor,
                peft_config=SpaceLoraConfig(**{"r": 8, "lora_alpha": 16, **change.get("adapter", {})}),
                questions=QUESTIONS,
                probes=probes,
            )  # fmt: skip
            trainer.train()
        lap(f"erase, {variant}")
        merged = trainer.model.merge_and_unload().eval()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bf16()):
            after = evaluate_probes(merged, processor, probes, baseline=before, progress=False, batch_size=48)
            speech = [
                judge_sentences(results, probes, model, processor, batch_size=48).scores["free_form"]
                for results in (before, after)
            ]
            text_after = measure_text(merged, processor, concept, known, text)
        lap(f"evaluate, {variant}")
        scores = {key: after.scores[key]["value"] for key in KEYS if key in after.scores}
        scores |= {key: text_after[key] for key in ("text", "text_target")}
        scores["sentence_perplexity_ratio"] = speech[1]["perplexity"] / speech[0]["perplexity"]
        scores["repetition"] = speech[1]["repetition"] - speech[0]["repetition"]
        scores["perplexity_ratio"] = text_after["perplexity"] / text["perplexity"]
        done.append(
            {
                "variant": variant,
                "concept": concept,
                "seed": seed,
                **{key: round(value, 5) for key, value in scores.items()},
                "before": {key: before.scores[key]["value"] for key in KEYS if key in before.scores},
                "n": {key: after.scores[key]["n"] for key in KEYS if key in after.scores}
                | {"text": sum(text["right"])},
                "rows_to_forget": [len(trainer.forget.given), len(trainer.train_dataset.rows)],
                "p_name_on_anchors": statistics.fmean(anchors["p_name_after"]),
                "answers": [
                    {key: record[key] for key in ("question", "answer")}
                    for name, part in (("forget", None), ("generality", "naming"), ("free_form", None))
                    for record in after.rows(name, part)
                ],
                "seconds": dict(seconds),
            }
        )
    return done


def known_questions(work: Path, most: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Questions without a picture that the medium model answers right before any erasure; asked once, kept beside it.

    Returns:
        `tuple`: At most that many questions, each with its answer, to be tested; and the others, which may be retained.
    """
    sys.path.insert(0, str(EXAMPLE))
    import torch
    from knowledge import KNOWLEDGE
    from text_knowledge import KNOWLEDGE_TOKENS, knowledge_right

    from space_peft.modeling.prompts import generate_answers

    path = work / "right_before.json"
    if not path.exists():
        model, processor = load(work)
        questions = [question for question, _ in KNOWLEDGE]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bf16()):
            said = generate_answers(model, processor, questions, max_new_tokens=KNOWLEDGE_TOKENS, desc="what it knows")
        path.write_text(json.dumps([q for q, right in zip(questions, knowledge_right(said), strict=True) if right]))
    right = set(json.loads(path.read_text()))
    known = [pair for pair in KNOWLEDGE if pair[0] in right]
    if len(known) < most:
        raise SystemExit(f"the model in {work} answers {len(known)} questions right; expected at least {most}.")
    tested = known[:: max(1, len(known) // most)][:most]
    return tested, [question for question, _ in KNOWLEDGE if question not in dict(tested)]


def fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware; where not, float32 is faster."""
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
    }  # fmt: skip
    output = Path(args.output)
    kept = KeptRows(output, defaults=defaults, settings=settings)
    rows = kept.rows
    unknown = {row["concept"] for row in rows if row["variant"] is None}
    concepts = VALIDATION if args.validation else [concept for concept in CONCEPTS if concept not in VALIDATION]
    with ProcessPoolExecutor(args.workers) as executor:
        while True:
            chosen = [concept for concept in concepts if concept not in unknown][: args.concepts]
            finished = {(row["concept"], row["seed"], row["variant"]) for row in rows}
            tasks = []
            for concept in chosen:
                missing = {
                    seed: [v for v in args.variants if (concept, seed, v) not in finished] for seed in range(args.seeds)
                }
                missing = [(seed, own) for seed, own in missing.items() if own]
                tasks += [(concept, missing, str(args.work), limits, known, facts)] if missing else []
            if not tasks:
                break
            for task in as_completed([executor.submit(run, task) for task in tasks]):
                new = task.result()
                kept.add(new)
                unknown |= {row["concept"] for row in new if row["variant"] is None}
                for row in new:
                    print({key: row.get(key) for key in ("concept", "seed", "variant", *KEYS)}, flush=True)
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
