"""Files that users write: options and questions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .places import check_place


def read_yaml(path: str | os.PathLike, *, example: str = "concept: fox") -> dict[str, Any]:
    """The mapping in a user's YAML file.

    Args:
        path (`str` or `os.PathLike`): The file.
        example (`str`): A line of such a file, for the error.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML, or no mapping.
    """
    import yaml

    check_place(os.fspath(path), "folder")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected names with values, such as `{example}`.")
    return values
