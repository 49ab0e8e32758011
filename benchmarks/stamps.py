"""The stamps of Tux Paint (Debian's `tuxpaint-stamps-default`, GPL-2): captioned photo cut-outs and drawings.

Fetched into a cache folder, never redistributed.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path


STAMPS = "tuxpaint-stamps-default"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "space_peft_benchmarks"


def stamps():
    """The pool: pictures with the first line of the text file beside them as caption, their folder as kind."""
    import datasets
    from datasets import Dataset

    folder = cache_folder() / "stamps"
    if not folder.exists():
        cache_folder().mkdir(parents=True, exist_ok=True)
        if not list(cache_folder().glob(f"{STAMPS}_*.deb")):
            subprocess.run(["apt-get", "download", STAMPS], check=True, cwd=cache_folder())
        package = next(cache_folder().glob(f"{STAMPS}_*.deb"))
        unpacked = Path(tempfile.mkdtemp(dir=cache_folder()))
        subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
        os.replace(unpacked, folder)
    rows = []
    for picture in sorted(folder.rglob("*.png")):
        text = picture.with_suffix(".txt")
        if text.exists():
            caption = text.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
            rows.append({"image": str(picture), "caption": caption, "id": str(picture.relative_to(folder).parent.name)})
    return Dataset.from_list(rows).cast_column("image", datasets.Image())
