"""Where an erasure's time goes: measured on the embedded and the medium model, on paper for a model of 7B. One figure.

    python benchmarks/where_time_goes.py                       # the embedded model, and 7B
    python benchmarks/where_time_goes.py --work FOLDER         # and the medium model, see benchmarks/erase_medium.py
    python benchmarks/where_time_goes.py --smoke               # few steps, nothing written to docs

Measured is the CPU time of one thread in each stage, without that of the stages called inside it: other work on the machine
does not count. What is on paper comes from `benchmarks/scale.py`; it leaves out embedding the pool, done once for all requests.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from space_peft.figures.style import INK, KEEP, STYLE, save_figure  # noqa: E402
from space_peft.records.io import write_json  # noqa: E402


ROOT = Path(__file__).parents[1]
CONCEPT, MEDIUM_CONCEPT = "fox", "owl"
REST = "everything else"
# What counts as which stage: places of functions, a method by its class.
STAGES = {
    "selection": ["space_peft:select_anchors", "demo_runs:select_anchors"],
    "refinement": ["space_peft:refine_anchors", "demo_runs:refine_anchors"],
    "retained rows' answers": ["demo_runs:demo_retained", "erase_medium:retained"],
    "asking": ["space_peft.trainers.forget_rows:ForgetRows.find_rows", "space_peft.trainers.forget_rows:ForgetRows.refresh"],
    "statistics": ["space_peft.null_space.fitting:collect_moments"],
    "decomposition": ["space_peft.null_space.moments:NullSpaceFitter.fit"],
    "steps": ["transformers:Trainer.training_step"],
    "projections": ["space_peft.null_space.projection:AttachedNullSpace._before_step",
                    "space_peft.null_space.projection:AttachedNullSpace._after_step"],
    "logging": ["space_peft.trainers.erasure_trainer:ErasureTrainer.log"],
    "certificate, canary": ["space_peft.trainers.certifying:CertifyingMixin._certify"],
    "evaluation": ["demo_runs:evaluate_erasure", "space_peft.evaluation:evaluate_probes",
                   "space_peft.evaluation:judge_sentences", "medium_runs:measure_text"],
}  # fmt: skip


class Clock:
    """Time of stages, each without that of those inside it.

    Args:
        now (`Callable`): Seconds.
    """

    def __init__(self, now: Callable[[], float] = time.process_time):
        self._now = now
        self._running: list[str] = []
        self._since = now()
        self.seconds: dict[str, float] = {}

    def _turn(self) -> None:
        """What has passed is that of the innermost stage."""
        now = self._now()
        stage = self._running[-1] if self._running else REST
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def watched(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return run


@contextmanager
def watching(places: dict[str, list[str]]) -> Iterator[Clock]:
    """Watches functions while the block runs; in the end all time is some stage's."""
    clock, before = Clock(), []
    try:
        for stage, paths in places.items():
            for path in paths:
                module, _, inside = path.partition(":")
                *owners, name = inside.split(".")
                owner = functools.reduce(getattr, owners, importlib.import_module(module))
                function = getattr(owner, name)
                before.append((owner, name, function))
                setattr(owner, name, clock.watched(stage, function))
        clock._since = time.process_time()  # Importing is no part of it.
        yield clock
        clock._turn()
    finally:
        for owner, name, function in reversed(before):
            setattr(owner, name, function)


def embedded(smoke: bool) -> dict[str, float]:
    """The whole job with the library's defaults, as `space-peft demo` does it."""
    from demo_runs import DemoSettings, erase, make_anchors

    from space_peft.demo import load_demo_images, load_demo_model
    from space_peft.demo.probes import demo_split

    small = {"anchors": 2, "refine_steps": 1, "training": {"max_steps": 2, "own_answers": False, "canary_items": 0}}
    settings = DemoSettings(**small) if smoke else DemoSettings()
    places = {stage: [path for path in paths if "medium" not in path] for stage, paths in STAGES.items()}
    if smoke:  # Hundreds of questions, and a sentence about every picture.
        places = {key: paths for key, paths in places.items() if key not in ("evaluation", "retained rows' answers")}
        return without_evaluation(settings, places)
    public, _ = demo_split(load_demo_images(), CONCEPT)
    with tempfile.TemporaryDirectory() as folder, watching(places) as clock:
        _, refined = make_anchors(CONCEPT, public, *load_demo_model(), settings, 0)
        erase(CONCEPT, folder, refined, seed=0, settings=settings)
    return clock.seconds


def without_evaluation(settings, places) -> dict[str, float]:
    """Anchors and training alone, on a few retained rows."""
    from demo_runs import demo_trainer, make_anchors

    from space_peft.demo import load_demo_images, load_demo_model
    from space_peft.demo.probes import demo_retain_rows, demo_split

    public, _ = demo_split(load_demo_images(), CONCEPT)
    rows = demo_retain_rows(CONCEPT, public, seed=0)[:16]
    with tempfile.TemporaryDirectory() as folder, watching(places) as clock:
        model, processor = load_demo_model()
        _, refined = make_anchors(CONCEPT, public.select(range(40)), model, processor, settings, 0)
        demo_trainer(CONCEPT, folder, model, processor, refined, settings=settings, retained=rows).train()
    return clock.seconds


def medium(work: Path) -> dict[str, float]:
    """A run of `benchmarks/erase_medium.py` with the library's defaults."""
    import erase_medium
    from medium_runs import known_questions

    known, facts = known_questions(work, 200)
    with watching(STAGES) as clock:
        erase_medium.run((MEDIUM_CONCEPT, [(0, ["default"])], str(work), {}, known, facts))
    return clock.seconds


def on_paper(shape: str) -> dict[str, dict[str, float]]:
    """FLOPs and bytes of a shape of `benchmarks/gpu.py`, and the seconds of an H100 at assumed rates."""
    import scale

    model, plan = scale.planned(shape)
    stages = {name: one for name, one in scale.costs(model, plan).items() if not name.startswith("pool")}
    return {
        "seconds": {name: scale.seconds(one, scale.H100) for name, one in stages.items()},
        "flops": {name: one.flops for name, one in stages.items()},
        "bytes": {name: one.bytes for name, one in stages.items()},
    }


def draw(panels: dict[str, dict[str, float]], path: Path) -> None:
    """A panel for each: the share of every stage that has one in a hundred."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
        for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            total = sum(values.values())
            shares = sorted((100 * value / total, stage) for stage, value in values.items())
            shown = [(share, stage) for share, stage in shares if share >= 1]
            axes.barh([stage for _, stage in shown], [share for share, _ in shown], color=KEEP)
            for place, (share, _) in enumerate(shown):
                axes.text(share + 1, place, f"{share:.0f} %", va="center", color=INK)
            axes.set_title(title)
            axes.set_xlim(0, 1.2 * max(share for share, _ in shown))
            axes.set_xlabel("share, %")
        save_figure(figure, path, dpi=110)


def panels_of(content: dict) -> dict[str, dict[str, float]]:
    panels = {}
    for key, title in (("embedded", "embedded model"), ("medium", "medium model")):
        if key in content:
            panels[f"{title}, measured\n{sum(content[key].values()):.0f} s of CPU"] = content[key]
    paper = content["paper"]
    if "seconds" in paper:
        total = sum(paper["seconds"].values()) / 60
        panels[f"{paper['shape']}, on paper: time on an H100\n{total:.1f} min"] = paper["seconds"]
        panels[f"{paper['shape']}, on paper: FLOPs\n{sum(paper['flops'].values()) / 1e15:.0f} PFLOP"] = paper["flops"]
        panels[f"{paper['shape']}, on paper: bytes\n{sum(paper['bytes'].values()) / 1e12:.0f} TB"] = paper["bytes"]
    return panels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where examples/medium_model has built its model")
    parser.add_argument("--smoke", action="store_true", help="few steps: does it run?")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "where_time_goes.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / "where_time_goes.png")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    shape = "tiny" if args.smoke else "7B"
    # What an earlier run has measured of the medium model stays.
    content = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    content.update(command="python " + " ".join(sys.argv), paper={"shape": shape, **on_paper(shape)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content["embedded"] = embedded(args.smoke)
        if args.work is not None:
            if not (args.work / "model" / "figures.json").exists():
                raise SystemExit(
                    f"{args.work / 'model'} holds no model: run examples/medium_model/join.py --work {args.work}."
                )
            content["medium"] = medium(args.work)
    write_json(args.output, content)
    with tempfile.TemporaryDirectory() as folder:
        draw(panels_of(content), Path(folder) / "figure.png" if args.smoke else args.figure)
    for key in ("embedded", "medium"):
        for stage, value in sorted(content.get(key, {}).items(), key=lambda item: -item[1]):
            print(f"{key:10s} {stage:24s} {value:8.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
