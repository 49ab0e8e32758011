"""`space-peft erase`: the whole job from a YAML file, flags, or both; and the options that `anchors` shares."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from datasets import load_from_disk
from transformers import HfArgumentParser

from ..arguments import (
    AdapterArguments,
    CardArguments,
    EraseArguments,
    SelectionArguments,
    get_selection,
    get_space_config,
)
from ..config import SpaceLoraConfig
from ..data.loading import load_rows
from ..data.questions import DEFAULT_QUESTIONS, QuestionSet, load_questions
from ..erasing import ANCHORS_FOLDER, Erasure, erase
from ..evaluation.named_images import named_probes, split_by_name
from ..modeling.loading import load_model
from ..null_space.base_statistics import load_statistics
from ..records.card_data import ErasureCardData
from ..records.stages import begin, done, stages
from ..retained.reading import RetainedRows
from ..several import Erasures, erase_several, request_folder, several_stages
from ..trainers import SpaceConfig
from .erase_options import OUTPUT, OWN, TrainerRows, add_help, parser_options
from .fields import add_fields, from_file
from .options import check_keys, refuse_unknown
from .pictures import draw_sheet, load_pictures
from .places import EMBEDDED, ConfigFile, import_modules, model_place


class Run(NamedTuple):
    """What is told beside the trainer's configuration, in the order of `OWN`."""

    job: EraseArguments
    adapter: AdapterArguments
    selection: SelectionArguments
    card: CardArguments


def parse_run(argv: Sequence[str], config: ConfigFile | None = None, command: str = "erase") -> tuple[Run, SpaceConfig]:
    """Options from a file, over which flags win, as in TRL's scripts.

    What is missing has been said by `given_options`.

    Args:
        argv (`list[str]`): Arguments after the command's name, without `--config`.
        config ([`ConfigFile`], *optional*): What `--config` names.
        command (`str`, defaults to `"erase"`): "anchors" has the same options, so that one file does for both.

    Raises:
        ValueError: If there is no such option; the message has the nearest one.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--import", dest="modules", action="append", default=[])
    known, rest = first.parse_known_args(argv)
    values = {} if config is None else dict(config.values)
    named = values.pop("import", [])
    import_modules([*([named] if isinstance(named, str) else named), *known.modules])
    parser = full_parser(command)
    if config is not None:
        options = {action.dest: action for action in parser._actions if action.dest != argparse.SUPPRESS}
        check_keys(values, options, config.path, command)
        parser.set_defaults(**from_file(values, options, config.path))
    args, told, left = parser.parse_args_into_dataclasses(rest, return_remaining_strings=True, look_for_args_file=False)
    refuse_unknown(left, parser, command)
    own: list[Any] = [kind(**{part.name: getattr(told, part.name) for part in fields(kind)}) for kind in OWN]
    return Run(*own), args


def full_parser(command: str) -> HfArgumentParser:
    """The parser of all options, the trainer's among them; those that `--help` shows look as they do there.

    Args:
        command (`str`): "erase" or "anchors".
    """
    parser = HfArgumentParser(SpaceConfig, **parser_options(command))
    rows = {part.name: part.metadata["help"] for part in fields(TrainerRows)}
    for action in parser._actions:
        action.help = rows.get(action.dest, action.help)
    parser.set_defaults(output_dir=OUTPUT)
    for kind in OWN:
        add_fields(parser, kind)
    add_help(parser, command)
    parser.add_argument("--help-all", action="help", dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def model_kwargs(arguments: EraseArguments, args: SpaceConfig) -> dict:
    """Arguments of `from_pretrained`."""
    return {**args.init_kwargs, **({} if arguments.dtype is None else {"dtype": arguments.dtype})}


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
    """What is asked about pictures: the file's questions, those that the embedded model was taught, or the library's.

    Raises:
        OSError: If there is no such file.
        ValueError: If it holds no such questions.
    """
    if arguments.questions is not None:
        return load_questions(arguments.questions)
    if arguments.model == EMBEDDED:
        from ..demo import DEMO_QUESTIONS

        return DEMO_QUESTIONS
    return DEFAULT_QUESTIONS


def run_erase(argv: Sequence[str], config: ConfigFile | None = None, began: float | None = None) -> Erasure | Erasures:
    """Parses, erases, saves.

    Args:
        argv (`list[str]`): Arguments after "erase", without `--config`.
        config ([`ConfigFile`], *optional*): What `--config` names.
        began (`float`, *optional*): When the command did, by `time.perf_counter`: importing counts as loading.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If an option or a row cannot be used.
    """
    began = time.perf_counter() if began is None else began
    told, args = parse_run(argv, config)
    arguments = told.job
    # Whatever is mistyped shows before the model is loaded.
    questions, config = read_questions(arguments), get_space_config(told.adapter)
    concepts, aliases = [arguments.concept, *arguments.more_concepts], {arguments.concept: arguments.aliases}
    retain = None if arguments.retain is None else read_retained(arguments.retain)
    tested = dict.fromkeys(concepts, arguments.test_images is not None)
    keys = several_stages(concepts, tested, args, config, retain, refined=arguments.refine_steps > 0)
    with stages(["read", "load", *keys, "save"]):
        return _erase(told, args, config, questions, retain, concepts, aliases, began)


def _erase(
    told: Run,
    args: SpaceConfig,
    adapter: SpaceLoraConfig,
    questions: QuestionSet,
    retain: RetainedRows | None,
    concepts: list[str],
    aliases: dict[str, list[str]],
    began: float,
) -> Erasure | Erasures:
    arguments = told.job
    begin("read")
    pool = load_pictures(arguments.pool)
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
        "selection": get_selection(told.selection), "card_data": ErasureCardData(**vars(told.card)),
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
    options["card_data"].seconds["load"] = round(time.perf_counter() - began, 1)
    own = None if probes is None else probes[arguments.concept]
    erasure = erase(model, arguments.concept, aliases=arguments.aliases, probes=own, **options)
    begin("save")
    folder = erasure.save()
    draw_sheet(erasure.anchors, folder, arguments.concept)
    done(f"saved to {folder}")
    return erasure
