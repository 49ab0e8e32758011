"""Where a dataset came from, as far as `datasets` remembers: what provenance and model cards state."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import Dataset


_COMMIT = re.compile(r"[0-9a-f]{40}")


def dataset_source(dataset: Any) -> dict[str, Any]:
    """Hub id, commit, split and licence of a dataset; no paths.

    `load_dataset` records neither id nor commit in the dataset, but keeps its files in a folder of its cache that is
    named by them: `owner___name/config/version/commit`. `select`, `map` and `filter` stay in it. A dataset made in memory,
    or from files, has no id: its fingerprint tells it from others.

    Args:
        dataset ([`~datasets.Dataset`] or a sequence): Rows.

    Returns:
        `dict`: `id`, `revision`, `split`, `license`, `fingerprint` (`str`, or `None` where unknown) and `rows` (`int`).
    """
    source = dict.fromkeys(("id", "revision", "split", "license", "fingerprint")) | {"rows": len(dataset)}
    if not isinstance(dataset, Dataset):
        return source
    found = {_from_cache(Path(file["filename"])) for file in dataset.cache_files}
    if len(found) == 1 and (origin := found.pop()):  # Rows of several datasets have no single origin.
        source["id"], source["revision"] = origin
    source["split"] = str(dataset.split) if dataset.split is not None else None
    source["license"] = dataset.info.license or None
    source["fingerprint"] = dataset._fingerprint
    return source


def _from_cache(path: Path) -> tuple[str, str] | None:
    folders = path.parts[-5:-1]
    if len(folders) < 4 or "___" not in folders[0] or not _COMMIT.fullmatch(folders[3]):
        return None
    return folders[0].replace("___", "/", 1), folders[3]
