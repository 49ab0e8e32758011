"""How long it takes until a name is forgotten: SPACE, which is given the name alone, beside NPO, which is given the pictures.

    python benchmarks/time_to_forget.py              # five concepts on the embedded model
    python benchmarks/time_to_forget.py --smoke      # one concept, few steps: does it run?

The end is the same for all: at most `FORGOTTEN` of the concept's unseen pictures are named, and at least `KEPT` of the other
pictures that were named before still are, both of concepts that no retained row shows and of the concept's own kind. Every
few steps the model is asked, with the clock stopped; a run ends where the end is reached, or with its steps.

- `NPO`: all designs of the concept but one, retained rows, and the settings that the comparison's search chose for it.
- `SPACE`: from the name to the adapter: anchors are selected and refined, rows found, the null space fitted, and steps taken.
- `statistics`: the same with statistics of the base model in the place of retained rows.
- `next request`: the same once more, of the same pool, whose features are kept.

What depends on the base alone is made before the clock runs: retained rows, statistics. So are certificate and report, which
come after the adapter. The retained rows and the statistics' data show 40 of the 120 concepts. Seconds are CPU time of one
thread: other work on the machine does not count. Where NPO does not reach the end, its whole run counts, so that the ratio is
too large rather than too small.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from compare_parts.answers import answers, answers_before, embedded_batches, share  # noqa: E402
from compare_parts.images import concept_data, demo_images  # noqa: E402
from compare_parts.methods import method_of  # noqa: E402
from compare_parts.recipes import adapter, options  # noqa: E402
from erase_demo import machine  # noqa: E402
from kept_rows import KeptRows  # noqa: E402
from statistics_alone import QUIET, prepare, stored_rows  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers.trainer_callback import PrinterCallback  # noqa: E402

from space_peft import (  # noqa: E402
    NPOConfig,
    NPOTrainer,
    SpaceConfig,
    SpaceLoraConfig,
    SpaceTrainer,
    refine_anchors,
    select_anchors,
)
from space_peft.attacks.models import merged_copy  # noqa: E402
from space_peft.demo import DEMO_QUESTIONS, load_demo_model  # noqa: E402
from space_peft.demo.probes import demo_split  # noqa: E402
from space_peft.records.io import write_json  # noqa: E402


# None of them chose a default or a setting, and none is listed.
CONCEPTS = ("owl", "banana", "rocket", "guitar", "castle")
FORGOTTEN, KEPT = 0.02, 0.98
# After each of the first steps, for who is fast; then every few.
ASKED_FIRST, ASKED_EVERY = 10, 5
RESULTS = Path(__file__).parent / "results"


class Watch(TrainerCallback):
    """
    Asks the model every few steps, with the clock stopped, and ends the run where the end is reached.

    Args:
        ask (`Callable`): Takes the model and returns its scores.
    """

    def __init__(self, ask: Callable[..., dict[str, float]]):
        self._ask = ask
        self._began = time.process_time()
        self._stopped = 0.0
        self.seconds = None
        self.asked: list[dict] = []

    def now(self) -> float:
        """Seconds since the watch was made, those of asking left out."""
        return time.process_time() - self._began - self._stopped

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What runs inside does not count."""
        began = time.process_time()
        yield
        self._stopped += time.process_time() - began

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seconds = self.now()  # of the last step, unless the end comes before
        step = state.global_step
        if step > ASKED_FIRST and step % ASKED_EVERY and step < state.max_steps:
            return
        with self.stopped():
            scores = self._ask(model)
        self.asked.append({"step": step, "seconds": round(self.seconds, 2), **scores})
        control.should_training_stop = is_end(scores)


def is_end(scores: dict[str, float]) -> bool:
    return scores["forget"] <= FORGOTTEN and min(scores["unlisted"], scores["siblings"]) >= KEPT


def scores_of(model, concept: str, listed: set[str]) -> dict[str, float]:
    """Shares of pictures that are named: the concept's unseen ones, and of those named before, the others in trained styles."""
    data, before = concept_data(concept, 0), answers_before(concept, 0)
    merged = merged_copy(model)  # Faster than asking through the adapter.
    after = {key: answers(merged, own).named for key, own in embedded_batches(concept, 0).items()}

    known = zip(before["others"].named, data.is_unseen_style, strict=True)
    known = [named and not unseen for named, unseen in known]

    def kept(counts) -> float:
        return share(after["others"], [k and count for k, count in zip(known, counts, strict=True)])

    return {
        "forget": statistics.fmean(after["target"]),
        "unlisted": kept([name not in listed for _, name in data.others]),
        "siblings": kept(data.is_sibling),
    }


def run_npo(concept: str, watch: Watch, model, processor, rows: list[dict], folder: Path, steps: int) -> None:
    method = method_of("NPO")
    chosen = json.loads((RESULTS / "compare_settings.json").read_text())["chosen"]["NPO"]
    trainer = NPOTrainer(
        model,
        NPOConfig(str(folder / "npo"), **QUIET, seed=0, **{**options(method, steps), **chosen}),
        forget_dataset=[{"image": image} for image in concept_data(concept, 0).given],
        retain_dataset=rows,
        processing_class=processor,
        peft_config=adapter(method),
        concept=concept,
        questions=DEMO_QUESTIONS,
        callbacks=[watch],
    )
    train(trainer)


def run_space(concept: str, watch: Watch, model, processor, folder: Path, limits: dict, **retained) -> dict:
    """Seconds of the selection, and of the same selection once more, with the features of the pool kept."""
    public, _ = demo_split(demo_images(), concept)
    given = {"model": model, "processor": processor, "progress": False}
    with tempfile.TemporaryDirectory() as cache:
        began = watch.now()
        anchors = select_anchors(concept, public, k=32, cache_dir=cache, **given)
        first = watch.now() - began
        with watch.stopped():
            began = time.process_time()
            select_anchors(concept, public, k=32, cache_dir=cache, **given)
            again = time.process_time() - began
    anchors = refine_anchors(anchors, questions=DEMO_QUESTIONS, steps=limits.get("refine_steps", 60), **given)
    trainer = SpaceTrainer(
        model,
        SpaceConfig(str(folder / "space"), **QUIET, seed=0, **limits.get("training", {})),
        anchors=anchors,
        processing_class=processor,
        peft_config=SpaceLoraConfig(r=8, lora_alpha=16),
        questions=DEMO_QUESTIONS,
        callbacks=[watch],
        **retained,
    )
    train(trainer)
    return {"selection": round(first, 2), "selection_again": round(again, 2)}


def train(trainer) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def measure(concept: str, folder: Path, listed: set[str], limits: dict) -> list[dict]:
    """The three runs of one concept, one after another in this process."""

    def ask(model):
        return scores_of(model, concept, listed)

    answers_before(concept, 0), embedded_batches(concept, 0)  # Asked and encoded before the clock runs.
    rows = stored_rows(str(folder))
    runs = {
        "NPO": functools.partial(run_npo, rows=rows, steps=limits.get("training", {}).get("max_steps", 60)),
        "SPACE": functools.partial(run_space, limits=limits, retain_dataset=rows),
        "statistics": functools.partial(run_space, limits=limits, statistics=str(folder / "statistics")),
    }
    done = []
    for method, run in runs.items():
        model, processor = load_demo_model()
        watch = Watch(ask)
        more = run(concept, watch, model, processor, folder=folder) or {}
        row = {"concept": concept, "method": method, "reached": is_end(watch.asked[-1]), "seconds": watch.seconds}
        done.append({**row, **more, "asked": watch.asked})
    return done


def summarise(rows: list[dict]) -> dict:
    """Medians over concepts of the ratios to NPO, each made within one concept's runs, and how many runs reached the end."""
    by_concept: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_concept.setdefault(row["concept"], {})[row["method"]] = row

    def median(seconds: Callable[[dict], float]) -> float:
        return round(statistics.median(seconds(own) / own["NPO"]["seconds"] for own in by_concept.values()), 3)

    def next_request(own: dict) -> float:
        run = own["statistics"]
        return run["seconds"] - run["selection"] + run["selection_again"]

    return {
        "space_over_npo": median(lambda own: own["SPACE"]["seconds"]),
        "statistics_over_npo": median(lambda own: own["statistics"]["seconds"]),
        "next_request": median(next_request),
        "reached": {
            method: sum(own[method]["reached"] for own in by_concept.values())
            for method in ("SPACE", "statistics", "NPO")
        },
        "seconds": {
            method: round(statistics.median(own[method]["seconds"] for own in by_concept.values()), 1)
            for method in ("SPACE", "statistics", "NPO")
        },
        "concepts": list(by_concept),
    }


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=len(CONCEPTS))
    parser.add_argument("--folder", type=Path, default=Path("outputs/statistics_alone"), help="for statistics and rows")
    parser.add_argument("--smoke", action="store_true", help="one concept, few steps: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS / "time_to_forget.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    limits = {}
    if args.smoke:
        args.concepts, args.folder, limits = 1, args.folder / "smoke", {"refine_steps": 2, "training": {"max_steps": 2}}
    folder = args.folder / "embedded"
    made = prepare(folder, *load_demo_model(), demo_images(), DEMO_QUESTIONS, (), args.smoke)
    kept = KeptRows(None if args.smoke else args.output, made=made, limits=limits)
    for concept in CONCEPTS[: args.concepts]:
        if not any(row["concept"] == concept for row in kept.rows):
            kept.add(measure(concept, folder, set(made["listed"]), limits))
            print([(row["method"], row["reached"], row["seconds"]) for row in kept.rows[-3:]], flush=True)
    result = {"embedded": summarise(kept.rows), "machine": machine(), "statistics_of": made, "rows": kept.rows}
    write_json(args.output, {"command": "python benchmarks/time_to_forget.py", **result})
    print(result["embedded"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
