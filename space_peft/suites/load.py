"""One door to every suite."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

from .clear import load_clear
from .fiubench import load_fiubench
from .mllmu import load_mllmu
from .own import load_own
from .people import load_people
from .schema import Suite, check_choice
from .vlm_unbench import load_vlm_unbench


LOADERS: dict[str, Callable[..., Suite]] = {
    "mllmu": load_mllmu,
    "clear": load_clear,
    "fiubench": load_fiubench,
    "vlm_unbench": load_vlm_unbench,
    "people": load_people,
    "own": load_own,
}


def load_suite(name: str, source: str | os.PathLike | None = None, **options) -> Suite:
    """Reads a suite by its name.

    Args:
        name (`str`): `"mllmu"`, `"clear"`, `"fiubench"`, `"vlm_unbench"`, `"people"`, which is in the package, or
            `"own"` for a file of one's own.
        source (`str` or `os.PathLike`, *optional*): Hub id, Parquet or JSON lines file, or folder; the first three know theirs
            on the Hub.
        options (*optional*): Of the loader, e.g. `split="forget_5"`: see `load_mllmu`, `load_clear`, `load_fiubench`,
            `load_vlm_unbench`, `load_people`, `load_own`.

    Returns:
        [`Suite`]

    Raises:
        ValueError: If there is no suite of this name, it needs a source, or it has no such option.
    """
    check_choice(name, tuple(LOADERS), "the suite's name")
    known = [option for option in inspect.signature(LOADERS[name]).parameters if option != "source"]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"the suite {name!r} takes no `{unknown[0]}`; it takes {known}.")
    if source is not None and name == "people":
        raise ValueError(f"the suite 'people' is in the package and has no other source, got {str(source)!r}.")
    if source is None and name in ("vlm_unbench", "own"):
        raise ValueError(
            f"the suite {name!r} is not on the Hub; pass the file, folder or Hub id that holds it as `source`."
        )
    return LOADERS[name](**({} if source is None else {"source": source}), **options)
