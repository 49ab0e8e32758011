"""`space-peft audit`: the search for an image, from the command line."""

from __future__ import annotations

import argparse

from ..attacks.audit import audit_concept
from ..attacks.report import AttackReport
from ..data.questions import questions_of
from ..null_space.identity import adapter_digest
from ..records.folder import ATTACKS_NAME
from ..records.stages import begin, done, stages
from .attack_run import AttackRun, outcome
from .erased import ErasedModel, check_output, load_attacked, note_result
from .pictures import load_images


def run_audit(args: argparse.Namespace) -> AttackReport:
    """Loads an erased model, audits it, and writes `attacks.json` and its picture to `args.output`.

    What other attacks on the same erasure have put into an `attacks.json` there stays.

    Args:
        args (`argparse.Namespace`): As `space_peft.cli` parses it.

    Returns:
        [`AttackReport`]: With the audit.

    Raises:
        FileNotFoundError: If there is no adapter, or there are no images.
        ValueError: If an image does not decode, or `args.output` holds attacks on another concept, or another adapter.
    """
    run = AttackRun.read(args.output, args.concept)
    images = [] if args.images is None else load_images(args.images)
    with stages(["load", "audit", "save"]):
        begin("load")
        model, processor = load_attacked(args.adapter, args.base_model, dtype=args.dtype)
        erased = ErasedModel(model, processor, adapter=adapter_digest(model))
        check_output(args.output, erased)
        begin("audit")
        result = audit_concept(
            model,
            processor,
            args.concept,
            images=images,
            restarts=args.restarts,
            control_name=args.control_name,
            questions=questions_of(args.question),
            steps=args.steps,
            seed=args.seed,
        )
        report = AttackReport.from_results(args.concept, [result])
        done(outcome(report, result.name))
        begin("save")
        job, kept = None, []
        if (earlier := run.of_the_same(erased)) is not None:
            report = earlier.updated(report)
            # `attack` makes its own audit again: this one was made with other settings.
            job, kept = run.noted.get("job"), [name for name in run.noted.get("done", ()) if name != result.name]
            run.note(erased, job, kept)
        else:
            run.void()
        report.save(args.output)
        run.note(erased, job, kept)
        note_result(args.output, ATTACKS_NAME, erased)
        done(f"saved to {args.output}")
    return report
