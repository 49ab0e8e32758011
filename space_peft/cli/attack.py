"""`space-peft attack`: all attacks on one erasure, one after the other, in one report."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict

from ..attacks.kinds import KINDS, check_attacks
from ..attacks.material import Material
from ..attacks.report import AttackReport
from ..data.pictures import load_rgb
from ..data.questions import questions_of
from ..data.seed_images import pixel_hash
from ..evaluation.named_images import NamedImages
from ..records.folder import ATTACKS_NAME
from ..records.io import json_text
from ..records.safe_json import parse_json
from ..records.stages import begin, done, stages
from .attack_run import AttackRun, outcome
from .erased import ErasedModel, check_output, load_judged, named_pictures, note_result


def run_attack(args: argparse.Namespace) -> tuple[AttackReport, dict[str, str]]:
    """Makes the attacks that can be made, each saved as soon as it is done; what an earlier call of the same job did is kept.

    Args:
        args (`argparse.Namespace`): As `space_peft.cli` parses it.

    Returns:
        `tuple[AttackReport, dict[str, str]]`: The report, and the attacks that were left out with the reason.

    Raises:
        OSError: If there is no such model, or are no such pictures.
        ValueError: If a picture, name or attack is none, or `args.output` holds attacks on something else.
    """
    names, run = check_attacks(args.attacks), AttackRun.read(args.output, args.concept)
    pictures = named_pictures(args)
    material = Material(
        args.concept, pictures, aliases=tuple(args.aliases), control_names=tuple(args.control_names or ()),
        questions=questions_of(args.question), steps=args.steps, restarts=args.restarts,
        relearn_steps=tuple(args.relearn_steps), repeats=args.repeats, seed=args.seed,
    )  # fmt: skip
    reasons = {name: KINDS[name].needs.lacks(material) for name in names}
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    if left_out and (args.attacks is not None or len(left_out) == len(names)):
        # One that was asked for by name is not passed over.
        raise ValueError("; ".join(f"{name} is left out, {why}" for name, why in left_out.items()))
    names = [name for name in names if name not in left_out]
    with stages(["load", *["attack"] * len(names), "save"]):
        begin("load")
        erased = load_judged(args, original=False)
        check_output(args.output, erased)
        job = _job(erased, material)
        report = None if args.fresh else run.of_the_same_job(job)
        made_before = set() if report is None else set(report.attacks)
        if report is None:
            run.void()
        for name in names:
            begin("attack", name.replace("_", " "))
            if report is None or name not in made_before:
                made = AttackReport.from_results(
                    args.concept, [KINDS[name].make(erased.model, erased.processor, material)]
                )
                report = made if report is None else report.updated(made)
                report.save(args.output, picture=False)
                # Last: what it does not list is made again.
                run.note(erased, job, report.attacks)
                note_result(args.output, ATTACKS_NAME, erased)
            done(outcome(report, name) + (", made by an earlier call" if name in made_before else ""))
        begin("save")
        assert report is not None  # One attack at least was made, now or before.
        report.save(args.output)
        done(f"saved to {args.output}")
    return report, left_out


def _job(erased: ErasedModel, material: Material) -> dict:
    """Everything that results depend on, as JSON gives it back."""
    settings = {key: value for key, value in vars(material).items() if key not in ("images", "questions", "progress")}
    job = {
        "erased": erased.identity(),
        "pictures": _pictures_digest(material.images),
        "questions": {key: [str(part) for part in value] for key, value in asdict(material.questions).items()},
        **settings,
    }
    return parse_json(json_text(job).encode(), where="the job")


def _pictures_digest(images: NamedImages) -> str:
    shown = [("", image) for image in images.target] + list(images.others)
    parts = "\n".join(f"{pixel_hash(load_rgb(image))} {name}" for name, image in shown)
    return hashlib.sha256(parts.encode()).hexdigest()
