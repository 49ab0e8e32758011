"""Erased or muted: the attacks of `space_peft.attacks` on one erased model."""

from __future__ import annotations

import functools

from .answers import demo_processor, encoded_batches, named


AUDIT_STARTS = 8
RELEARN_IMAGES, RELEARN_STEPS, RELEARN_REPEATS = 3, (0, 2, 5, 10), 2


def _audit(model, concept: str, seed: int, steps: int) -> float:
    """The largest p(name) of an image found from public ones."""
    from space_peft.attacks import audit_concept
    from space_peft.demo import DEMO_QUESTIONS
    from space_peft.demo.probes import demo_split

    from .images import demo_images

    public, _ = demo_split(demo_images(), concept)
    step = len(public) // AUDIT_STARTS
    starts = list(public.select(range(seed, step * AUDIT_STARTS, step))["image"])
    options = {"restarts": 0, "steps": steps, "seed": seed, "progress": False, "questions": DEMO_QUESTIONS}
    return audit_concept(model, demo_processor(), concept, images=starts, **options).after.best


@functools.lru_cache(maxsize=4)
def _audit_before(concept: str, seed: int, steps: int) -> float:
    from space_peft.demo import load_demo_model

    return _audit(load_demo_model()[0], concept, seed, steps)


def measure_depth(model, processor, data, seed: int, audit_steps: int, *, quick: bool = False) -> dict:
    """The depth columns of one run; `quick`: relearned once, with one name as the control.

    Returns:
        `dict`: `audit`, `audit_before`: largest p(name) of an image found; `relearn`, `relearn_control` (all weights of
        the merged model fine-tuned) and `relearn_adapter`, `relearn_adapter_control` (the adapter itself, as in the
        feasibility study): named unseen images of the target after ten steps on three; `curves` of both;
        `confirm`, `confirm_control`: p(yes) about images of the target, for it and for names of what is not there;
        `full`, `int8`, `int4`: named images of the target in the merged model at that precision.
    """
    from space_peft.attacks import confirmation_attack, relearning_curve
    from space_peft.attacks.models import merged_copy
    from space_peft.attacks.quantization import quantize_weights
    from space_peft.demo import DEMO_QUESTIONS

    options = {"questions": DEMO_QUESTIONS}
    merged = merged_copy(model)
    target = [*data.given, *data.unseen]
    relearning = {
        weights: relearning_curve(
            model, processor, target, None, data.concept, other_names=data.absent[: 1 if quick else 3], weights=weights,
            learning_rate=rate, steps=RELEARN_STEPS, images_per_run=(RELEARN_IMAGES,), repeats=1 if quick else RELEARN_REPEATS,
            seed=seed, progress=False, **options,
        )
        for weights, rate in (("all", None), ("adapter", 1e-3))
    }  # fmt: skip
    confirmation = confirmation_attack(
        merged, processor, data.unseen, data.concept, absent_names=data.absent, **options
    ).summary()
    images = encoded_batches(data.concept, seed)["target"]
    precision = {"full": merged}
    for scheme in ("int8", "int4"):
        precision[scheme] = quantize_weights(merged_copy(model), scheme)
    points = {weights: result.headline for weights, result in relearning.items()}
    shares = {key: named(copy, images) for key, copy in precision.items()}
    return {
        "audit": round(_audit(merged, data.concept, seed, audit_steps), 4),
        "audit_before": round(_audit_before(data.concept, seed, audit_steps), 4),
        "relearn": round(points["all"].relearned, 4),
        "relearn_control": round(points["all"].control, 4),
        "relearn_adapter": round(points["adapter"].relearned, 4),
        "relearn_adapter_control": round(points["adapter"].control, 4),
        "curves": {
            weights: [[p.steps, round(p.relearned, 4), round(p.control, 4)] for p in result.points]
            for weights, result in relearning.items()
        },
        "confirm": round(confirmation["value"], 4),
        "confirm_control": round(confirmation["control"], 4),
        **{key: round(sum(hits) / len(hits), 4) for key, hits in shares.items()},
    }
