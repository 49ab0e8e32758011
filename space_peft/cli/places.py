"""What commands are given is looked for before anything slow is imported, and modules of the user's own are imported."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..records.places import Kind, check_place
from ..records.yaml_file import read_yaml


# By command and option: where each is looked for. A test compares this table with the parser.
PLACES: dict[str, dict[str, Kind]] = {
    "merge": {"adapter": "model", "base_model": "model"},
    "stats": {"model": "model", "data": "dataset"},
    "card": {"folder": "folder"},
    "push": {"folder": "folder"},
    "verify": {"adapter": "model", "base_model": "model", "retain_data": "dataset", "images": "dataset"},
    "evaluate": {"adapter": "model", "merged": "model", "base_model": "model", "images": "dataset"},
    "attack": {"adapter": "model", "merged": "model", "base_model": "model", "images": "dataset"},
    "audit": {"adapter": "model", "base_model": "model", "images": "dataset"},
    "plan": {"model": "model"},
    "probe": {"images": "dataset", "adapter": "folder"},
    "bench": {"model": "model", "reference": "model", "pool": "dataset", "source": "dataset"},
    "erase": {
        "model": "model", "pool": "dataset", "retain": "dataset", "statistics": "model", "test_images": "dataset",
        "questions": "folder",
    },
}  # fmt: skip
PLACES["anchors"] = PLACES["erase"]
# Commands that load a model, and so may need a class of it.
LOADING = ("merge", "stats", "verify", "audit", "plan", "bench", "evaluate", "attack")
EMBEDDED = "demo"  # The embedded model, in place of an id.
TAKE_EMBEDDED = ("model", "base_model", "reference")  # Options.


def model_place(model: str) -> str:
    """Folder or id of a model that a user named; "demo" is the embedded one."""
    if model != EMBEDDED:
        return model
    from ..demo import demo_model_path

    return str(demo_model_path())


def check_places(command: str, options: Mapping[str, Any]) -> None:
    """Raises `OSError` if some folder, file or repository that a command was given is not there, `ValueError` for a file that
    no rows are read from.

    Args:
        command (`str`): Its name.
        options (`dict`): Its options by name, as parsed; those that were not given may be missing or `None`.
    """
    for name, kind in PLACES.get(command, {}).items():
        place = options.get(name)
        if not isinstance(place, str) or name in TAKE_EMBEDDED and place == EMBEDDED:
            continue
        try:
            check_place(place, kind, [EMBEDDED] if name in TAKE_EMBEDDED else [])
        except (OSError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error


class ConfigFile(NamedTuple):
    """
    What `--config` names, read.

    Args:
        path (`str`): The file.
        values (`dict`): Options by name.
    """

    path: str
    values: dict[str, Any]


def take_config(argv: Sequence[str]) -> tuple[ConfigFile | None, list[str]]:
    """The file of `--config`, and the arguments without it. A `--config` without a file is left to the command's parser.

    Args:
        argv (`list[str]`): Arguments after the command's name.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no YAML mapping.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", metavar="FILE")
    try:
        known, rest = first.parse_known_args(argv)
    except argparse.ArgumentError:
        return None, list(argv)
    return (None if known.config is None else ConfigFile(known.config, read_yaml(known.config))), rest


def import_modules(names: Iterable[str]) -> None:
    """Imports modules that register classes of models with transformers; from the current folder, too.

    Args:
        names (`list[str]`): Such as "my_model" or "my_package.models".

    Raises:
        ValueError: If one of them cannot be imported.
    """
    here = os.getcwd()
    for name in names:
        if here not in sys.path:
            sys.path.append(here)  # Last: nothing installed is shadowed by what lies here.
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"--import {name}: {error}. Expected the name of a module, such as my_model for my_model.py in this folder."
            ) from error
