"""`space-peft stats`: statistics of a base model, made once."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoProcessor

from ..data.loading import load_rows
from ..hub_cards import push_statistics
from ..modeling.loading import load_model
from ..null_space.base_statistics import Statistics
from ..null_space.collecting import collect_statistics
from ..records.stages import begin, done, stages
from ..retained.reading import RetainedRows
from ..retained.self_distillation import answer_missing
from .places import model_place


# Beside the statistics while they are made; a call that was killed goes on from there.
_SUMS = ".{name}.sums.safetensors"
_ANSWERS = ".{name}.answers.jsonl"


def run_stats(args: argparse.Namespace) -> Statistics:
    """Loads model and rows, collects, writes, and publishes if asked to.

    Args:
        args (`argparse.Namespace`): Of the command.

    Raises:
        FileExistsError: If the output folder holds something else.
        ValueError: If a row cannot be used, or the model is no multimodal one.
    """
    output = Path(args.output)
    Statistics.check_folder(output)
    rows = RetainedRows(load_rows(args.data), unanswered=True)
    place, answers = model_place(args.model), output.with_name(_ANSWERS.format(name=output.name))
    with stages(["read", "load", *(["retain"] if rows.unanswered else []), "collect"]):
        begin("read")
        done(f"read {len(rows):,} retained rows")
        begin("load")
        model = load_model(place, args.device, **({"dtype": args.dtype} if args.dtype else {}))
        processor = AutoProcessor.from_pretrained(place)
        rows = answer_missing(model, processor, rows, batch_size=args.batch_size, cache=answers)
        begin("collect")
        statistics = collect_statistics(
            model,
            processor,
            rows,
            batch_size=args.batch_size,
            tokens_per_row=args.tokens_per_row,
            save_to=output.with_name(_SUMS.format(name=output.name)),
        )
        statistics.save(output)
        done(f"collected statistics of {len(statistics)} layers")
    answers.unlink(missing_ok=True)
    if args.push:
        push_statistics(statistics, args.push)
    return statistics
