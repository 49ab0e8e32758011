"""The options of `space-peft erase` and `anchors`, as far as they are not the trainer's. Imports nothing slow.

Enough for their `--help`, and to say what is missing before the seconds that importing the trainer takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..arguments import AdapterArguments, CardArguments, EraseArguments, SelectionArguments
from ..choices import Target, nearest
from .fields import add_fields, from_file, required_fields
from .options import Help
from .places import ConfigFile


OWN = (EraseArguments, AdapterArguments, SelectionArguments, CardArguments)
OUTPUT = "space-output"


@dataclass
class TrainerRows:
    """Of the trainer's many options those that are set most, as `--help` shows them; a test compares them with the trainer's."""

    output_dir: str = field(default=OUTPUT, metadata={"help": "Folder to write to"})
    target: Target = field(default="language", metadata={"help": "Adapted side of the model"})
    max_steps: int = field(default=60, metadata={"help": "Steps of training"})
    learning_rate: float = field(default=4e-3, metadata={"help": "Learning rate of training"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per step"})
    save_strategy: Literal["no", "steps", "epoch", "best"] = field(
        default="steps", metadata={"help": "When to keep checkpoints"}
    )
    save_steps: float = field(default=500, metadata={"help": "Save after every so many steps"})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU"})
    seed: int = field(default=42, metadata={"help": "Random seed"})


# What `--help` shows; `--help-all` has every option.
_SHOWN: dict[str, tuple[str, ...]] = {
    "anchors": (
        "model", "concept", "aliases", "pool", "questions", "anchors", "refine_steps", "dtype", "fresh", "output_dir", "seed",
    ),
    "erase": (
        *(part.name for part in fields(EraseArguments)), "lora_r", "lora_target_modules", "constraint", "strength",
        *(part.name for part in fields(TrainerRows)),
    ),
}  # fmt: skip
_ABOUT = {
    "anchors": "Find and refine the images that stand in for a concept; `erase` with the same options takes them from there.",
    "erase": "Make a model forget a concept. A call that was killed goes on from where it was.",
}
_EPILOG = (
    "--config FILE.yaml: options from a file; flags win. --json FILE: the result; - prints it. --import MODULE: your "
    "model's class. --help-all: all options."
)


def parser_options(command: str) -> dict[str, Any]:
    """Arguments of the parser's constructor.

    Args:
        command (`str`): "erase" or "anchors".
    """
    return {
        "prog": f"space-peft {command}", "usage": "%(prog)s [--config FILE.yaml] [options]", "description": _ABOUT[command],
        "epilog": _EPILOG, "formatter_class": Help, "add_help": False,
        "allow_abbrev": False,
    }  # fmt: skip


def light_parser(command: str, *, shown: bool = False) -> argparse.ArgumentParser:
    """A parser of the options above.

    Args:
        command (`str`): "erase" or "anchors".
        shown (`bool`, defaults to `False`): Whether it has those alone that `--help` shows.
    """
    parser = argparse.ArgumentParser(**parser_options(command))
    for kind in (*OWN, TrainerRows):
        add_fields(parser, kind, only=_SHOWN[command] if shown else None)
    return parser


class _ShortHelp(argparse.Action):
    def __call__(self, parser, *unused):
        light_parser(self.const, shown=True).print_help()
        parser.exit()


def add_help(parser: argparse.ArgumentParser, command: str) -> None:
    """Adds the option `--help`, which prints those that are set most."""
    parser.add_argument(
        "--help", "-h", action=_ShortHelp, nargs=0, const=command, dest=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def given_options(command: str, argv: Sequence[str], config: ConfigFile | None) -> dict[str, Any]:
    """What flags and file say of these options; prints the help, if that is asked for, and ends.

    Args:
        command (`str`): "erase" or "anchors".
        argv (`list[str]`): Arguments after the command's name, without `--config`.
        config ([`ConfigFile`], *optional*): What `--config` names.

    Raises:
        ValueError: If one that is needed is missing, or a value of the file is none of the choices.
    """
    parser = light_parser(command)
    add_help(parser, command)
    parser.add_argument("--help-all", action="store_true")
    given: dict[str, Any] = {}
    others: list[str] = []
    if config is not None:
        options = {action.dest: action for action in parser._actions}
        known = {key: value for key, value in config.values.items() if key in options and value is not None}
        given = from_file(known, options, config.path)
        others = [str(key) for key in config.values if key not in options]
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # So that what is not given is not there.
    flags, rest = parser.parse_known_args(argv)
    given |= vars(flags)
    if not given.pop("help_all", False):  # That is for the parser that has them all.
        _check_complete(command, set(given), [*others, *rest])
    return given


def _check_complete(command: str, given: set[str], others: Sequence[str]) -> None:
    """Refuses a call without what is needed; among what is not known here, its misspelt name is looked for."""
    missing = [f"--{name}" for name in required_fields(EraseArguments) if name not in given]
    if command == "erase" and not given & {"retain", "statistics"}:
        missing.append("--retain or --statistics")
    if not missing:
        return
    if missing == ["--retain or --statistics"]:
        raise ValueError(
            "nothing says what must not change: give --retain (rows, or pictures alone, about which the model itself is "
            "asked), or --statistics of the model, which `space-peft stats` makes."
        )
    for key in others:
        if near := nearest(f"--{key}" if key[:2] != "--" else key, missing, cutoff=0.8):
            raise ValueError(f"{key!r} is not an option; did you mean {near[0]}?")
    raise ValueError(
        f"missing: {', '.join(missing)} (or in the file of --config); space-peft {command} --help says what they are."
    )
