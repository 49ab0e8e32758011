"""`space-peft erase`: the whole job from a YAML file, flags, or both; and the options that `anchors` shares."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from datasets import Dataset, load_from_disk
from transformers import HfArgumentParser

from ..config import SpaceLoraConfig
from ..data.loading import load_rows
from ..data.questions import DEFAULT_QUESTIONS, QuestionSet, load_questions
from ..erasing import ANCHORS_FOLDER, AdapterArguments, EraseArguments, Erasure, erase, get_space_config
from ..evaluation.named_images import named_probes, split_by_name
from ..modeling.loading import load_model
from ..null_space.base_statistics import load_statistics
from ..records.stages import begin, done, stages
from ..retained.reading import RetainedRows
from ..several import Erasures, erase_several, request_folder, several_stages
from ..trainers import SpaceConfig
from .options import Help, check_keys
from .pictures import draw_sheet, load_pictures
from .places import ConfigFile, import_modules, model_place


# What `--help` shows of the many options: every one of these, and of the trainer's the ones that are set most.
_SHOWN: dict[str, dict[str, str | None]] = {
    "anchors": {
        **dict.fromkeys(
            ("model", "concept", "aliases", "pool", "questions", "anchors", "refine_steps", "dtype", "fresh")
        ),
        "output_dir": "Folder to write to: anchors/ and a picture of them.",
        "seed": "Of all that has chance in it.",
    },
    "erase": {
        **dict.fromkeys(part.name for part in fields(EraseArguments)),
        **dict.fromkeys(("lora_r", "lora_target_modules", "constraint", "strength")),
        "output_dir": "Folder to write to, a picture of the anchors among it.",
        "target": "Adapted side of the model.",
        "max_steps": "Steps of training.",
        "learning_rate": "Of training.",
        "per_device_train_batch_size": "Rows of a step.",
        "save_strategy": "When to keep checkpoints, to go on from.",
        "use_cpu": "Train on the CPU.",
        "seed": "Of all that has chance in it.",
    },
}
_ABOUT = {
    "anchors": "Find and refine the images that stand in for a concept; `erase` with the same options takes them from there.",
    "erase": "Make a model forget a concept. A call that was killed goes on from where it was.",
}


class _ShortHelp(argparse.Action):
    def __call__(self, parser, *unused):
        for action in parser._actions:
            text = _SHOWN[self.const].get(action.dest, argparse.SUPPRESS)
            if action.dest != argparse.SUPPRESS:
                action.help = text or (action.help if action.dest in _SHOWN[self.const] else argparse.SUPPRESS)
            if any(name.startswith("--no_") for name in action.option_strings):
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def parse_run(
    argv: Sequence[str], config: ConfigFile | None = None, command: str = "erase"
) -> tuple[EraseArguments, AdapterArguments, SpaceConfig]:
    """Options from a file, over which flags win, as in TRL's scripts.

    Args:
        argv (`list[str]`): Arguments after the command's name, without `--config`.
        config ([`ConfigFile`], *optional*): What `--config` names.
        command (`str`, defaults to `"erase"`): "anchors" has the same options, so that one file does for both.

    Raises:
        ValueError: If the file has a key that is no field; the message has the nearest one.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--import", dest="modules", action="append", default=[])
    known, rest = first.parse_known_args(argv)
    values = {} if config is None else dict(config.values)
    named = values.pop("import", [])
    import_modules([*([named] if isinstance(named, str) else named), *known.modules])
    parser = HfArgumentParser(
        (EraseArguments, AdapterArguments, SpaceConfig),
        prog=f"space-peft {command}",
        usage="%(prog)s [--config FILE.yaml] [options]",
        description=_ABOUT[command],
        epilog="--config FILE.yaml: options from a file; flags win. --json FILE: the result; - "
        "prints it. --import MODULE: your model's class. --help-all: all options.",
        formatter_class=Help,
        add_help=False,
    )
    parser.add_argument(
        "--help", "-h", action=_ShortHelp, nargs=0, const=command, dest=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.add_argument("--help-all", action="help", dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
    if config is not None:
        options = {action.dest: action for action in parser._actions if action.dest != argparse.SUPPRESS}
        check_keys(values, options, config.path, command)
        for key, value in values.items():
            options[key].required = False
            if options[key].nargs in ("*", "+"):
                # One alone is a list of one: of a text each letter would be taken for a name.
                values[key] = value if isinstance(value, list) else options[key].default if value is None else [value]
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(rest)


def model_kwargs(arguments: EraseArguments, args: SpaceConfig) -> dict:
    """Arguments of `from_pretrained`."""
    return {**args.init_kwargs, **({} if arguments.dtype is None else {"dtype": arguments.dtype})}


def read_pool(arguments: EraseArguments) -> Dataset:
    """The public images.

    Raises:
        OSError: If they are not there.
        ValueError: If none are named.
    """
    if arguments.pool is None:
        raise ValueError("--pool is missing: public images, of which some stand in for the concept.")
    return load_pictures(arguments.pool)


def read_retained(place: str) -> RetainedRows:
    """What must not change, every row looked at; some may have no answer.

    Args:
        place (`str`): Of `--retain`.

    Raises:
        OSError: If it is not there.
        ValueError: If a row cannot be used.
    """
    try:
        return RetainedRows(load_rows(place), unanswered=True)
    except ValueError as error:
        raise ValueError(f"--retain {place}: {error}") from error


def read_questions(arguments: EraseArguments) -> QuestionSet:
    """What is asked about pictures.

    Raises:
        OSError: If there is no such file.
        ValueError: If it holds no such questions.
    """
    return DEFAULT_QUESTIONS if arguments.questions is None else load_questions(arguments.questions)


def run_erase(argv: Sequence[str], config: ConfigFile | None = None) -> Erasure | Erasures:
    """Parses, erases, saves.

    Args:
        argv (`list[str]`): Arguments after "erase", without `--config`.
        config ([`ConfigFile`], *optional*): What `--config` names.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If an option or a row cannot be used.
    """
    arguments, adapter, args = parse_run(argv, config)
    # Whatever is mistyped shows before the model is loaded.
    questions, config = read_questions(arguments), get_space_config(adapter)
    concepts, aliases = [arguments.concept, *arguments.more_concepts], {arguments.concept: arguments.aliases}
    retain = None if arguments.retain is None else read_retained(arguments.retain)
    if retain is None and arguments.statistics is None:
        raise ValueError(
            "nothing says what must not change: give --retain, rows or pictures alone (the model itself answers them), or "
            "--statistics of the model, which `space-peft stats` makes."
        )
    tested = dict.fromkeys(concepts, arguments.test_images is not None)
    keys = several_stages(concepts, tested, args, config, retain, refined=arguments.refine_steps > 0)
    with stages(["read", "load", *keys, "save"]):
        return _erase(arguments, args, config, questions, retain, concepts, aliases)


def _erase(
    arguments: EraseArguments,
    args: SpaceConfig,
    adapter: SpaceLoraConfig,
    questions: QuestionSet,
    retain: RetainedRows | None,
    concepts: list[str],
    aliases: dict[str, list[str]],
) -> Erasure | Erasures:
    begin("read")
    pool = read_pool(arguments)
    statistics = None if arguments.statistics is None else load_statistics(arguments.statistics)
    pictures = None if arguments.test_images is None else load_pictures(arguments.test_images)
    counts = {"public images": pool, "retained rows": retain, "test pictures": pictures}
    done(f"read {', '.join(f'{len(rows):,} {name}' for name, rows in counts.items() if rows is not None)}")
    probes = None
    if pictures is not None:
        probes = {
            name: named_probes(
                name,
                split_by_name(pictures, name, aliases.get(name, ())),
                questions=questions,
                aliases=aliases.get(name, ()),
            )
            for name in concepts
        }
    options = {
        "pool": pool, "retain_dataset": retain, "statistics": statistics, "questions": questions,
        "k": arguments.anchors,
        "refine_steps": arguments.refine_steps, "args": args, "peft_config": adapter,
        "resume": not arguments.fresh,
    }  # fmt: skip
    begin("load")
    model = load_model(model_place(arguments.model), **model_kwargs(arguments, args))
    if arguments.more_concepts:
        erased = erase_several(model, concepts, aliases=aliases, probes=probes, **options)
        begin("save")
        for number, name in enumerate(concepts, 1):
            place = request_folder(args.output_dir, number)
            if (place / ANCHORS_FOLDER).is_dir():
                draw_sheet(load_from_disk(place / ANCHORS_FOLDER), place, name)
        done(f"saved to {args.output_dir}")
        return erased
    own = None if probes is None else probes[arguments.concept]
    erasure = erase(model, arguments.concept, aliases=arguments.aliases, probes=own, **options)
    begin("save")
    folder = erasure.save()
    draw_sheet(erasure.anchors, folder, arguments.concept)
    done(f"saved to {folder}")
    return erasure
