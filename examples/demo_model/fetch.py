"""Fetch the emoji image sets and name sets from the npm registry and unpack them.

    python examples/demo_model/fetch.py --work work

Every package is pinned, so that the images, and with them the trained model, are the same later. A package that is
already unpacked in `<work>/npm/<package>-<version>` is left alone, so a second run needs no network.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path


# Only sets whose licence allows embedding (see NOTICE): npm name -> version.
IMAGE_PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2"),
    "fluent-emoji": ("@iconify-json/fluent-emoji", "1.2.7"),
    "fluent-emoji-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
}
NAME_PACKAGE = ("unicode-emoji-json", "0.9.0")


def package_folder(work: Path, package: str, version: str) -> Path:
    """Folder that holds an unpacked npm package, named as `npm pack` names its tarball."""
    return work / "npm" / f"{package.lstrip('@').replace('/', '-')}-{version}"


def fetch_package(work: Path, package: str, version: str) -> Path:
    """Download and unpack one npm package unless it is there already.

    Args:
        work (`Path`): Work folder.
        package (`str`): npm name, scope included.
        version (`str`): Exact version.

    Returns:
        `Path`: The folder with the package's files.

    Raises:
        `RuntimeError`: If `npm pack` fails; its message is passed on.
    """
    folder = package_folder(work, package, version)
    if folder.is_dir():
        print(f"{package}@{version}: already in {folder}")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = ["npm", "pack", f"{package}@{version}", "--pack-destination", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"`{' '.join(command)}` failed with code {done.returncode}:\n{done.stderr.strip()}")
        (tarball,) = Path(scratch).glob("*.tgz")
        with tarfile.open(tarball) as archive:
            archive.extractall(scratch, filter="data")
        shutil.move(Path(scratch) / "package", folder)
    print(f"{package}@{version}: unpacked in {folder}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="work folder (default: ./work)")
    work = parser.parse_args().work
    for package, version in [*IMAGE_PACKAGES.values(), NAME_PACKAGE]:
        fetch_package(work, package, version)


if __name__ == "__main__":
    main()
