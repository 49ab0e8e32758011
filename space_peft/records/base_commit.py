"""Which commit of the Hub a loaded model is."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name

from .repository_ids import validate_repo_id


_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG = "config.json"


def loaded_commit(name: str, revision: str | None = None) -> str | None:
    """The commit a model was loaded from, as far as the cache tells: transformers does not keep it.

    Args:
        name (`str`): The model's id, its `config._name_or_path`.
        revision (`str`, *optional*): What `from_pretrained` was asked for, if that is known.

    Returns:
        `str`: `None` if the model is no repository, or if the cache holds several commits and it is not known which of
        them was asked for.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    if revision is not None:
        path = try_to_load_from_cache(name, _CONFIG, revision=revision)
        return Path(path).parent.name if isinstance(path, str) else None
    snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    commits = [path.parent.name for path in snapshots.glob(f"*/{_CONFIG}")]
    return commits[0] if len(commits) == 1 else None
