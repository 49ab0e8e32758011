"""Builds wheel and sdist, looks through them, and tries them in an empty environment: `make release-check`.

Needs a package index for build tools and dependencies, which come in the versions of constraints.txt (`--newest`: the newest that
the index has; torch is that of constraints.txt all the same).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
FOLDERS = {"space_peft": "space_peft", "trainers": "space_peft/trainers", "hub_cards": "space_peft/hub_cards"}
SUFFIXES = {".py", ".typed", ".jinja", ".json", ".parquet", ".safetensors"}
PUBLIC_NAMES = """
import importlib, importlib.metadata, pathlib, pkgutil, sys
import space_peft

assert pathlib.Path(space_peft.__file__).is_relative_to(sys.prefix), space_peft.__file__
assert space_peft.__version__ == importlib.metadata.version("space-peft")
count = 0
for package in [space_peft.__name__, *(m.name for m in pkgutil.iter_modules(space_peft.__path__, "space_peft."))]:
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None, (package, name)
        count += 1
print(f"{count} public names of space-peft {space_peft.__version__} can be imported")
"""


def sources() -> set[str]:
    """Returns the files that are the package, by their places in the wheel; those that git knows."""
    listed = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {
        FOLDERS[folder] + "/" + rest
        for folder, _, rest in (line.partition("/") for line in listed.splitlines())
        if Path(rest).suffix in SUFFIXES
    }


def check_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if ".dist-info/" in name}
    files = {name for name in names - info if Path(name).suffix in SUFFIXES}
    if files != names - info or files != sources():
        odd = sorted((names - info) ^ sources())
        raise SystemExit(f"{wheel.name} holds other files than the package: {odd[:20]}")
    licences = {Path(name).name for name in info if "/licenses/" in name}
    if licences != {"LICENSE", "NOTICE"}:
        raise SystemExit(f"{wheel.name} holds the licence files {sorted(licences)}, expected LICENSE and NOTICE")
    print(f"{wheel.name}: {len(files)} files, {wheel.stat().st_size / 2**20:.1f} MiB")


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    inside = {place: folder for folder, place in FOLDERS.items()}
    places = sorted(inside, key=len, reverse=True)
    wanted = {"LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "pyproject.toml"}
    for name in sources():
        place = next(place for place in places if name.startswith(place + "/"))
        wanted.add(inside[place] + name[len(place) :])
    unwanted = [name for name in names if name.partition("/")[0] in {"tests", "benchmarks", "docs", "examples"}]
    if unwanted or not wanted <= names:
        raise SystemExit(
            f"{sdist.name} lacks {sorted(wanted - names)[:20]} and should not hold {sorted(unwanted)[:20]}"
        )
    print(f"{sdist.name}: {len(names)} files and folders, {sdist.stat().st_size / 2**20:.1f} MiB")


def fresh(folder: Path) -> Path:
    """Makes an empty environment and returns its folder of programs."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="where wheel and sdist are left")
    parser.add_argument("--newest", action="store_true", help="dependencies as new as the index has them")
    parser.add_argument("--skip_demo", action="store_true", help="do not run `space-peft demo`")
    options = parser.parse_args()
    pinned = ["-c", str(ROOT / "constraints.txt")]

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def run(*command) -> None:
            print("$", *command, flush=True)
            # Away from the checkout, whose package would be found first.
            subprocess.run([str(part) for part in command], cwd=work, check=True)

        def install(programs: Path, *what) -> None:
            run(programs / "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *what)

        # A copy of what git knows: files left over from earlier builds do not get in.
        source = work / "source"
        for name in subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]:
            if (ROOT / name).is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, source / name)
        builder = fresh(work / "builder")
        install(builder, "build")
        shutil.rmtree(options.output, ignore_errors=True)
        # The wheel is built from the sdist: what the latter lacks would be missing.
        run(builder / "python", "-m", "build", "--outdir", options.output.resolve(), source)
        (wheel,), (sdist,) = options.output.glob("*.whl"), options.output.glob("*.tar.gz")
        check_wheel(wheel)
        check_sdist(sdist)
        programs = fresh(work / "empty")
        install(programs, *pinned, "torch")  # First and by its exact version: a range would pull the CUDA build.
        install(programs, *([] if options.newest else pinned), wheel.resolve())
        run(programs / "space-peft", "--help")
        run(programs / "python", "-c", PUBLIC_NAMES)
        if not options.skip_demo:
            run(programs / "space-peft", "demo", "--output", work / "demo")
        # What it depends on is there by now, and the same.
        run(programs / "pip", "uninstall", "--quiet", "--yes", "space-peft")
        install(programs, sdist.resolve())
        run(programs / "space-peft", "--help")
        run(programs / "python", "-c", PUBLIC_NAMES)
    print("wheel and sdist are fine")


if __name__ == "__main__":
    sys.exit(main())
