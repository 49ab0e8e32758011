"""Every method on the same footing: the same model, data, adapter, steps and search, measured the same way.

    python benchmarks/compare.py                          # search, then test: hours; goes on where it was stopped
    python benchmarks/compare.py --phase search           # choose each method's settings on validation concepts
    python benchmarks/compare.py --phase test --depth     # test them on other concepts, attacks included
    python benchmarks/compare.py --phase parts --concepts 4      # each method without one of its parts
    python benchmarks/compare.py --phase longer           # SPACE, and the best that sees the target, with twice the steps
    python benchmarks/compare.py --phase docs             # write the tables of README and docs/comparison.md
    python benchmarks/compare.py --phase test --settings_from FILE   # with the settings that an earlier comparison chose
    python benchmarks/compare.py --minutes 60             # start no new run after an hour
    python benchmarks/compare.py --smoke                  # one method, a few steps, for CI

Each method has eight settings to choose from (two values of three knobs). All are tried on one validation concept, the
best two of each method (of the closed form all) on three more, and the better of these once more with a learning rate
beyond the range it was chosen from: twice the larger or half of the smaller. The settings whose mean trade-off curve has
the largest hypervolume on the four concepts are frozen. A curve is made by scaling the finished adapter. Methods that see
images of the target get all but one of its designs, in turn with the seed; forgetting is measured on the rest. All runs
are kept in the JSON, which tables and pictures are made from; runs are the same with any number of workers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from compare_parts.images import TEST, VALIDATION, nearest_siblings  # noqa: E402
from compare_parts.methods import ATTACKED, LONGER, MAX_STEPS, METHODS, MOVES_FEATURES, PARTS, whole_of  # noqa: E402
from compare_parts.pages import write_blocks  # noqa: E402
from compare_parts.plots import plot_relearning, plot_tradeoff  # noqa: E402
from compare_parts.recipes import check_recipes  # noqa: E402
from compare_parts.search import choose, rounds  # noqa: E402
from compare_parts.tables import demo_table, hypervolume_difference, summarise, tables  # noqa: E402

from space_peft.records.io import write_json  # noqa: E402


PAGES = {
    "README.md": ("demo",),
    "docs/comparison.md": ("lead", "compare", "paired"),
}
"""Where each table is shown."""


def identity(task: dict) -> str:
    """What makes two runs the same run; what else was measured of it does not."""
    return json.dumps([task[key] for key in ("method", "settings", "concept", "seed")], sort_keys=True)


def test_tasks(chosen: dict[str, dict], concepts, seeds, depth: bool) -> list[dict]:
    # Seed by seed: an interrupted test has whole seeds. The attacks are run once a concept.
    return [
        {"method": name, "settings": settings, "concept": concept, "seed": seed, "probes": True, "depth": depth and seed == 0}
        for seed in seeds
        for concept in concepts
        for name, settings in chosen.items()
    ]  # fmt: skip


def parts_tasks(chosen: dict[str, dict], concepts, variants=PARTS) -> list[dict]:
    """Methods with one part changed, with the settings of the whole and beside it."""
    settings = {name: chosen[whole_of(name)] for name in variants if whole_of(name) in chosen}
    whole = {whole_of(name): own for name, own in settings.items()}
    tasks = test_tasks({**whole, **settings}, concepts, range(1), depth=False)
    return [
        {**task, "features": task["method"] in MOVES_FEATURES, "depth": task["method"] in ATTACKED} for task in tasks
    ]


def finished(row: dict, task: dict) -> bool:
    # A row holds its task: a `depth` that was not asked for is there, and False.
    wanted = {"probes": "scores", "depth": "depth", "features": "entropy"}
    return not any(task.get(asked) and not row.get(key) for asked, key in wanted.items())


def execute(
    tasks: list[dict], rows: dict[str, dict], save, workers: int, max_steps: int, deadline: float | None
) -> None:
    """Runs what is missing; saves after every run."""
    from compare_parts.runs import run
    from tqdm import tqdm

    missing = [task for task in tasks if not (identity(task) in rows and finished(rows[identity(task)], task))]
    if not missing:
        return
    # Read by the workers as they start. Two processes with two threads thrash.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor,
        tqdm(total=len(missing), desc="runs") as bar,
    ):
        waiting, running = list(reversed(missing)), set()
        while waiting or running:
            while waiting and len(running) < workers and (deadline is None or time.monotonic() < deadline):
                running.add(executor.submit(run, waiting.pop(), max_steps))
            if not running:
                break
            done = next(iter(_completed(running)))
            running.remove(done)
            row = done.result()
            rows[identity(row)] = row
            save()
            bar.update()


def _completed(futures):
    from concurrent.futures import FIRST_COMPLETED, wait

    return wait(futures, return_when=FIRST_COMPLETED).done


def parts(rows: list[dict], chosen: dict[str, dict], variants=PARTS) -> dict[str, dict]:
    """Each method and what was changed of it, on the concepts that all of these were run on."""
    summaries = {}
    for whole in dict.fromkeys(map(whole_of, variants)):
        names = [whole, *(name for name in variants if whole_of(name) == whole)]
        own = {
            name: {
                r["concept"]: r for r in rows if (r["method"], r["settings"], r["seed"]) == (name, chosen.get(whole), 0)
            }
            for name in names
        }
        shared = [concept for concept in TEST if all(concept in found for found in own.values())]
        if shared:
            summaries |= {name: summarise([found[c] for c in shared], {}) for name, found in own.items()}
    return summaries


def report(rows: list[dict], names: list[str], earlier: dict | None = None) -> dict:
    """The JSON's content but for the runs; settings are those of an earlier comparison, if there is one."""
    chosen = earlier["chosen"] if earlier else choose(rows, names)
    test = {
        name: [r for r in rows if r["method"] == name and r["settings"] == chosen[name] and r["concept"] in TEST]
        for name in chosen
    }
    near = nearest_siblings()
    order = sorted(TEST, key=near.get)
    families = {"without a close sibling": order[: len(order) // 2], "with a close sibling": order[len(order) // 2 :]}
    return {
        "command": "python benchmarks/compare.py",
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "families": families,
        "chosen": chosen,
        **({"earlier": earlier} if earlier else {}),
        "methods": {
            name: {"sees_images": METHODS[name].sees_images, **summarise(own, families)} for name, own in test.items() if own
        },
        # Of SPACE to each other method: what both have run is drawn together, so that a hard concept counts for both.
        "hypervolume_above": {
            name: hypervolume_difference(test["SPACE"], own) for name, own in test.items() if own and name != "SPACE"
        } if test.get("SPACE") else {},
        "parts": parts(rows, chosen),
        "longer": parts(rows, chosen, LONGER),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=("search", "test", "parts", "longer", "docs", "all"), default="all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--concepts", type=int, default=len(TEST), help="how many of the test concepts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depth", action="store_true", help="attack the first seed's runs, too")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="start no new run after so many minutes")
    parser.add_argument("--smoke", action="store_true", help="one method, one concept, few steps: does it run?")
    parser.add_argument("--settings_from", help="JSON of an earlier comparison whose settings are taken; no search")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "compare.json"))
    args = parser.parse_args()
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    names, test, validation = args.methods, TEST[: args.concepts], VALIDATION
    max_steps, settings_each = MAX_STEPS, None
    if args.smoke:
        names, test, validation, args.seeds, args.depth = ["GradDiff"], TEST[:1], VALIDATION[:1], 1, True
        args.workers, max_steps, settings_each = 1, 2, 1

    def quick(tasks: list[dict]) -> list[dict]:
        return [{**task, "every": 8} for task in tasks] if args.smoke else tasks

    saved = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"rows": []}
    rows = {identity(row): row for row in saved["rows"]}
    saved["recipes"] = check_recipes(saved.get("recipes", {}))

    def save() -> None:
        write_json(output, {**saved, "rows": list(rows.values())})

    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    if args.phase in ("search", "all") and not args.settings_from:
        for tasks in rounds(rows, names, validation, settings_each):
            execute(quick(tasks), rows, save, args.workers, max_steps, deadline)
    if args.settings_from:
        earlier = json.loads(Path(args.settings_from).read_text(encoding="utf-8"))
        saved["earlier"] = {"file": Path(args.settings_from).name, "chosen": earlier["chosen"]}
    # By the search's runs alone: what follows does not change it.
    chosen = saved["earlier"]["chosen"] if "earlier" in saved else choose(list(rows.values()), names)
    chosen = {name: chosen[name] for name in names if name in chosen}
    if args.phase in ("test", "all"):
        tasks = quick(test_tasks(chosen, test, range(args.seeds), args.depth))
        execute(tasks, rows, save, args.workers, max_steps, deadline)
    if args.phase in ("parts", "all"):
        execute(parts_tasks(chosen, test), rows, save, args.workers, max_steps, deadline)
    if args.phase in ("longer", "all"):
        execute(parts_tasks(chosen, test, LONGER), rows, save, args.workers, max_steps, deadline)
    results = {
        **report(list(rows.values()), list(METHODS), saved.get("earlier")),
        "recipes": saved["recipes"],
        "rows": list(rows.values()),
    }
    write_json(output, results)
    if results["methods"]:
        for table in tables(results).values():
            print(table, end="\n\n")
        plot_tradeoff(results["methods"], output.with_suffix(".png"))
        if any(result["depth"] for result in results["methods"].values()):
            plot_relearning(results["methods"], results["rows"], output.with_name(f"{output.stem}_relearning.png"))
    if args.phase == "docs":
        root = Path(__file__).parents[1]
        # The site's pages and pictures are in one folder.
        shutil.copyfile(output.with_suffix(".png"), root / "docs" / "images" / "compare.png")
        demo = json.loads((root / "benchmarks" / "results" / "erase_demo.json").read_text(encoding="utf-8"))
        made = {**tables(results), "demo": demo_table(demo)}
        for page, blocks in PAGES.items():
            write_blocks(root / page, {name: made[name] for name in blocks if name in made})
    return 0


if __name__ == "__main__":
    sys.exit(main())
