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


# Beside the statistics while they are made; a call that was killed goes on from there.
_SUMS = ".{name}.sums.safetensors"


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
    rows = load_rows(args.data)
    model = load_model(args.model, args.device, **({"dtype": args.dtype} if args.dtype else {}))
    statistics = collect_statistics(
        model,
        AutoProcessor.from_pretrained(args.model),
        rows,
        batch_size=args.batch_size,
        tokens_per_row=args.tokens_per_row,
        save_to=output.with_name(_SUMS.format(name=output.name)),
    )
    statistics.save(output)
    if args.push:
        push_statistics(statistics, args.push)
    return statistics
