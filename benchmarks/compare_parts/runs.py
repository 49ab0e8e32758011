"""One erasure by one method, and what is measured of it. Runs in worker processes, one torch thread each."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from demo_runs import DemoSettings, make_anchors
from peft.helpers import rescale_adapter_scale
from transformers.trainer_callback import PrinterCallback

from space_peft import trainers
from space_peft.anchors.info import set_anchor_info
from space_peft.attacks.models import merged_copy
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.demo.pipeline import demo_retained
from space_peft.demo.probes import demo_probes, demo_split
from space_peft.evaluation import evaluate_probes
from space_peft.modeling.layers import adapted_layers
from space_peft.modeling.targets import side_of
from space_peft.trainers.concept_projection import project_concept

from .answers import answers, answers_before, demo_processor, embedded_batches, encoded_batches, share
from .depth import measure_depth
from .features import feature_entropy
from .images import concept_data, demo_images
from .methods import method_of
from .recipes import adapter, config_class, options


SCALES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""What the finished adapter is multiplied by: a method's trade-off from one run. Small ones for methods that overshoot."""


def run(task: dict, max_steps: int) -> dict:
    """Erases and measures.

    Args:
        task (`dict`): `method`, `settings`, `concept`, `seed`, and what to measure beside the curve: `probes`, `depth`,
            `features`; `every`, for a smoke run: one row in so many of each probe, and the curve's ends alone.
        max_steps (`int`): Of the erasure.

    Returns:
        `dict`: The task with `curve`, `seconds`, `steps` and, where asked for, `scores`, `depth` and `entropy`.
    """
    torch.set_num_threads(1)
    data = concept_data(task["concept"], task["seed"])
    start = time.perf_counter()
    method = method_of(task["method"])
    needs_anchors = method.trainer == "SpaceTrainer" and not method.sees_images
    anchors = _anchors(task["concept"], task["seed"]) if needs_anchors else None
    prepared = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model, steps = _erase(task, data, anchors, folder, max_steps)
    done = time.perf_counter()
    row = {
        **task,
        "steps": steps,
        "curve": _curve(model, data, task["seed"], SCALES[:: len(SCALES) - 1 if "every" in task else 1]),
    }
    row["seconds"] = {"anchors": round(prepared - start, 1), "erase": round(done - prepared, 1)}
    if task["probes"]:
        row["scores"] = _probe_scores(model, task["concept"], task["seed"], task.get("every", 1))
    if task.get("features"):
        row["entropy"] = feature_entropy(merged_copy(model), data, anchors)
    if task["depth"]:
        row["depth"] = measure_depth(
            model, demo_processor(), data, task["seed"], audit_steps=max_steps, quick="every" in task
        )
    return row


@functools.lru_cache(maxsize=2)
def _anchors(concept: str, seed: int):
    public, _ = demo_split(demo_images(), concept)
    return make_anchors(concept, public, *load_demo_model(), DemoSettings(), seed)[1]


@functools.lru_cache(maxsize=2)
def _retained(concept: str, seed: int) -> list[dict]:
    public, _ = demo_split(demo_images(), concept)
    return demo_retained(concept, public, *load_demo_model(), seed, progress=False)


def _real_anchors(data):
    """Images of the target in the place of anchors."""
    rows = {"image": data.given, "score": [1.0] * len(data.given)}
    dataset = Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "score": Value("float64")}))
    return set_anchor_info(dataset, {"concept": data.concept})


def _erase(task: dict, data, anchors, folder: str, max_steps: int):
    """The erased model and the optimiser steps it took."""
    method, concept, seed = method_of(task["method"]), task["concept"], task["seed"]
    model, processor = load_demo_model()
    if method.trainer is None:
        return project_concept(model, processor, concept, **task["settings"]).eval(), 0
    trainer_class = getattr(trainers, method.trainer)
    args = config_class(method)(
        folder, seed=seed, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, canary_items=0,
        **{**options(method, max_steps), **task["settings"]},
    )  # fmt: skip
    if method.trainer == "SpaceTrainer":
        examples = {"anchors": _real_anchors(data) if method.sees_images else anchors}
    else:
        examples = {"forget_dataset": [{"image": image} for image in data.given]}
    trainer = trainer_class(
        model,
        args,
        retain_dataset=_retained(concept, seed),
        processing_class=processor,
        peft_config=adapter(method),
        concept=concept,
        questions=DEMO_QUESTIONS,
        **examples,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model.eval(), trainer.state.global_step


def _curve(model, data, seed: int, scales: Sequence[float]) -> list[dict]:
    """What each scale of the adapter forgets and keeps.

    Retention counts images that the deployed model named. `divergence` is finer: the mean KL divergence of the answers'
    first token about all other images, from the deployed model's.
    """
    sees = any(side_of(name) == "vision" for name in adapted_layers(model))
    batches = (encoded_batches if sees else embedded_batches)(data.concept, seed)
    before = answers_before(data.concept, seed)
    known, log_p = before["others"].named, before["others"].first
    kept = {
        "retain_all": known,
        "retain": [k and not style for k, style in zip(known, data.is_unseen_style, strict=True)],
        "retain_unseen_style": [k and style for k, style in zip(known, data.is_unseen_style, strict=True)],
        "siblings": [k and sibling for k, sibling in zip(known, data.is_sibling, strict=True)],
    }
    points = []
    for scale in scales:
        after = before
        if scale > 0:
            with rescale_adapter_scale(model, scale):
                merged = merged_copy(model)  # Faster than asking through the adapter.
            after = {key: answers(merged, own) for key, own in batches.items()}
        target, others = after["target"], after["others"]
        point = {"scale": scale, "forget": sum(target.named) / len(target.named)}
        for key, counts in kept.items():
            point[key] = share(others.named, counts)
        point["name_log_prob"] = target.name_log_prob.mean().item()
        point["divergence"] = (log_p.exp() * (log_p - others.first)).sum(dim=-1).mean().item()
        points.append({key: round(value, 5) for key, value in point.items()})
    return points


@functools.lru_cache(maxsize=4)
def _asked_before(concept: str, seed: int, every: int):
    """The probes, and what the deployed model answers."""
    probes = demo_probes(concept, concept_data(concept, seed).probe_images)
    probes = [replace(probe, rows=list(probe.rows)[::every]) for probe in probes]
    return probes, evaluate_probes(*load_demo_model(), probes, progress=False)


def _probe_scores(model, concept: str, seed: int, every: int) -> dict[str, float | None]:
    """The library's own report on the images that no method was given; of the merged model, which answers faster."""
    probes, before = _asked_before(concept, seed, every)
    after = evaluate_probes(merged_copy(model), demo_processor(), probes, baseline=before, progress=False)
    return {key: None if s["value"] is None else round(s["value"], 4) for key, s in after.scores.items()}
