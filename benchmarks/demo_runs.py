"""Erasures from the embedded model in which one choice is another than the library's, and of which all is measured."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback

from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer
from space_peft.anchors import refine_anchors, select_anchors, select_random_anchors
from space_peft.demo import DEMO_QUESTIONS, load_demo_images, load_demo_model
from space_peft.demo.pipeline import demo_retained
from space_peft.demo.probes import demo_probes, demo_split
from space_peft.evaluation import ErasureReport, ProbeResults
from space_peft.evaluation.before_after import evaluate_erasure


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
        strength (`float`, defaults to 0.003): t of the soft constraint.
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
    strength: float = 0.003
    energy: float = 0.999
    max_rank: int | Literal["auto"] | None = "auto"
    tokens_per_row: int | None = 64
    project_gradient: bool = True
    training: dict = field(default_factory=dict)


@dataclass
class DemoRun:
    """What a run leaves in memory: `report`, `trainer`, and what the original model answered."""

    report: ErasureReport
    trainer: SpaceTrainer
    before: ProbeResults


def make_anchors(
    concept: str, pool: Dataset, model, processor, settings: DemoSettings, seed: int
) -> tuple[Dataset, Dataset]:
    """Selects anchors from the pool and refines them: `(raw, refined)`, the same twice if `refine_steps` is 0."""
    options: dict[str, Any] = {"k": settings.anchors, "progress": False}
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
        progress=False,
    )
    return raw, refined


def demo_trainer(
    concept: str,
    folder: str | os.PathLike,
    model,
    processor,
    refined: Dataset,
    *,
    seed: int = 0,
    settings: DemoSettings,
    retained: list[dict] | None = None,
) -> SpaceTrainer:
    """The trainer of an erasure from the embedded model; `refined` are its anchors, `retained` its rows (`demo_retained`
    unless given)."""
    public, _ = demo_split(load_demo_images(), concept)
    if retained is None:
        retained = demo_retained(concept, public, model, processor, seed, progress=False)
    options = {
        "seed": seed, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, **settings.training,
    }  # fmt: skip
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
    )
    assert trainer.null_space is not None  # The adapter is a SpaceLoraConfig's.
    trainer.null_space.project_gradient = settings.project_gradient
    trainer.remove_callback(PrinterCallback)
    return trainer


def erase(
    concept: str,
    folder: str | os.PathLike,
    refined: Dataset,
    *,
    seed: int,
    settings: DemoSettings,
    before: ProbeResults | None = None,
    every: int = 1,
) -> DemoRun:
    """Erases one concept from the embedded model and evaluates it before and after; saves nothing.

    Args:
        concept (`str`): A name the embedded model knows.
        folder (`str` or `os.PathLike`): Trainer's `output_dir`.
        refined ([`~datasets.Dataset`]): Anchors, from `make_anchors` with the same settings and seed.
        seed (`int`): Of adapter, data order and split.
        settings ([`DemoSettings`]): What is chosen.
        before ([`ProbeResults`], *optional*): Of an earlier run on the same concept, to save asking again.
        every (`int`, defaults to 1): Ask each `every`-th row of a probe.
    """
    model, processor = load_demo_model()
    probes = [replace(probe, rows=list(probe.rows)[::every]) for probe in demo_probes(concept, load_demo_images())]
    start = time.perf_counter()
    trainer = demo_trainer(concept, folder, model, processor, refined, seed=seed, settings=settings)
    trainer.train()
    erased = time.perf_counter()
    before, after = evaluate_erasure(trainer.model, processor, probes, baseline=before, progress=False)
    seconds = {"erase": erased - start, "evaluate": time.perf_counter() - erased}
    report = ErasureReport.from_results(
        concept,
        before,
        after,
        seed=seed,
        settings={**asdict(settings), "steps": trainer.state.global_step},
        seconds={key: round(value, 2) for key, value in seconds.items()},
    )
    return DemoRun(report, trainer, before)
