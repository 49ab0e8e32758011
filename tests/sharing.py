"""What is trained for many tests, trained once for all the processes that test."""

import os
from pathlib import Path

from filelock import FileLock


def made_once(tmp_path_factory, name: str, make) -> Path:
    """A folder that the first of the testing processes makes, by `make(folder)`, and all of them use. Do not change it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # Each process has a folder of its own in the run's.
    folder = root / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = root / f"{name}.unfinished"
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder
