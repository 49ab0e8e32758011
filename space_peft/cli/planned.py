"""`space-peft plan`: its options, which are those of `erase` as far as they count. Imports nothing slow."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ..arguments import AdapterArguments
from ..choices import DEVICES, DTYPES, TARGETS
from .erase_options import light_parser
from .errors import bad_input
from .fields import add_fields
from .options import tell


# Of the adapter's options, those that help shows, as it spells them.
_SPELLED = {
    "lora_r": "--rank", "lora_target_modules": "--target-modules", "constraint": "--constraint", "strength": "--strength",
    "max_rank": "--max-rank", "tokens_per_row": "--tokens-per-row",
}  # fmt: skip


def add_plan(commands) -> None:
    """Adds the command.

    Args:
        commands (`argparse._SubParsersAction`): Of the command line.
    """
    plan = commands.add_parser(
        "plan",
        help="say what an erasure would take; a model's config is enough",
        epilog="It takes the same file as `erase`, and the same names of options: --lora_r is --rank.",
    )
    plan.add_argument("model", help="folder with a config.json, or Hub id; demo: the embedded model")
    plan.add_argument("--target", choices=TARGETS, default="language", help="adapted side (default: language)")
    add_fields(plan, AdapterArguments, only=_SPELLED, spelled=_SPELLED)
    others = [part.name for part in fields(AdapterArguments) if part.name not in _SPELLED]
    add_fields(plan, AdapterArguments, only=others, hidden=True)
    plan.add_argument("--rows", type=int, default=1000, help="retained rows (default: 1000)")
    plan.add_argument("--row-tokens", type=int, metavar="N", help="tokens per row (default: its picture's and 64)")
    plan.add_argument(
        "--image-tokens", type=int, metavar="N", help="tokens of a row's picture (default: from the config)"
    )
    plan.add_argument("--steps", "--max-steps", "--max_steps", type=int, default=60, help="training steps")
    plan.add_argument(
        "--batch-size", "--per-device-train-batch-size", "--per_device_train_batch_size", type=int, default=16,
        help="rows per step",
    )  # fmt: skip
    plan.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: as saved; float32 on a CPU)")
    plan.add_argument("--device", choices=DEVICES, help="where it is to run (default: a GPU)")
    plan.add_argument(
        "--use_cpu", "--use-cpu", dest="device", action="store_const", const="cpu", help=argparse.SUPPRESS
    )
    plan.add_argument(
        "--time", action="store_true", help="load the weights, time a step, and say how long it would take"
    )
    plan.set_defaults(run=_plan)


def is_of_erase(key: str) -> bool:
    """Whether a key of a file is an option of `erase`, which a plan may pass over.

    Args:
        key (`str`): That is none of its own.
    """
    if key in {action.dest for action in light_parser("erase")._actions}:
        return True
    from ..trainers import SpaceConfig  # The trainer's many: importing them takes seconds.

    return key in {part.name for part in fields(SpaceConfig)}


def _plan(args: argparse.Namespace) -> int:
    from .plan import no_gpu, plan_table, run_plan

    with bad_input("plan"):
        plan, refused = run_plan(args)
    parts = [] if plan is None else [plan_table(plan), *filter(None, [no_gpu(args)])]
    text = "\n\n".join([*parts, *(f"would be refused: {reason}" for reason in refused)])
    tell(args, text, {"refused": refused} if plan is None else plan.to_dict())
    return 1 if refused else 0
