"""Which versions a result was made with."""

from __future__ import annotations

import platform
from importlib import metadata

from .._version import __version__


_LIBRARIES = ("space-peft", "torch", "transformers", "peft", "datasets", "evaluate")


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of packages, by name; `None` for one that is not installed as a distribution."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            # In a checkout the metadata may be those of an earlier day.
            found[package] = __version__ if package == "space-peft" else metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def collect_versions() -> dict[str, str | None]:
    """Versions of what the figures depend on, Python's included."""
    return {"python": platform.python_version(), **versions(*_LIBRARIES)}
