"""What is an id on the Hub, by one rule whichever version of huggingface_hub is installed."""

from __future__ import annotations

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id as _validate_repo_id


def validate_repo_id(name: str | None) -> None:
    """huggingface_hub's, as it is from 2.0 on; can go when that is the oldest version.

    Before, no id at all was an error (until 1.16 at least), and an id could end in a line break.

    Raises:
        HFValidationError: If it is no id on the Hub. `None` is none that could be wrong.
    """
    if name is None:
        return
    if isinstance(name, str) and name.endswith("\n"):
        raise HFValidationError(f"Repo id must not end in a line break: {name!r}.")
    _validate_repo_id(name)
