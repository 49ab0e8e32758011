"""`space-peft erase`: the whole job from a YAML file, flags, or both."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset
from PIL import Image
from transformers import HfArgumentParser

from ..data.questions import DEFAULT_QUESTIONS
from ..erasing import AdapterArguments, EraseArguments, Erasure, erase, get_space_config
from ..evaluation import build_probes
from ..modeling.loading import load_model
from ..retained.reading import load_rows
from ..trainers import SpaceConfig
from .errors import bad_input
from .places import import_modules, read_yaml


def parse_run(argv: Sequence[str]) -> tuple[EraseArguments, AdapterArguments, SpaceConfig]:
    """Reads `--config FILE` (YAML), over which flags win, as TRL's scripts do.

    Args:
        argv (`list[str]`): Arguments after "erase".

    Raises:
        ValueError: If the file is no YAML mapping, or has a key that is no field; the message has the nearest one.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    first.add_argument("--import", dest="modules", action="append", default=[])
    known, rest = first.parse_known_args(argv)
    values = {} if known.config is None else read_yaml(known.config)
    named = values.pop("import", [])
    import_modules([*([named] if isinstance(named, str) else named), *known.modules])
    parser = HfArgumentParser(
        (EraseArguments, AdapterArguments, SpaceConfig),
        prog="space-peft erase",
        description="Make a model forget a concept. --config FILE reads the options below from YAML; flags win. --import MODULE "
        "imports a module of your own first, which registers the model's class.",
    )
    if values:
        options = {action.dest: action for action in parser._actions}
        for key in values:
            if key not in options:
                near = difflib.get_close_matches(key, options, n=3, cutoff=0.5)
                hint = f"; did you mean {', '.join(near)}?" if near else "; see space-peft erase --help."
                raise ValueError(f"{known.config} sets {key!r}, which is no option{hint}")
            options[key].required = False
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(rest)


def load_images(place: str) -> Dataset:
    """Pictures for the command line: a folder of files, or whatever `load_rows` reads.

    Args:
        place (`str`): Folder, file or Hub id.

    Raises:
        ValueError: If there is no column `image`.
    """
    folder = Path(place)
    pictures = folder.is_dir() and any(
        path.suffix.lower() in Image.registered_extensions() for path in folder.rglob("*") if path.is_file()
    )
    images = load_dataset("imagefolder", data_dir=place, split="train") if pictures else load_rows(place)
    if "image" not in images.column_names:
        raise ValueError(f"{place!r} has the columns {images.column_names}; expected a column `image`.")
    return images


def run_erase(argv: Sequence[str]) -> Erasure:
    """Parses, erases, saves.

    Args:
        argv (`list[str]`): Arguments after "erase".

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If an option or a row cannot be used.
    """
    arguments, adapter, args = parse_run(argv)
    if arguments.pool is None:
        raise ValueError("--pool is missing: public images, of which some stand in for the concept.")
    # Whatever is mistyped shows before the model is loaded.
    pool = load_images(arguments.pool)
    retain = None if arguments.retain is None else load_rows(arguments.retain)
    pictures = None if arguments.test_images is None else load_images(arguments.test_images)
    peft_config = get_space_config(adapter)
    probes = None
    if pictures is not None:
        probes = build_probes(
            arguments.concept, questions=DEFAULT_QUESTIONS, target_images=pictures["image"], aliases=arguments.aliases
        )
    kwargs = args.init_kwargs
    if arguments.dtype is not None:
        kwargs["dtype"] = arguments.dtype
    erasure = erase(
        load_model(arguments.model, **kwargs),
        arguments.concept,
        pool=pool,
        retain_dataset=retain,
        statistics=arguments.statistics,
        aliases=arguments.aliases,
        probes=probes,
        k=arguments.anchors,
        refine_steps=arguments.refine_steps,
        args=args,
        peft_config=peft_config,
        resume=not arguments.fresh,
    )
    erasure.save()
    return erasure


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv (`list[str]`): Arguments after "erase".

    Returns:
        `int`: 0.

    Raises:
        BadInput: If the input was bad.
    """
    with bad_input("erase", TypeError):
        erasure = run_erase(argv)
    print(erasure.summary())
    return 0
