"""`space-peft evaluate` and `space-peft attack`: their options, and what they print. Imports nothing slow."""

from __future__ import annotations

import argparse

from .errors import bad_input
from .options import tell


def add_judging(commands) -> None:
    """Adds both commands.

    Args:
        commands (`argparse._SubParsersAction`): Of the command line.
    """
    evaluate = commands.add_parser("evaluate", help="ask an erased model about pictures, before and after")
    _add_erased(evaluate)
    evaluate.add_argument(
        "--siblings", nargs="+", default=[], metavar="NAME", help="names of similar things among the pictures"
    )
    evaluate.add_argument("--batch-size", type=int, default=32, help="questions at once (default: 32)")
    evaluate.add_argument("--output", default="outputs/evaluate", help="folder to write to (default: outputs/evaluate)")
    evaluate.set_defaults(run=_evaluate)
    attack = commands.add_parser("attack", help="try to get the concept back in every way the library knows")
    _add_erased(attack)
    attack.add_argument("--attacks", nargs="+", metavar="ATTACK", help="only these (default: all)")
    attack.add_argument(
        "--control-names", nargs="+", metavar="NAME", help="known names to compare with (default: from the pictures)"
    )
    attack.add_argument("--steps", type=int, default=100, help="steps of a search from each start (default: 100)")
    attack.add_argument("--restarts", type=int, default=4, help="starts of the audit from noise (default: 4)")
    attack.add_argument(
        "--relearn-steps",
        nargs="+",
        type=int,
        default=[0, 2, 5, 10, 20],
        help="numbers of fine-tuning steps (default: 0 2 5 10 20)",
    )
    attack.add_argument("--repeats", type=int, default=3, help="runs of what is random (default: 3)")
    attack.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    attack.add_argument("--fresh", action="store_true", help="start again, ignoring what an interrupted call left")
    attack.add_argument("--output", default="outputs/attack", help="folder to write to (default: outputs/attack)")
    attack.set_defaults(run=_attack)


def _add_erased(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", metavar="PLACE", help="folder or Hub id of the adapter")
    which.add_argument("--merged", metavar="PLACE", help="instead: folder or Hub id of the merged model")
    parser.add_argument("--base-model", metavar="PLACE", help="the original (default: the one the adapter records)")
    parser.add_argument("--concept", required=True, metavar="NAME", help="the erased name")
    parser.add_argument("--aliases", nargs="+", default=[], metavar="NAME", help="other names for it")
    parser.add_argument(
        "--images", required=True, metavar="DATA", help="pictures: a folder, a file, a Hub id; named in column `name`"
    )
    parser.add_argument("--question", help="question that asks for the name (default: the library's questions)")


def _evaluate(args: argparse.Namespace) -> int:
    from .evaluate import run_evaluate

    with bad_input("evaluate", TypeError):
        report = run_evaluate(args)
    said = {
        "erased": "erased",
        "not known before": "nothing shown: the original model does not name it on these pictures either",
    }.get(report.verdict, "not erased")
    text = f"{report.to_table()}\n\nReport and every answer are in {args.output}\n{said}"
    tell(args, text, {**report.to_dict(), "verdict": report.verdict})
    return 0 if report.verdict == "erased" else 1


def _attack(args: argparse.Namespace) -> int:
    from .attack import run_attack

    with bad_input("attack", TypeError):
        report, left_out = run_attack(args)
    lines = [report.to_table(), *(f"left out: {name}, {why}" for name, why in left_out.items())]
    lines.append(
        f"\nThe report with its picture is in {args.output}. Lower is better; a value no higher than its control means nothing."
    )
    tell(args, "\n".join(lines), {**report.to_dict(), "left_out": left_out})
    return 0
