"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; it becomes `path` (file or folder) only if the block succeeds.

    Args:
        path (`str` or `os.PathLike`): Where the finished file or folder shall be. Missing parents are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            # A folder cannot be renamed over a folder that holds something: move the old one away first.
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def json_text(content: Any) -> str:
    """Content as indented JSON; NaN and infinities are refused."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes `content` as indented UTF-8 JSON, all or nothing; NaN and infinities are refused."""
    text = json_text(content)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
