"""Results belong to weights: which adapter the certificate, report and canary in a folder were measured on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from transformers.utils.logging import get_logger

from .digests import file_digest
from .folder import ADAPTER_NAME, MEASURED_NAME, RESULTS, SPACE_CONFIG_NAME, beside
from .io import write_json
from .safe_json import read_json


logger = get_logger(__name__)


def saved_digest(folder: str | os.PathLike) -> str | None:
    """The digest of the adapter saved in a folder, see [`file_digest`]; `None` if there is none."""
    path = Path(folder, ADAPTER_NAME)
    return file_digest(path) if path.is_file() else None


def note_measured(folder: str | os.PathLike, results: Mapping[str, str]) -> None:
    """Notes which weights results in a folder were measured on; notes of results that are gone are dropped.

    Args:
        folder (`str` or `os.PathLike`): Of the adapter.
        results (`dict[str, str]`): By file, e.g. "report.json", the digest of the weights, see [`adapter_digest`].
    """
    folder = Path(folder)
    notes = {name: digest for name, digest in {**_notes(folder), **results}.items() if (folder / name).is_file()}
    if notes:
        write_json(folder / MEASURED_NAME, notes)
    else:
        (folder / MEASURED_NAME).unlink(missing_ok=True)


def other_weights(folder: str | os.PathLike) -> list[str]:
    """Results in a folder that were measured on other weights than those of the adapter beside them.

    Those that nothing is noted of (written by hand, or by an earlier version) are not among them.

    Args:
        folder (`str` or `os.PathLike`): Of the adapter.

    Raises:
        ValueError: If the notes are damaged.
    """
    folder = Path(folder)
    notes = {name: digest for name, digest in _notes(folder).items() if (folder / name).is_file()}
    if not notes:
        return []
    saved = saved_digest(folder)
    return [name for name in RESULTS if name in notes and notes[name] != saved]


def check_measured(folder: str | os.PathLike) -> None:
    """Refuses a folder with results of other weights, before it is shown or published.

    Raises:
        ValueError: If there are any, or the notes are damaged.
    """
    if other := other_weights(folder):
        raise ValueError(
            f"{', '.join(other)} in {str(folder)!r} {'was' if len(other) == 1 else 'were'} measured on other weights than "
            f"those in {ADAPTER_NAME}, so {'it says' if len(other) == 1 else 'they say'} nothing of this adapter. Evaluate "
            "this one (`trainer.evaluate()`, then `save_model()`), or move the files out of the folder."
        )


def check_projected(folder: str | os.PathLike) -> None:
    """Refuses an adapter whose weights are not those that its config notes to be in the null space.

    Folders whose config notes nothing (of version 0.1.0) are taken as they are.

    Raises:
        ValueError: If the adapter was never attached to null spaces, or `lora_A` was changed after training under the
            constraint, e.g. by further training without it, or by mixing adapters.
    """
    path, weights = Path(folder, SPACE_CONFIG_NAME), Path(folder, ADAPTER_NAME)
    content = read_json(path, kind="configuration of the constraint") if path.is_file() else {}
    if "projected" not in content or not weights.is_file():
        return
    noted = content["projected"]
    if noted is None:
        raise ValueError(
            f"{SPACE_CONFIG_NAME} in {str(folder)!r} asks for the {content.get('constraint')!r} constraint, but the adapter was "
            "never in the null space of retained data: it was trained without NullSpaceCallback, or is a mix of others. Train "
            f"it under the constraint, or remove {SPACE_CONFIG_NAME} and publish it as a plain LoRA."
        )
    if not isinstance(noted, dict) or noted.get("lora_A") != file_digest(weights, kinds=("lora_A",)):
        raise ValueError(
            f"{SPACE_CONFIG_NAME} in {str(folder)!r} says that the adapter is in the null space of retained data, but the "
            f"lora_A in {ADAPTER_NAME} is not the one that was: it was trained on without the constraint, or mixed. Train it "
            f"under the constraint again, or remove {SPACE_CONFIG_NAME} and publish it as a plain LoRA."
        )


def remove_results(folder: str | os.PathLike, saved: str | None, before: float | None) -> None:
    """Removes results that an earlier run, or an earlier adapter, left in a folder, and says so.

    Args:
        folder (`str` or `os.PathLike`): Of the adapter.
        saved (`str`, *optional*): Digest of the adapter in it: results of others go.
        before (`float`, *optional*): A time: results that nothing is noted of go if they are older.
    """
    folder = Path(folder)
    notes = _notes(folder)
    for name in RESULTS:
        if not (folder / name).is_file():
            continue
        if name in notes:
            stale, reason = notes[name] != saved, "was measured on other weights than those saved now"
        else:
            stale = before is not None and (folder / name).stat().st_mtime < before
            reason = "was made before this training"
        if stale:
            logger.warning("Removed %s: it %s; evaluate again.", folder / name, reason)
            for path in [path for pattern in beside(name) for path in folder.glob(pattern)]:
                path.unlink()
                if path.parent != folder and not any(path.parent.iterdir()):
                    path.parent.rmdir()
    note_measured(folder, {})


def _notes(folder: Path) -> dict[str, str]:
    path = folder / MEASURED_NAME
    if not path.is_file():
        return {}
    notes = read_json(path, kind="list of what results were measured on", remedy="Evaluate the adapter again.")
    if not all(isinstance(digest, str) for digest in notes.values()):
        raise ValueError(f"{str(path)!r} must map files to digests. Evaluate the adapter again.")
    return notes
