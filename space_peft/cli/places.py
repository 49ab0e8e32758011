"""What commands are given is looked for before anything slow is imported, and modules of the user's own are imported."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..records.places import Kind, check_place


# By command and option: where each is looked for. A test compares this table with the parser.
PLACES: dict[str, dict[str, Kind]] = {
    "merge": {"adapter": "model", "base_model": "model"},
    "stats": {"model": "model", "data": "dataset"},
    "card": {"folder": "folder"},
    "push": {"folder": "folder"},
    "verify": {"adapter": "model", "base_model": "model", "retain_data": "dataset", "images": "folder"},
    "evaluate": {"adapter": "model", "merged": "model", "base_model": "model", "images": "dataset"},
    "attack": {"adapter": "model", "merged": "model", "base_model": "model", "images": "dataset"},
    "audit": {"adapter": "model", "base_model": "model", "images": "folder"},
    "plan": {"model": "model"},
    "probe": {"images": "folder", "adapter": "folder"},
    "bench": {"model": "model", "reference": "model", "pool": "dataset", "source": "dataset"},
    "erase": {
        "model": "model", "pool": "dataset", "retain": "dataset", "statistics": "model", "test_images": "dataset",
    },
}  # fmt: skip
PLACES["anchors"] = PLACES["erase"]
# Commands that load a model, and so may need a class of it.
LOADING = ("merge", "stats", "verify", "audit", "plan", "bench", "evaluate", "attack")
EMBEDDED = "demo"  # The embedded model, in place of an id.


def check_places(command: str, options: Mapping[str, Any]) -> None:
    """Raises `OSError` if some folder, file or repository that a command was given is not there.

    Args:
        command (`str`): Its name.
        options (`dict`): Its options by name, as parsed; those that were not given may be missing or `None`.
    """
    for name, kind in PLACES.get(command, {}).items():
        place = options.get(name)
        if not isinstance(place, str) or kind == "model" and place == EMBEDDED and command in ("plan", "bench"):
            continue
        try:
            check_place(place, kind)
        except OSError as error:
            raise type(error)(f"{name}: {error}") from error


def erase_places(argv: Sequence[str]) -> dict[str, Any]:
    """The places among the options of `space-peft erase`, whose real parser takes seconds to import.

    Args:
        argv (`list[str]`): Arguments after "erase".
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    for name in PLACES["erase"]:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    try:
        given = vars(parser.parse_known_args(argv)[0])
    except argparse.ArgumentError:
        return {}  # The real parser says what is wrong.
    config = given.pop("config")
    values = {} if config is None else read_yaml(config)
    return {**values, **{name: value for name, value in given.items() if value is not None}}


def read_yaml(path: str) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML, or no mapping.
    """
    import yaml

    check_place(path, "folder")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected options by name, such as `concept: fox`.")
    return values


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
