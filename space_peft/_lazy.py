"""Public names that are imported when they are first used, so that importing a package costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_exports(package: str, exports: dict[str, str]) -> tuple[Callable, Callable, list[str]]:
    """What a package's `__init__` needs to import its names lazily (PEP 562).

    Args:
        package (`str`): `__name__` of the package.
        exports (`dict[str, str]`): Public name -> submodule that defines it.

    Returns:
        `tuple[Callable, Callable, list[str]]`: `__getattr__`, `__dir__` and `__all__`.
    """
    names = sorted(exports)

    def __getattr__(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{exports[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return names

    return __getattr__, __dir__, names
