"""Where something is: here, or on the Hub. A mistyped name is an error at once, before anything slow is imported or asked."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from ..choices import nearest
from .base_model import is_hub_id


Kind = Literal["model", "dataset", "folder"]

# A repository of such a name is thinkable, but who writes this means a file.
_FILES = (".json", ".jsonl", ".parquet", ".safetensors", ".yaml", ".yml", ".zip", ".csv")
# What `datasets` calls the kinds of files that rows are read from.
DATA_FILES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
EXPECTED_DATA = (
    "a folder of pictures, a saved dataset, a Parquet, JSON, JSON lines or CSV file "
    f"({', '.join(DATA_FILES)}), a folder of files of one such kind, or the id of a dataset on the Hub"
)
_SECONDS = 5.0  # For the Hub to say whether it has a repository.


def is_path(place: str | os.PathLike) -> bool:
    """Whether a text can only be a path: no repository of the Hub is called so."""
    text = os.fspath(place)
    marked = text.startswith((".", "~")) or text.lower().endswith(_FILES)
    return isinstance(place, os.PathLike) or marked or not is_hub_id(text, loaded=False)


def dataset_on_hub(place: str) -> tuple[str, str | None]:
    """Repository and configuration of "org/name/configuration"; no configuration for everything else.

    Args:
        place (`str`): Id of a dataset, without its split.
    """
    repository, _, configuration = place.rpartition("/")
    if place.count("/") == 2 and is_hub_id(repository, loaded=False) and not place.lower().endswith(_FILES):
        return repository, configuration
    return place, None


def refuse_missing(place: str | os.PathLike) -> None:
    """Raises `FileNotFoundError` for a path that is none here; what may be a repository passes."""
    if is_path(place) and not Path(place).exists():
        raise FileNotFoundError(f"there is no file or folder {os.fspath(place)!r}.{_hint(place)}")


def data_file_kind(place: str | os.PathLike) -> str:
    """What `datasets` calls the kind of a file that rows are read from.

    Raises:
        ValueError: If rows are read from no file of its suffix.
    """
    kind = DATA_FILES.get(Path(place).suffix.lower())
    if kind is None:
        raise ValueError(f"no rows are read from the file {os.fspath(place)!r}; expected {EXPECTED_DATA}.")
    return kind


def check_place(place: str, kind: Kind = "model", words: Collection[str] = ()) -> None:
    """Whether there is anything at a place that a user gave; what it is shows when it is read.

    A repository is asked for once, without repeating, unless some version of it is in the cache.

    Args:
        place (`str`): Folder, file or Hub id. For a dataset "id:split" and "id/configuration" are the same as "id".
        kind (`str`, defaults to `"model"`): "model" or "dataset", for the Hub has both; "folder" for what can only be here.
        words (`list[str]`, *optional*): Words that stand for a place, of which one may have been meant.

    Raises:
        FileNotFoundError: If it is neither here nor on the Hub, as far as one may look.
        ConnectionError: If it is not here, and the Hub does not answer.
        ValueError: If it is a file, and no rows are read from such files.
    """
    if Path(place).exists():
        if kind == "dataset" and Path(place).is_file():
            data_file_kind(place)
        return
    if kind == "folder":
        raise FileNotFoundError(f"there is no file or folder {place!r}.{_hint(place, words)}")
    name = dataset_on_hub(place.partition(":")[0])[0] if kind == "dataset" else place
    refuse_missing(name)
    _ask_hub(name, kind, place, _hint(place, words))


def _ask_hub(name: str, kind: Kind, place: str, hint: str) -> None:
    """Raises if there is no repository of a name; the message says what was given, `place`."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError

    if Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}").is_dir():
        return
    here = f"there is no file or folder {place!r} here"
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(
            f"{here}, and no {kind} of that id in the Hub's cache; the Hub itself is not asked (HF_HUB_OFFLINE).{hint}"
        )
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except GatedRepoError:
        return  # It is there; whoever loads it says how to get in.
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{here}, and no {kind} of that id on the Hub (or a private one: `hf auth login`).{hint}"
        ) from error
    except HfHubHTTPError:
        return  # The Hub has troubles of its own, which whoever loads it tries to outlast.
    except (HTTPError, OSError) as error:
        raise ConnectionError(f"{here}, and the Hub cannot be asked for a {kind} of that id: {error}.{hint}") from error


def _hint(place: str | os.PathLike, words: Collection[str] = ()) -> str:
    """The path that was meant, as far as that can be guessed: each part that is not there, replaced by the nearest that is. Or a
    word that stands for one."""
    if near := nearest(os.fspath(place), words):
        return f" Did you mean {near[0]!r}?"
    found = Path()
    for part in Path(place).parts:
        if not (found / part).exists():
            try:
                near = nearest(part, os.listdir(found))
            except OSError:  # Not a folder, or not ours to read.
                return ""
            if not near:
                return ""
            part = near[0]
        found /= part
    return f" Did you mean {str(found)!r}?"
