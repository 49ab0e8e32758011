"""Which checkpoint a killed run goes on from."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """Returns the newest checkpoint that was written to its end; `None` if there is none.

    `transformers.trainer_utils.get_last_checkpoint` takes the newest folder, also one in which a killed run has left
    half of a file. Trainer writes its state last, so a checkpoint whose state can be read is complete.

    Args:
        folder (`str` or `os.PathLike`): Trainer's `output_dir`.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := pattern.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            warnings.warn(f"checkpoint {str(path)!r} was not written to its end and is passed over.", stacklevel=3)
            continue
        return str(path)
    return None
