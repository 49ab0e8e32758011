"""Which base model an adapter is of, as far as others can know it: its id on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeGuard, overload

from huggingface_hub.errors import HFValidationError

from .card_data import ErasureCardData, is_local_path
from .repository_ids import validate_repo_id


def is_hub_id(name: object, *, loaded: bool = True) -> TypeGuard[str]:
    """Whether a name may be that of a repository on the Hub.

    Args:
        name: Of a model.
        loaded (`bool`, defaults to `True`): Whether a model was loaded by this name: what was loaded from a folder is no
            repository, even where its relative path looks like one.
    """
    if not name or not isinstance(name, str) or is_local_path(name) or loaded and Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@overload
def base_model_id(
    given: str | None, data: ErasureCardData | None, adapter: Mapping, *, local: Literal[False] = False
) -> str: ...


@overload
def base_model_id(
    given: str | None, data: ErasureCardData | None, adapter: Mapping, *, local: Literal[True]
) -> str | None: ...


def base_model_id(
    given: str | None, data: ErasureCardData | None, adapter: Mapping, *, local: bool = False
) -> str | None:
    """The base model's id on the Hub: as given, as the card data say, or as the adapter's configuration does.

    Args:
        given (`str`, *optional*): By the user.
        data ([`ErasureCardData`], *optional*): Of the adapter.
        adapter (`dict`): Content of `adapter_config.json`.
        local (`bool`, defaults to `False`): Whether `None` is returned for a local model, of which nobody gave an id.

    Raises:
        ValueError: If the first of them that says anything is no id, but a path.
    """
    told = given or (data.base_model if data is not None else None)
    name = told or adapter.get("base_model_name_or_path")
    if is_hub_id(name, loaded=not told):
        return name
    if local and not told:
        return None
    raise ValueError(
        f"the adapter's base model is {name!r}, which is not an id on the Hub: a path must not be published, and nobody else "
        "could load it. Pass the id of the same model, such as 'llava-hf/llava-1.5-7b-hf', as `base_model` "
        "(`--base-model` on the command line)."
    )
