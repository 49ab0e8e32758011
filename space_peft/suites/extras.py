"""The packages behind the metrics, which are an extra of this one."""

from __future__ import annotations

import importlib


_PACKAGES = {"rouge_score": "rouge-score", "nltk": "nltk", "scipy": "scipy"}


def require(module: str):
    """Imports a module of one of these packages.

    Args:
        module (`str`): E.g. "scipy.stats".

    Raises:
        ImportError: If the package is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # One of its own dependencies is missing.
        raise ImportError(
            f"the metrics of suites need {_PACKAGES[package]}: `pip install space-peft[bench]`.", name=package
        ) from error


def require_all() -> None:
    """Fails before a model is asked anything, rather than after."""
    for module in _PACKAGES:
        require(module)
