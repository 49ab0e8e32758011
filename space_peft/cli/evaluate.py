"""`space-peft evaluate`: an erased model is asked about pictures that the user has."""

from __future__ import annotations

import argparse
import time

from ..data.questions import questions_of
from ..evaluation.before_after import evaluate_erasure
from ..evaluation.named_images import named_probes
from ..evaluation.report import ErasureReport
from ..records.folder import REPORT_NAME
from ..records.stages import begin, done, stages
from .erased import check_merged, check_output, load_judged, named_pictures, note_result


def run_evaluate(args: argparse.Namespace) -> ErasureReport:
    """Asks, scores, and writes the report and every answer to `args.output`.

    Args:
        args (`argparse.Namespace`): As `space_peft.cli` parses it.

    Raises:
        OSError: If there is no such model, or are no such pictures.
        ValueError: If a picture or name cannot be used, or `args.output` holds another adapter.
    """
    check_merged(args)
    with stages(["read", "load", "evaluate"]):
        begin("read")
        pictures, questions = named_pictures(args), questions_of(args.question)
        probes = named_probes(args.concept, pictures, questions=questions, aliases=args.aliases, siblings=args.siblings)
        done(f"read {len(pictures.target)} pictures of {args.concept!r} and {len(pictures.others)} others")
        begin("load")
        erased = load_judged(args)
        check_output(args.output, erased)
        begin("evaluate")
        start = time.perf_counter()
        before, after = evaluate_erasure(
            erased.model, erased.processor, probes, original=erased.original, batch_size=args.batch_size
        )
        named = [f"{result.scores['forget']['value']:.0%}" for result in (before, after)]
        done(f"evaluated: {args.concept!r} named on {named[0]} of its pictures before, on {named[1]} after")
    report = ErasureReport.from_results(
        args.concept,
        before,
        after,
        settings={
            "evaluated": args.adapter or args.merged,
            "base_model": args.base_model,
            "images": {"of": args.images, "target": len(pictures.target), "others": len(pictures.others)},
            "aliases": list(args.aliases),
            "siblings": list(args.siblings),
            "question": args.question,
            "identity": erased.identity(),
        },
        seconds={"evaluate": round(time.perf_counter() - start, 2)},
    )
    report.save(args.output)
    note_result(args.output, REPORT_NAME, erased)
    return report
