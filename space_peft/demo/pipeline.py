"""The whole job on the embedded model: select, refine, erase, evaluate before and after.

`space-peft demo` and `benchmarks/erase_demo.py` are its users; a user's own script does the same with their own model,
pool and retained data (see `examples/`).
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..anchors import refine_anchors, select_anchors, select_random_anchors
from ..config import SpaceLoraConfig
from ..evaluation import ErasureReport, Probe, ProbeResults, evaluate_probes, judge_sentences
from ..modeling.layers import deployed_model
from ..records.card_data import ErasureCardData
from ..records.folder import PICTURES_FOLDER, REPORT_NAME
from ..retained.self_distillation import retained_answers
from . import DEMO_QUESTIONS, load_demo_images, load_demo_model
from .probes import demo_probes, demo_retain_rows, demo_split


if TYPE_CHECKING:
    from ..trainers import SpaceTrainer


@dataclass(frozen=True)
class DemoSettings:
    """Every choice of a run; the defaults are the library's own, and the benchmark's ablations change one each.

    Args:
        selection (`str`, defaults to `"tpas"`): "tpas" (by the name) or "random".
        anchors (`int`, defaults to 32): K.
        refine_steps (`int`, defaults to 60): Steps of refinement; 0 erases on raw anchors.
        threshold (`float`, *optional*): `S_th`, the lowest score of an anchor.
        lowest (`bool`, defaults to `False`): Take anchors from the bottom of the ranking: what a threshold set far
            too low lets in.
        rank (`int`, defaults to 8): r of the adapter; `lora_alpha` is twice that.
        constraint (`str`, defaults to `"soft"`): "soft", "hard" or "none".
        strength (`float`, defaults to 0.03): t of the soft constraint.
        energy (`float`, defaults to 0.999): Share of the trace that the hard constraint protects.
        max_rank (`int` or `"auto"`, *optional*, defaults to `"auto"`): See [`SpaceLoraConfig`].
        tokens_per_row (`int`, *optional*, defaults to 64): See [`SpaceLoraConfig`].
        project_gradient (`bool`, defaults to `True`): See `attach_null_space`.
        training (`dict`): Fields of `SpaceConfig` that differ from its defaults.
    """

    selection: str = "tpas"
    anchors: int = 32
    refine_steps: int = 60
    threshold: float | None = None
    lowest: bool = False
    rank: int = 8
    constraint: Literal["soft", "hard", "none"] = "soft"
    strength: float = 0.03
    energy: float = 0.999
    max_rank: int | Literal["auto"] | None = "auto"
    tokens_per_row: int | None = 64
    project_gradient: bool = True
    training: dict = field(default_factory=dict)


class _BarOnly(ProgressCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        """Says nothing: see `erase`."""


@dataclass
class DemoRun:
    """What a run leaves in memory: `report`, `trainer`, `raw` and `refined` anchors, `probes` and their results."""

    report: ErasureReport
    trainer: SpaceTrainer
    raw: Dataset
    refined: Dataset
    probes: list[Probe]
    before: ProbeResults
    after: ProbeResults


def make_anchors(
    concept: str, pool: Dataset, model, processor, settings: DemoSettings, seed: int, *, progress: bool = True
) -> tuple[Dataset, Dataset]:
    """Selects anchors from the pool and refines them: `(raw, refined)`, the same twice if `refine_steps` is 0."""
    options: dict[str, Any] = {"k": settings.anchors, "progress": progress}
    if settings.selection == "random":
        raw = select_random_anchors(concept, pool, seed=seed, **options)
    else:
        options.update(model=model, processor=processor, cache_dir=False)
        if settings.lowest:
            scored = select_anchors(
                concept, pool, **{**options, "k": len(pool), "diversity": 0.0, "duplicate_threshold": None}
            )
            lowest = sorted(range(len(scored)), key=lambda row: scored[row]["score"])[: settings.anchors]
            raw = scored.select(lowest)
        else:
            raw = select_anchors(concept, pool, threshold=settings.threshold, **options)
    if settings.refine_steps == 0:
        return raw, raw
    refined = refine_anchors(
        raw,
        model=model,
        processor=processor,
        questions=DEMO_QUESTIONS,
        steps=settings.refine_steps,
        seed=seed,
        progress=progress,
    )
    return raw, refined


def demo_retained(concept: str, public: Dataset, model, processor, seed: int, *, progress: bool = True) -> list[dict]:
    """What is retained: labelled rows (`demo_retain_rows`), and a sentence about each public image by the model itself."""
    sentences = retained_answers(
        model, processor, public, questions=DEMO_QUESTIONS.open, per_image=1, names=[concept], progress=progress
    )
    return demo_retain_rows(concept, public, seed=seed) + sentences


def demo_trainer(
    concept: str,
    folder: str | os.PathLike,
    model,
    processor,
    refined: Dataset,
    *,
    seed: int = 0,
    settings: DemoSettings | None = None,
    probes: list[Probe] | None = None,
    retained: list[dict] | None = None,
    progress: bool = True,
):
    """The trainer of an erasure from the embedded model, as `erase` uses it; `refined` are its anchors, `retained` its rows
    (`demo_retained` unless given)."""
    from ..trainers import SpaceConfig, SpaceTrainer  # The trainers stand above this package.

    settings = settings or DemoSettings()
    public, _ = demo_split(load_demo_images(), concept)
    if retained is None:
        retained = demo_retained(concept, public, model, processor, seed, progress=progress)
    options = {
        "seed": seed,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": not progress,
        **settings.training,
    }
    trainer = SpaceTrainer(
        model=model,
        args=SpaceConfig(output_dir=str(folder), **options),
        anchors=refined,
        retain_dataset=retained,
        processing_class=processor,
        peft_config=SpaceLoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            constraint=settings.constraint,
            strength=settings.strength,
            energy=settings.energy,
            max_rank=settings.max_rank,
            tokens_per_row=settings.tokens_per_row,
        ),
        questions=DEMO_QUESTIONS,
        probes=probes,
        card_data=ErasureCardData(
            base_model="space-peft/demo-llava",
            license="apache-2.0",
            language="en",
            reason="A demonstration: the embedded model knows drawings of everyday things, and nobody is harmed by one's name.",
        ),
    )
    assert trainer.null_space is not None  # The adapter is a SpaceLoraConfig's.
    trainer.null_space.project_gradient = settings.project_gradient
    # A line a step is for those who watch training; the demo's reader wants the bar and the result.
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_BarOnly)
    return trainer


def erase(
    concept: str,
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    settings: DemoSettings | None = None,
    before: ProbeResults | None = None,
    anchors: tuple[Dataset, Dataset] | None = None,
    progress: bool = True,
) -> DemoRun:
    """Erases one concept from the embedded model and evaluates it before and after.

    Args:
        concept (`str`): A name the embedded model knows.
        folder (`str` or `os.PathLike`): Trainer's `output_dir`; nothing is saved unless `trainer.save_model()` is called.
        seed (`int`, defaults to 0): Of anchors, adapter, data order and split.
        settings ([`DemoSettings`], *optional*): Defaults unless given.
        before ([`ProbeResults`], *optional*): Results of the unadapted model on the same concept, to save asking again.
        anchors (`tuple[Dataset, Dataset]`, *optional*): Raw and refined anchors made with the same settings and seed.
        progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        [`DemoRun`]
    """
    settings = settings or DemoSettings()
    seconds = {}
    images = load_demo_images()
    public, _ = demo_split(images, concept)  # Refuses an unknown concept, with the nearest names.
    model, processor = load_demo_model()
    probes = demo_probes(concept, images)

    start = time.perf_counter()
    before = before or evaluate_probes(model, processor, probes, progress=progress)
    seconds["evaluate_before"] = time.perf_counter() - start

    start = time.perf_counter()
    raw, refined = anchors or make_anchors(concept, public, model, processor, settings, seed, progress=progress)
    seconds["anchors"] = time.perf_counter() - start

    start = time.perf_counter()
    trainer = demo_trainer(
        concept, folder, model, processor, refined, seed=seed, settings=settings, probes=probes, progress=progress
    )
    trainer.train()
    seconds["erase"] = time.perf_counter() - start

    start = time.perf_counter()
    after = evaluate_probes(trainer.model, processor, probes, baseline=before, progress=progress)
    with deployed_model(trainer.model) as deployed:
        before, after = (judge_sentences(results, probes, deployed, processor) for results in (before, after))
    seconds["evaluate_after"] = time.perf_counter() - start
    report = ErasureReport.from_results(
        concept,
        before,
        after,
        seed=seed,
        settings={**asdict(settings), "steps": trainer.state.global_step},
        seconds={key: round(value, 2) for key, value in seconds.items()},
    )
    return DemoRun(report, trainer, raw, refined, probes, before, after)


def run_demo(concept: str, output: str | os.PathLike, *, seed: int = 0, progress: bool = True) -> ErasureReport:
    """What `space-peft demo` does: `erase`, then writes adapter, certificate, report, card and pictures to `output`.

    Args:
        concept (`str`): A name the embedded model knows.
        output (`str` or `os.PathLike`): Folder; one that a former run wrote is replaced once this run has succeeded.
        seed (`int`, defaults to 0): See `erase`.
        progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        [`ErasureReport`]

    Raises:
        FileExistsError: If `output` holds something that no run of the demo wrote.
    """
    from ..hub_cards import write_card
    from .pictures import draw_pictures

    output = Path(output)
    if output.exists() and any(output.iterdir()) and not (output / REPORT_NAME).exists():
        raise FileExistsError(f"{output} holds files of something else; choose another folder, or empty it.")
    # Built beside it and renamed at the end: an interrupted run leaves what was there.
    building = output.with_name(f".{output.name}.building")
    if building.exists():
        shutil.rmtree(building)
    try:
        run = erase(concept, building, seed=seed, progress=progress)
        run.trainer.save_model()
        run.report.save(building)
        draw_pictures(run, building / PICTURES_FOLDER)
        write_card(building)
        if output.exists():
            shutil.rmtree(output)
        building.rename(output)
    finally:
        if building.exists():
            shutil.rmtree(building)
    return run.report
